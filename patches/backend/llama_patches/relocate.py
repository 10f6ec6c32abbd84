"""Moving upstream's `conversion` package and its own `gguf` under `llama_cpp`, by a mechanical rewrite of imports.

llama.cpp's converter needs the `gguf` that belongs to it, which differs from the one on PyPI under the same version
number. Under its own name it would replace that one for every other program in the environment; as `llama_cpp._gguf`
both live side by side.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

from .errors import BuildError

# old top-level name to the package that holds the submodule of the new name
MOVED = {"gguf": "llama_cpp._gguf", "conversion": "llama_cpp._conversion"}

LLAMA_CPP = Path("vendor/llama.cpp")

# gguf.py helps those who run a file of the package by its path: it edits sys.path and reloads the package.
LEFT_OUT = ("gguf.py",)


def relocate(tree: Path) -> None:
    """Copy the two packages, rewritten and checked, and the chat templates they refer to, into `llama_cpp`.

    Raises:
        BuildError: an import of the old names is left; the message names file and line.
    """
    package = tree / "llama_cpp"
    for source, name in ((LLAMA_CPP / "conversion", "_conversion"), (LLAMA_CPP / "gguf-py" / "gguf", "_gguf")):
        target = package / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path in sorted((tree / source).glob("*.py")):
            if path.name not in LEFT_OUT:
                text = rewrite(path.read_text(encoding="utf-8"), str(source / path.name))
                (target / path.name).write_text(text, encoding="utf-8")
        shutil.copyfile(tree / LLAMA_CPP / "LICENSE", target / "LICENSE")
        if (marker := tree / source / "py.typed").exists():
            shutil.copyfile(marker, target / "py.typed")
    # conversion finds these two folders above itself
    templates = package / "models" / "templates"
    shutil.rmtree(templates, ignore_errors=True)
    shutil.copytree(tree / LLAMA_CPP / "models" / "templates", templates)


def rewrite(text: str, name: str) -> str:
    """The text of the module called `name` with its absolute imports of the moved packages renamed.

    Raises:
        BuildError: an import cannot be renamed, or one is left; the message names file and line.
    """
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text, name)):
        if isinstance(node, ast.Import) and any(_moved(alias.name) for alias in node.names):
            _rewrite_import(lines, node, name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and _moved(node.module or ""):
            old = re.escape(node.module or "")
            new = _renamed(node.module or "")
            at = node.lineno - 1
            start = lines[at][: node.col_offset]
            lines[at], n = re.subn(rf"\Afrom\s+{old}\s", f"from {new} ", lines[at][node.col_offset :])
            lines[at] = start + lines[at]
            if n != 1:
                raise BuildError(f"{name}:{node.lineno}: cannot rename this import of {node.module}")
    result = "".join(lines)
    check(result, name)
    return result


def check(text: str, name: str) -> None:
    """Make sure that nothing imports the moved packages by their old names, by statement or by string.

    Raises:
        BuildError: something does; the message names file and line.
    """
    for node in ast.walk(ast.parse(text, name)):
        for module in _imported(node):
            if _moved(module):
                raise BuildError(f"{name}:{getattr(node, 'lineno', 0)}: still imports {module} by its old name")


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    if isinstance(node, ast.Call) and node.args and _called(node.func) in ("__import__", "import_module"):
        return [_leading_text(node.args[0])]
    return []


def _rewrite_import(lines: list[str], node: ast.Import, name: str) -> None:
    statements = []
    for alias in node.names:
        if not _moved(alias.name):
            statements.append(f"import {ast.unparse(alias)}")
            continue
        package, _, module = _renamed(alias.name).rpartition(".")
        if "." in alias.name and alias.asname is None:
            raise BuildError(f"{name}:{node.lineno}: 'import {alias.name}' cannot be renamed in one statement")
        statements.append(f"from {package} import {module} as {alias.asname or alias.name}")
    at = node.lineno - 1
    if node.end_lineno != node.lineno:
        raise BuildError(f"{name}:{node.lineno}: cannot rename an import over several lines")
    line = lines[at]
    lines[at] = line[: node.col_offset] + "; ".join(statements) + line[node.end_col_offset :]


def _moved(module: str) -> bool:
    return module.partition(".")[0] in MOVED


def _renamed(module: str) -> str:
    top, dot, rest = module.partition(".")
    return MOVED[top] + dot + rest


def _called(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _leading_text(argument: ast.expr) -> str:
    """What a string or the start of an f-string says."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else ""
