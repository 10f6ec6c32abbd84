"""The hooks as pip calls them: in a process of their own, in the patches folder."""

import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from llama_patches import kept
from llama_patches.pin import Pin
from llama_patches.settings import Settings
from llama_patches.toolchain import Toolchain, cpu_identity


def hook(patches, call, **environment):
    code = f"import llama_patches as backend; print(backend.{call})"
    environment = os.environ | {"PYTHONPATH": str(patches / "backend")} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=patches, env=environment, capture_output=True, text=True)


def refused(done):
    """The one line of an error."""
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("call", ["get_requires_for_build_wheel()", "build_wheel('.')"])
def test_without_a_compiler_one_line_says_what_to_install(patches, tmp_path, call):
    line = refused(hook(patches, call, PATH=str(tmp_path), CC="", CXX=""))
    assert "no C++ compiler was found" in line
    assert "build-essential" in line or sys.platform != "linux"


def test_a_chosen_compiler_that_is_not_there_is_named(patches):
    assert "the C++ compiler no-such-c++ was not found" in refused(hook(patches, "build_wheel('.')", CXX="no-such-c++"))


def test_without_nvcc_one_line_says_what_to_do(tmp_path, monkeypatch):
    from llama_patches import toolchain
    from llama_patches.errors import BuildError

    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path=None: None if "nvcc" in name else name)
    with pytest.raises(BuildError, match="no nvcc was found: install the CUDA toolkit"):
        Toolchain.find({"PATH": str(tmp_path)}, cuda=True)


def test_a_wrong_setting_is_one_line(patches):
    assert "unknown setting 'cdua'" in refused(hook(patches, "get_requires_for_build_wheel({'cdua': 'on'})"))


@pytest.mark.parametrize("call", ["get_requires_for_build_editable()", "build_editable('.')"])
def test_an_editable_install_is_refused(patches, call):
    assert "editable install is not supported" in refused(hook(patches, call))


def test_a_damaged_source_is_one_line(patches, tmp_path):
    archive = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    archive.write_bytes(b"not it")
    (tmp_path / "cache").mkdir()
    environment = {"ZIGGURAT_SOURCE": str(archive), "ZIGGURAT_WHEEL_CACHE": str(tmp_path / "cache")}
    done = hook(patches, f"build_wheel({str(tmp_path)!r})", **environment)
    assert done.returncode == 1 and "sha256 is" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_kept_wheel_is_taken_with_its_metadata_and_nothing_is_built(patches, tmp_path):
    # nothing of a compiler or of the upstream source is there but the compiler's name and version
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("cc", "c++"):
        (fake / name).write_text("#!/bin/sh\necho fake 1.0\n")
        (fake / name).chmod(0o755)
    environment = {"PATH": str(fake), "CC": "", "CXX": "", "ZIGGURAT_SOURCE": str(tmp_path / "nothing")}
    cache, pin = tmp_path / "cache", Pin.read(patches)
    name = f"llama_cpp_python-{pin.full_version}-py3-none-any.whl"
    info = f"llama_cpp_python-{pin.full_version}.dist-info"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\n")
        wheel.writestr(f"{info}/RECORD", "")
    tools = Toolchain({"cc": "fake 1.0", "c++": "fake 1.0"})
    settings = Settings.read({}, os.environ)
    kept.keep(cache, kept.key(patches, settings, tools, cpu_identity(), os.environ | environment), tmp_path / name)

    out = tmp_path / "out"
    out.mkdir()
    environment["ZIGGURAT_WHEEL_CACHE"] = str(cache)
    done = hook(patches, f"build_wheel({str(out)!r})", **environment)
    assert done.stdout.splitlines()[-1] == name, done.stderr
    assert (out / name).read_bytes() == (tmp_path / name).read_bytes()
    done = hook(patches, f"prepare_metadata_for_build_wheel({str(out)!r})", **environment)
    assert done.stdout.splitlines()[-1] == info, done.stderr
    assert [path.name for path in (out / info).iterdir()] == ["METADATA"]


def test_the_source_distribution_is_this_folder(patches, tmp_path):
    done = hook(patches, f"build_sdist({str(tmp_path)!r})")
    name = done.stdout.strip()
    version = Pin.read(patches).full_version
    assert name == f"llama_cpp_python-{version}.tar.gz"
    with tarfile.open(tmp_path / name) as archive:
        names = {member.name.partition("/")[2] for member in archive}
        content = archive.extractfile(f"llama_cpp_python-{version}/PKG-INFO").read().decode()
    assert {"PKG-INFO", "pyproject.toml", "series", "pin.json", "src/ziggurat.cmake"} <= names
    assert "backend/llama_patches/__init__.py" in names and not any("__pycache__" in name for name in names)
    assert f"Version: {version}\n" in content
