"""The compilers: are they there, and which are they."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildError

INSTALL = {
    "linux": "'apt install build-essential' (Debian, Ubuntu), 'dnf install gcc-c++' (Fedora) or the like",
    "darwin": "'xcode-select --install'",
}


@dataclass(frozen=True)
class Toolchain:
    """The compilers of a build: command to what it says its version is. `nvcc` is its path, if CUDA is wanted."""

    versions: Mapping[str, str]
    nvcc: str | None = None

    @classmethod
    def find(cls, environment: Mapping[str, str], cuda: bool) -> Toolchain:
        """Look for the compilers that CMake will take.

        Raises:
            BuildError: one is missing; the message says what to install.
        """
        if sys.platform == "win32":  # CMake finds Visual Studio by itself
            return cls({})
        path = environment.get("PATH")
        cxx = _first(environment.get("CXX"), ("c++", "g++", "clang++"), path)
        cc = _first(environment.get("CC"), ("cc", "gcc", "clang"), path)
        if cxx is None or cc is None:
            language, variable = ("C++", "CXX") if cxx is None else ("C", "CC")
            chosen = environment.get(variable)
            which = f"the {language} compiler {chosen} was not" if chosen else f"no {language} compiler was"
            install = INSTALL.get(sys.platform, "your system's packages")
            raise BuildError(f"{which} found, and llama.cpp is built from source: install one with {install}")
        nvcc = _find_nvcc(environment) if cuda else None
        return cls({tool: _version(tool) for tool in (cc, cxx, *([nvcc] if nvcc else []))}, nvcc)


def _first(chosen: str | None, names: tuple[str, ...], path: str | None) -> str | None:
    """The compiler that is chosen, else the first of the names that is installed."""
    if chosen:
        command = shlex.split(chosen)
        return chosen if command and shutil.which(command[0], path=path) else None
    return next((name for name in names if shutil.which(name, path=path)), None)


def _find_nvcc(environment: Mapping[str, str]) -> str:
    candidates = [environment.get("CUDACXX"), "nvcc"]
    candidates += [f"{environment[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    candidates.append("/usr/local/cuda/bin/nvcc")
    for candidate in candidates:
        found = shutil.which(candidate, path=environment.get("PATH")) if candidate else None
        if found:
            return found
    raise BuildError(
        "cuda is asked for, but no nvcc was found: install the CUDA toolkit (12 or newer) and put nvcc on the PATH"
        " or its folder in CUDA_HOME, or leave cuda=off"
    )


def _version(tool: str) -> str:
    done = subprocess.run([*shlex.split(tool), "--version"], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise BuildError(f"the compiler {tool} does not run: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout.strip()


def cpu_identity() -> str:
    """What decides the code of a native build: the processor's family, model and instruction sets."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        wanted = ("cpu family", "model", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")
        lines: dict[str, str] = {}
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in wanted:
                lines.setdefault(key.strip(), " ".join(sorted(value.split())))
        return "\n".join(f"{key}: {lines[key]}" for key in sorted(lines))
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return done.stdout.strip()
    return os.environ.get("PROCESSOR_IDENTIFIER", "")
