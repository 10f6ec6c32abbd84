import ast
import sys

import pytest
from llama_patches.errors import BuildError
from llama_patches.relocate import check, rewrite

# What the moved packages may import when they are imported: nothing that takes long or has effects of its own.
ALLOWED = {"numpy", "torch", "yaml", "llama_cpp"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import gguf\n", "from llama_cpp import _gguf as gguf\n"),
        ("import gguf as g  # why\n", "from llama_cpp import _gguf as g  # why\n"),
        ("import os, gguf\n", "import os; from llama_cpp import _gguf as gguf\n"),
        ("import gguf.vocab as v\n", "from llama_cpp._gguf import vocab as v\n"),
        ("from gguf import (\n    a,\n    b,\n)\n", "from llama_cpp._gguf import (\n    a,\n    b,\n)\n"),
        ("from gguf.constants import A\n", "from llama_cpp._gguf.constants import A\n"),
        ("def f():\n    from conversion import x\n", "def f():\n    from llama_cpp._conversion import x\n"),
        ("from .gguf import a\nfrom ggufx import b\n", "from .gguf import a\nfrom ggufx import b\n"),
        ("x = 'import gguf'\n", "x = 'import gguf'\n"),
    ],
)
def test_imports_are_renamed(old, new):
    assert rewrite(old, "m.py") == new


@pytest.mark.parametrize(
    "text",
    [
        "\nimport gguf.vocab\n",
        "\n__import__(f'conversion.{name}')\n",
        "\nimportlib.import_module('gguf')\n",
    ],
)
def test_what_cannot_be_renamed_is_named(text):
    with pytest.raises(BuildError, match=r"^m\.py:2: "):
        rewrite(text, "m.py")


def modules(assembled):
    for package in ("_conversion", "_gguf"):
        found = sorted((assembled / "llama_cpp" / package).glob("*.py"))
        assert found
        yield from found


def test_nothing_is_left_of_the_old_names(assembled):
    for path in modules(assembled):
        check(path.read_text(), path.name)


def test_every_module_of_upstream_travels(assembled):
    for source, package in (("conversion", "_conversion"), ("gguf-py/gguf", "_gguf")):
        there = {path.name for path in (assembled / "vendor/llama.cpp" / source).glob("*.py")}
        assert there - {path.name for path in (assembled / "llama_cpp" / package).glob("*.py")} <= {"gguf.py"}


def statements(body):
    """What runs when a module is imported, class bodies included, function bodies and type checking not."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            yield from statements(node.orelse)
            continue
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            yield from statements(getattr(node, name, []))


def test_importing_them_has_no_effects(assembled):
    for path in modules(assembled):
        for node in statements(ast.parse(path.read_text()).body):
            where = f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Import):
                imported = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = {node.module.partition(".")[0]}
            else:
                imported = set()
            assert imported <= ALLOWED, where
            if isinstance(node, ast.Expr):
                effect = ast.unparse(node)
                assert not any(word in effect for word in ("sys.path", "environ", "basicConfig", "warnings.")), where


def test_the_version_carries_our_label(assembled):
    text = (assembled / "llama_cpp/__init__.py").read_text()
    assert '__version__ = "0.3.36+ziggurat.' in text


def test_the_chat_templates_that_the_converter_names_are_there(assembled):
    package = assembled / "llama_cpp" / "_conversion"
    templates = package.parent / "models" / "templates"
    named = {
        node.value
        for path in package.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".jinja")
    }
    named -= {"chat_template.jinja", "additional_chat_templates.jinja"}
    named = {name for name in named if "/" not in name and "*" not in name and len(name) > len(".jinja")}
    assert named and not {name for name in named if not (templates / name).exists()}
