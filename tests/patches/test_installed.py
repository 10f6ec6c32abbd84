"""The installed wheel: what it brings, and what importing it does to others."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest
from llama_patches import kept
from llama_patches.pin import Pin

IMPORT = """
import json, logging, os, sys, warnings
def state():
    root = logging.root
    return sys.path[:], dict(os.environ), root.handlers[:], root.level, sys.meta_path[:], warnings.filters[:]
import numpy, {first}
before = state()
import {module}
unwanted = {{"transformers", "sentencepiece", "mistral_common", "gguf", "conversion"}}
print(json.dumps([state() == before, sorted(unwanted & set(sys.modules))]))
"""


def run(code):
    # upstream's llama_cpp leaves /dev/null open to the end
    options = ["-W", "error", "-W", "ignore::ResourceWarning"]
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("first", "module", "needs"),
    [
        ("json", "llama_cpp", "llama_cpp"),
        ("yaml", "llama_cpp._gguf", "yaml"),
        ("torch", "llama_cpp._conversion", "torch"),
    ],
)
def test_importing_changes_nothing_outside(first, module, needs):
    pytest.importorskip(needs)
    assert run(IMPORT.format(first=first, module=module)) == [True, []]


def test_all_model_modules_load():
    pytest.importorskip("torch")
    code = (
        "import json, sys, llama_cpp._conversion as c; c.load_all_models();"
        "print(json.dumps([len(c._loaded_text_modules), len(c._TEXT_MODEL_MODULES), 'transformers' in sys.modules]))"
    )
    loaded, there, heavy = run(code)
    assert loaded == there > 70 and not heavy


def test_the_gguf_of_the_package_index_lives_beside_ours():
    gguf = pytest.importorskip("gguf")
    from llama_cpp import _gguf

    package = Path(llama_cpp.__file__).parent
    assert Path(_gguf.__file__).parent == package / "_gguf"
    assert package not in Path(gguf.__file__).parents
    assert gguf.GGUFWriter is not _gguf.GGUFWriter


def test_the_library_says_that_it_is_patched(patches):
    library = llama_cpp.llama_cpp._lib
    library.ziggurat_version.restype = library.ziggurat_source_hash.restype = ctypes.c_char_p
    assert library.ziggurat_version().decode() == llama_cpp.__version__ == Pin.read(patches).full_version
    stale = "the installed wheel is of other patches: run 'pip install --force-reinstall --no-deps ./patches'"
    assert library.ziggurat_source_hash().decode() == kept.source_digest(patches), stale


def test_the_libraries_of_the_wheel():
    folder = Path(llama_cpp.__file__).parent / "lib"
    names = {path.name.partition(".")[0].removeprefix("lib") for path in folder.iterdir()}
    assert {"llama", "ggml", "ggml-base", "ggml-cpu", "ggml-rpc", "mtmd"} <= names
    top = folder.parents[1]
    assert not (top / "include" / "llama.h").exists() and not (top / "lib" / "libllama.so").exists()
