"""Building the wheel: keep or make the tree, and let scikit-build-core do the rest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from . import kept
from .assemble import assemble
from .errors import BuildError
from .pin import Pin
from .settings import ConfigSettings, Settings
from .toolchain import Toolchain, cpu_identity

PATCHES = Path(__file__).resolve().parents[2]

# Upstream installs its libraries and headers a second time at the top of site-packages, where nothing looks for them,
# and each library under three names, of which the loader asks for two.
EXCLUDED = ("/lib/", "/include/", "/bin/", "/llama_cpp/lib/*.so.*.*.*")


def wheel(wheel_directory: str, config: ConfigSettings | None) -> str:
    """Build the wheel, or take the kept one, into a folder.

    Returns:
        The name of the wheel's file.

    Raises:
        BuildError: see the message.
    """
    settings = Settings.read(config, os.environ)
    toolchain = Toolchain.find(os.environ, cuda=bool(settings.cuda))
    pin = Pin.read(PATCHES)
    cache = kept.cache_folder(os.environ)
    wheel_key = kept.key(PATCHES, settings, toolchain, cpu_identity(), os.environ)
    if (found := kept.find(cache, wheel_key, pin)) is not None:
        print(f"ziggurat: taking the kept wheel {found}", flush=True)
        shutil.copyfile(found, Path(wheel_directory) / found.name)
        return found.name
    with _tree(settings, cache) as tree, _environment(settings, toolchain, tree):
        from scikit_build_core import build as upstream

        with _chdir(tree):
            name = upstream.build_wheel(str(Path(wheel_directory).absolute()), _upstream_settings(settings, tree))
    kept.keep(cache, wheel_key, Path(wheel_directory) / name)
    return name


def metadata(metadata_directory: str, config: ConfigSettings | None) -> str:
    """Write the wheel's metadata without building it.

    Returns:
        The name of the `.dist-info` folder.

    Raises:
        BuildError: see the message.
    """
    settings = Settings.read(config, os.environ)
    toolchain = Toolchain.find(os.environ, cuda=bool(settings.cuda))
    cache = kept.cache_folder(os.environ)
    wheel_key = kept.key(PATCHES, settings, toolchain, cpu_identity(), os.environ)
    if (found := kept.find(cache, wheel_key, Pin.read(PATCHES))) is not None:
        return _metadata_of(found, Path(metadata_directory))
    with _tree(settings, cache) as tree, _chdir(tree):
        from scikit_build_core import build as upstream

        return upstream.prepare_metadata_for_build_wheel(metadata_directory, _upstream_settings(settings, tree))


def requirements(config: ConfigSettings | None) -> list[str]:
    """What must be installed for the build beyond `pyproject.toml`: cmake and ninja, where the machine has none.

    Raises:
        BuildError: a setting is wrong or a compiler is missing; it is checked here so that nothing is downloaded first.
    """
    settings = Settings.read(config, os.environ)
    Toolchain.find(os.environ, cuda=bool(settings.cuda))
    from scikit_build_core import build as upstream

    with _chdir(PATCHES):
        return upstream.get_requires_for_build_wheel({})


def sdist(sdist_directory: str) -> str:
    """Pack this folder: the patches, not the upstream source, which is fetched when the wheel is built.

    Returns:
        The name of the archive.

    Raises:
        BuildError: `pin.json` is not readable.
    """
    pin = Pin.read(PATCHES)
    base = f"llama_cpp_python-{pin.full_version}"
    with tarfile.open(Path(sdist_directory) / f"{base}.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(PATCHES.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                archive.add(path, f"{base}/{path.relative_to(PATCHES).as_posix()}")
        content = f"Metadata-Version: 2.1\nName: {pin.project}\nVersion: {pin.full_version}\n".encode()
        info = tarfile.TarInfo(f"{base}/PKG-INFO")
        info.size = len(content)
        archive.addfile(info, BytesIO(content))
    return f"{base}.tar.gz"


@contextlib.contextmanager
def _tree(settings: Settings, cache: Path) -> Iterator[Path]:
    """The assembled tree, in a folder that goes away again."""
    with tempfile.TemporaryDirectory(prefix="ziggurat-build-") as folder:
        tree = Path(folder).resolve() / "tree"
        print("ziggurat: unpacking and patching llama.cpp", flush=True)
        assemble(PATCHES, settings.source, cache, tree)
        yield tree


def _upstream_settings(settings: Settings, tree: Path) -> dict[str, str | list[str]]:
    return {"wheel.exclude": ";".join(EXCLUDED), "build-dir": str(tree.parent / "build"), **settings.passed_on}


@contextlib.contextmanager
def _environment(settings: Settings, toolchain: Toolchain, tree: Path) -> Iterator[None]:
    """The environment variables that CMake and the compilers see."""
    before = dict(os.environ)
    arguments = settings.all_cmake_args()
    if (ccache := shutil.which("ccache")) is not None:
        for language in ("C", "CXX", "CUDA") if settings.cuda else ("C", "CXX"):
            if f"CMAKE_{language}_COMPILER_LAUNCHER" not in os.environ:
                arguments = f"-DCMAKE_{language}_COMPILER_LAUNCHER={shlex.quote(ccache)} {arguments}"
        # the folder's name is another one each time
        os.environ.update(CCACHE_BASEDIR=str(tree.parent), CCACHE_NOHASHDIR="true")
        if settings.cpu == "native":
            # ccache takes -march=native for the same flag on every machine, and its cache may be carried to another one
            os.environ.setdefault("CCACHE_NAMESPACE", hashlib.sha256(cpu_identity().encode()).hexdigest()[:16])
    os.environ["CMAKE_ARGS"] = arguments
    if toolchain.nvcc is not None:
        os.environ["CUDACXX"] = toolchain.nvcc
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    """`contextlib.chdir`, which Python 3.10 does not have."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _metadata_of(wheel: Path, folder: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" in name and not name.endswith("/RECORD")]
        archive.extractall(folder, names)
    if not names:
        raise BuildError(f"{wheel}: no metadata in it; delete it")
    return names[0].partition("/")[0]
