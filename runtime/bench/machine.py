"""What a measurement was made with, for whoever reads its report."""

from __future__ import annotations

import platform
from pathlib import Path

from ziggurat.runtime.bindings import probe


def describe() -> dict[str, str | None]:
    """Return the library's versions and the machine's names, as reports have them."""
    library = probe()
    return {
        "library": library.package_version,
        "llama_cpp": library.llama_version,
        "patches": library.ziggurat_version,
        "machine": platform.platform(),
        "processor": processor(),
    }


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name."""
    try:
        lines = info.read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
