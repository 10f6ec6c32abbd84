"""The refresh script against an upstream that moved."""

import importlib.util
import shutil
import sys
from dataclasses import replace

import pytest
from llama_patches.errors import BuildError
from llama_patches.pin import Pin, file_sha256, read_hashes
from llama_patches.series import apply_series, read_series, series_names

QUANT = "vendor/llama.cpp/src/llama-quant.cpp"
BASE = "vendor/llama.cpp/conversion/base.py"


@pytest.fixture(scope="module")
def script(patches):
    spec = importlib.util.spec_from_file_location("refresh", patches / "refresh.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["refresh"] = module
    before = sys.path[:]
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture
def tree(upstream, tmp_path):
    return shutil.copytree(upstream, tmp_path / "tree")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_against_the_pin_nothing_changes(script, own_patches, tree):
    before = files(own_patches)
    report = script.refresh(own_patches, tree, Pin.read(own_patches))
    assert report.same == series_names(own_patches) and not report.moved and not report.failed
    assert files(own_patches) == before


def test_moved_hunks_are_written_anew(script, own_patches, tree, tmp_path):
    edit(tree / QUANT, "#include", "// a line more\n#include")
    moved = shutil.copytree(tree, tmp_path / "moved")
    headers = [patch.header for patch in read_series(own_patches)]
    pin = replace(Pin.read(own_patches), version="0.3.37", sha256="0" * 64)
    report = script.refresh(own_patches, tree, pin)
    assert report.moved == ["0002-quant-recipe-queries.patch"] and not report.failed
    series = read_series(own_patches)
    assert [patch.header for i, patch in enumerate(series) if i != 1] == [h for i, h in enumerate(headers) if i != 1]
    assert series[1].fields["Remove when"] in headers[1].replace("\n ", "\n")
    assert apply_series(series, moved) == len(series)  # with no offset now
    assert Pin.read(own_patches) == pin
    hashes = read_hashes(own_patches / "upstream.sha256")
    (tree / QUANT).unlink()
    assert hashes.keys() == read_hashes(script.HERE / "upstream.sha256").keys()
    edited = {path for path, digest in read_hashes(script.HERE / "upstream.sha256").items() if hashes[path] != digest}
    assert edited == {QUANT}


def test_what_fails_is_named_and_nothing_is_written(script, own_patches, tree):
    only_one = BASE.replace("base.py", "__init__.py")  # a file that one patch touches alone
    edit(tree / only_one, "from typing import Type", "from typing import Any, Type")
    before, digest = files(own_patches), file_sha256(tree / only_one)
    report = script.refresh(own_patches, tree, Pin.read(own_patches))
    assert report.failed == {"0003-conversion-import-effects.patch": [f"{only_one}: hunk 1"]}
    assert files(own_patches) == before
    assert file_sha256(tree / only_one) == digest and (tree / f"{only_one}.rej").exists()


def test_a_file_that_is_gone_is_named(script, own_patches, tree):
    (tree / "LICENSE.md").unlink()
    with pytest.raises(BuildError, match="wanted.txt: LICENSE.md matches nothing"):
        script.refresh(own_patches, tree, Pin.read(own_patches))
