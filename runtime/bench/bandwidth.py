"""How fast memory can be read: STREAM-like, by NumPy, over a buffer that no cache holds."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: The buffer is at least so many times as large as the last cache, and as the floor below.
_TIMES_CACHE = 4
_FLOOR = 256 * 2**20
_SECONDS = 1.0
_BLOCK = 2**20


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second that ``threads`` threads read together: the best of several turns over ``buffer_bytes``."""

    bytes_per_second: float
    threads: int
    buffer_bytes: int
    method: str = "numpy int32 max, the best read"

    def as_json(self) -> dict[str, Any]:
        """Return it as reports have it."""
        return asdict(self)


def buffer_bytes() -> int:
    """Return how large the buffer is: four times the last cache, at least 256 MiB."""
    return max(_TIMES_CACHE * _last_cache(), _FLOOR)


def measure_bandwidth(threads: int, size: int | None = None, seconds: float = _SECONDS) -> Bandwidth:
    """Read ``size`` bytes by so many threads, each a part of its own, again and again; return the best turn.

    NumPy's maximum over integers is wide vector loads and hardly anything else, and holds no interpreter lock; a sum of
    floats waits for its own additions, and BLAS has threads of its own.
    """
    count = (size or buffer_bytes()) // 4
    data = np.ones(count, np.int32)  # written, so that every page is there
    parts = np.array_split(data, threads)
    end = time.perf_counter() + seconds
    best = _turn(parts)
    while time.perf_counter() < end:
        best = min(best, _turn(parts))
    return Bandwidth(count * 4 / best, threads, count * 4)


def _turn(parts: list[NDArray[np.int32]]) -> float:
    """Seconds from when all threads are there until the last one is done."""
    ready = threading.Barrier(len(parts) + 1)

    def read(part: NDArray[np.int32]) -> None:
        ready.wait()
        for start in range(0, len(part), _BLOCK):
            part[start : start + _BLOCK].max()

    workers = [threading.Thread(target=read, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    ready.wait()
    begun = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begun


def _last_cache(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache, 0 where the system does not say."""
    sizes = [0]
    for file in root.glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KMG":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)
