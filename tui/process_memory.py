"""What a process takes of this machine's memory."""

from __future__ import annotations

import shutil
import subprocess

_TIMEOUT_S = 5.0


def resident_bytes(pid: int) -> int:
    """Return the memory that a process has now, mapped files included; 0 when it is gone or cannot be asked."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def gpu_bytes(pid: int) -> int:
    """Return the memory that a process has on all NVIDIA GPUs, by the driver's own tool; 0 without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    query = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return parse_gpu(answer, pid)


def parse_gpu(answer: str, pid: int) -> int:
    """Return the bytes of a process in the tool's table, whose second column is MiB."""
    rows = [line.replace(" ", "").split(",") for line in answer.splitlines()]
    return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] == str(pid) and row[1].isdigit()) * 2**20
