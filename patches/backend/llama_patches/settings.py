"""What a person may choose: `--config-settings` of pip, or environment variables of the same meaning."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import BuildError

ConfigSettings = Mapping[str, "str | list[str]"]

CPU_CHOICES = ("native", "portable")

# The baselines of cpu=portable: x86-64-v3 (Haswell 2013, Zen 2017) and Armv8.2 with dot products (Graviton 2, RPi 5).
BASELINES = {
    "x86_64": ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2"),
    "aarch64": "armv8.2-a+dotprod",
}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}

DEFAULT_CUDA = "86"  # an A40

# what is passed through to scikit-build-core
PASSED_ON = ("cmake.", "build.", "ninja.", "logging.")


@dataclass(frozen=True)
class Settings:
    """The settings of one build.

    Attributes:
        cpu: `native` (this machine's processor) or `portable` (a stated baseline).
        cuda: compute capabilities such as `86`; empty builds without CUDA.
        source: a local upstream archive or folder; `None` takes the pinned archive from the package index.
        cmake_args: the user's own CMAKE_ARGS, which win over ours.
        passed_on: settings of scikit-build-core.
    """

    cpu: str = "native"
    cuda: tuple[str, ...] = ()
    source: str | None = None
    cmake_args: str = ""
    passed_on: Mapping[str, str | list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, config: ConfigSettings | None, environment: Mapping[str, str]) -> Settings:
        """Put the settings together; one given to pip wins over its environment variable.

        Raises:
            BuildError: an unknown setting or value.
        """
        config = dict(config or {})
        passed_on = {key: value for key, value in config.items() if key.startswith(PASSED_ON)}
        # pip gives everyone the same settings: those that start with a dash are meant for setuptools
        unknown = [k for k in config if k not in ("cpu", "cuda", "source", *passed_on) and not k.startswith("-")]
        if unknown:
            raise BuildError(f"unknown setting {unknown[0]!r}; there are cpu, cuda, source (see patches/README.md)")

        def one(key: str, default: str) -> str:
            value = config.get(key, environment.get(f"ZIGGURAT_{key.upper()}") or default)
            return value[-1] if isinstance(value, list) else value

        cpu = one("cpu", "native")
        if cpu not in CPU_CHOICES:
            raise BuildError(f"cpu={cpu}: choose one of {', '.join(CPU_CHOICES)}")
        return cls(
            cpu=cpu,
            cuda=_capabilities(one("cuda", "off")),
            source=one("source", "") or None,
            cmake_args=environment.get("CMAKE_ARGS", ""),
            passed_on=passed_on,
        )

    def defines(self, machine: str | None = None) -> list[str]:
        """The CMake definitions that these settings stand for.

        Args:
            machine: the processor family, as `platform.machine()` names it (the default).

        Raises:
            BuildError: no portable baseline is stated for this processor family.
        """
        result = ["-DGGML_RPC=ON"]
        if self.cpu == "portable":
            machine = (machine or platform.machine()).lower()
            family = MACHINES.get(machine, machine)
            baseline = BASELINES.get(family)
            if baseline is None:
                raise BuildError(f"cpu=portable: no baseline is stated for {machine}; use cpu=native or CMAKE_ARGS")
            result.append("-DGGML_NATIVE=OFF")
            if isinstance(baseline, str):
                result.append(f"-DGGML_CPU_ARM_ARCH={baseline}")
            else:
                result += [f"-DGGML_{feature}=ON" for feature in baseline]
        else:
            result.append("-DGGML_NATIVE=ON")
        if self.cuda:
            result += ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(self.cuda)}"]
        return result

    def all_cmake_args(self) -> str:
        """Our definitions and then the user's CMAKE_ARGS, of which the later one wins in CMake."""
        return " ".join([*map(shlex.quote, self.defines()), self.cmake_args]).strip()


def _capabilities(value: str) -> tuple[str, ...]:
    if value.lower() in ("off", "0", "false", "no"):
        return ()
    if value.lower() == "on":
        value = DEFAULT_CUDA
    found = tuple(v for v in re.split(r"[,; ]+", value.replace(".", "")) if v)
    for capability in found:
        if not re.fullmatch(r"[1-9][0-9]{1,2}[af]?(-real|-virtual)?", capability):
            raise BuildError(f"cuda={value}: give off, on (= {DEFAULT_CUDA}), or compute capabilities such as 86,89")
    return found
