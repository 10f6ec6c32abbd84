"""What this machine has: cores, memory, NVIDIA GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it; memory in bytes."""

    name: str
    compute_capability: str
    memory_total: int
    memory_free: int


def default_threads() -> int:
    """Physical cores this process may use: llama.cpp gains nothing from hyperthreads."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def memory() -> tuple[int, int]:
    """Return the machine's memory in bytes: total, and available without swapping."""
    import psutil

    state = psutil.virtual_memory()
    return int(state.total), int(state.available)


def swap() -> int:
    """Return the size of the machine's swap space in bytes."""
    import psutil

    return int(psutil.swap_memory().total)


def nvidia_gpus() -> list[Gpu]:
    """Ask the driver through ``nvidia-smi``; an empty list without one, or when it does not answer within 10 s."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,compute_cap,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in answer.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[2].isdigit() and parts[3].isdigit():
            found.append(Gpu(parts[0], parts[1], int(parts[2]) * 2**20, int(parts[3]) * 2**20))
    return found
