import zipfile
from dataclasses import replace

import pytest
from llama_patches import kept
from llama_patches.pin import Pin
from llama_patches.settings import Settings
from llama_patches.toolchain import Toolchain

TOOLS = Toolchain({"c++": "g++ 12.2"})


def key(folder, settings=None, tools=TOOLS, cpu="flags: avx2", environment=None):
    return kept.key(folder, settings or Settings(), tools, cpu, environment or {})


def test_the_key_is_the_same_for_the_same_build(patches, own_patches):
    assert key(patches) == key(own_patches)


@pytest.mark.parametrize(
    "change",
    [
        dict(settings=Settings(cpu="portable")),
        dict(settings=Settings(cuda=("86",))),
        dict(settings=Settings(cmake_args="-DX=1")),
        dict(settings=Settings(passed_on={"cmake.verbose": "true"})),
        dict(tools=Toolchain({"c++": "g++ 13.1"})),
        dict(tools=Toolchain({"c++": "g++ 12.2", "nvcc": "12.8"})),
        dict(cpu="flags: avx512f"),
        dict(environment={"CXXFLAGS": "-O1"}),
        dict(environment={"CMAKE_BUILD_TYPE": "Debug"}),
    ],
    ids=lambda change: " ".join(change),
)
def test_the_key_changes_with_what_is_built(patches, change):
    assert key(patches, **change) != key(patches)


@pytest.mark.parametrize(
    "change",
    [
        dict(settings=Settings(source="elsewhere")),
        dict(environment={"HOME": "/root", "CMAKE_BUILD_PARALLEL_LEVEL": "3", "ZIGGURAT_WHEEL_CACHE": "x"}),
    ],
    ids=lambda change: " ".join(change),
)
def test_the_key_does_not_change_with_anything_else(patches, change):
    assert key(patches, **change) == key(patches)


def test_a_portable_wheel_does_not_depend_on_the_processor(patches):
    portable = Settings(cpu="portable")
    assert key(patches, portable, cpu="a") == key(patches, portable, cpu="b")


@pytest.mark.parametrize(
    "name", ["pin.json", "upstream.sha256", "0001-compile-own-files.patch", "src/ziggurat-quant.cpp"]
)
def test_the_key_changes_with_each_file(own_patches, name):
    before = key(own_patches), kept.source_digest(own_patches)
    with (own_patches / name).open("a") as file:
        file.write("\n")
    assert key(own_patches) != before[0]
    assert kept.source_digest(own_patches) != before[1]


def test_the_key_changes_with_the_order_and_a_new_file_and_not_with_documents(own_patches):
    first = key(own_patches)
    (own_patches / "README.md").write_text("new")
    assert key(own_patches) == first
    (own_patches / "src" / "ziggurat-more.cpp").write_text("int more;\n")
    second = key(own_patches)
    lines = (own_patches / "series").read_text().splitlines()
    (own_patches / "series").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert len({first, second, key(own_patches)}) == 3


def test_the_key_changes_with_the_backend(patches, own_patches, monkeypatch):
    before = key(patches)
    backend = own_patches / "backend" / "llama_patches"
    (backend / "build.py").write_text("# changed\n")
    monkeypatch.setattr(kept, "__file__", str(backend / "kept.py"))
    assert key(patches) != before


@pytest.fixture
def wheel(tmp_path, patches):
    path = tmp_path / f"llama_cpp_python-{Pin.read(patches).full_version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llama_cpp/__init__.py", "x = 1\n" * 100)
    return path


def test_a_wheel_is_kept_and_found(wheel, patches, tmp_path):
    pin, cache = Pin.read(patches), tmp_path / "cache"
    assert kept.find(cache, "k" * 64, pin) is None
    kept.keep(cache, "k" * 64, wheel)
    found = kept.find(cache, "k" * 64, pin)
    assert found is not None and found.read_bytes() == wheel.read_bytes()
    assert kept.find(cache, "j" * 64, pin) is None
    assert kept.find(cache, "k" * 64, replace(pin, label="ziggurat.99")) is None
    assert [path.name for path in found.parent.iterdir()] == [wheel.name]


def test_a_spoiled_wheel_is_not_taken(wheel, patches, tmp_path):
    cache = tmp_path / "cache"
    kept.keep(cache, "k" * 64, wheel)
    pin = Pin.read(patches)
    found = kept.find(cache, "k" * 64, pin)
    found.write_bytes(found.read_bytes()[:-40])
    assert kept.find(cache, "k" * 64, pin) is None


def test_a_cache_that_cannot_be_written_is_no_error(wheel, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    kept.keep(tmp_path / "file", "k" * 64, wheel)
    assert "the wheel is not kept: cannot write" in capsys.readouterr().out


def test_where_the_cache_is(tmp_path):
    assert kept.cache_folder({"ZIGGURAT_WHEEL_CACHE": str(tmp_path)}) == tmp_path
    assert kept.cache_folder({"XDG_CACHE_HOME": "/c"}).as_posix() == "/c/ziggurat/wheels"
    assert kept.cache_folder({}).as_posix().endswith("/.cache/ziggurat/wheels")
