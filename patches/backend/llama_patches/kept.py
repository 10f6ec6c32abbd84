"""Wheels kept from earlier builds, under a key of everything that goes into one."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path

from .errors import BuildError
from .pin import Pin
from .series import series_names
from .settings import Settings
from .source import store
from .toolchain import Toolchain

# Environment variables that change what compilers and CMake make.
COUNTED = ("CC", "CXX", "CUDACXX", "CUDAHOSTCXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "CUDAFLAGS", "LDFLAGS")
COUNTED_PREFIXES = ("CMAKE_", "SKBUILD_")
# ... and those of them that only change how fast. CMAKE_ARGS is counted as a setting.
NOT_COUNTED = ("CMAKE_ARGS", "CMAKE_BUILD_PARALLEL_LEVEL", "CMAKE_C_COMPILER_LAUNCHER", "CMAKE_CXX_COMPILER_LAUNCHER",
               "CMAKE_CUDA_COMPILER_LAUNCHER", "CMAKE_COLOR_DIAGNOSTICS")  # fmt: skip


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where wheels and the upstream archive are kept: ZIGGURAT_WHEEL_CACHE, or in the user's cache folder."""
    if chosen := environment.get("ZIGGURAT_WHEEL_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ziggurat" / "wheels"


def source_digest(folder: Path) -> str:
    """A hex digest over what is built: the pin, the patches in their order, and our own files.

    Raises:
        BuildError: one of the files is missing.
    """
    series = series_names(folder)
    names = ["pin.json", "upstream.sha256", *series]
    names += (f"src/{path.name}" for path in (folder / "src").iterdir() if path.is_file())
    return _digest({"order": "\n".join(series).encode()} | {name: _read(folder / name) for name in names})


def key(folder: Path, settings: Settings, toolchain: Toolchain, cpu: str, environment: Mapping[str, str]) -> str:
    """The key under which a wheel is kept: a hex digest over everything that may change what is in it.

    Args:
        folder: the patches folder.
        settings: the settings of the build. Where the source comes from is no part of the key: it is verified.
        toolchain: the compilers.
        cpu: the processor's identity; counted in a native build only.
        environment: the environment variables of the build.

    Raises:
        BuildError: one of the files is missing.
    """
    backend = Path(__file__).parent
    parts = {
        "source": source_digest(folder).encode(),
        "defines": "\n".join(settings.defines()).encode(),
        "CMAKE_ARGS": settings.cmake_args.encode(),
        "passed on": repr(sorted(settings.passed_on.items())).encode(),
        "cpu": cpu.encode() if settings.cpu == "native" else b"",
        "platform": f"{sysconfig.get_platform()} {platform.libc_ver()}".encode(),
    }
    parts |= {f"backend/{path.name}": path.read_bytes() for path in sorted(backend.glob("*.py"))}
    parts |= {f"tool {tool}": version.encode() for tool, version in toolchain.versions.items()}
    for name, value in environment.items():
        if name in COUNTED or (name.startswith(COUNTED_PREFIXES) and name not in NOT_COUNTED):
            parts[f"environment {name}"] = value.encode()
    return _digest(parts)


def find(cache: Path, wheel_key: str, pin: Pin) -> Path | None:
    """The whole wheel kept under this key, if there is one."""
    for path in sorted((cache / wheel_key[:32]).glob(f"llama_cpp_python-{pin.full_version}-*.whl")):
        try:
            with zipfile.ZipFile(path) as wheel:
                if wheel.testzip() is None:
                    return path
        except (OSError, zipfile.BadZipFile):
            continue
    return None


def keep(cache: Path, wheel_key: str, wheel: Path) -> None:
    """Keep a wheel. A cache that cannot be written is mentioned and is no error."""
    try:
        store(wheel, cache / wheel_key[:32] / wheel.name)
    except BuildError as error:
        print(f"ziggurat: the wheel is not kept: {error}", flush=True)


def _digest(parts: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(parts.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}") from error
