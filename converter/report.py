"""What a conversion is going to cost, and what it did."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from ziggurat.converter import ggml
from ziggurat.converter.errors import OutputError
from ziggurat.converter.mix_record import MixRecord
from ziggurat.converter.prune_record import PruneRecord
from ziggurat.converter.quantize import BF16, F16, F32
from ziggurat.converter.tuning_record import CalibrationRecord, CompensationRecord, ImportanceRecord, ScalesRecord
from ziggurat.converter.upstream import Plan
from ziggurat.converter.write import is_special, partial_name, real


@dataclass(frozen=True)
class Estimate:
    """Shown before the work starts; bytes and seconds."""

    architecture: str
    parameters: int
    source_bytes: int
    output_bytes: int
    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class TypeShare:
    """Tensors of one type in the file."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """What was converted and written; bytes and seconds."""

    model: str
    output: str
    architecture: str
    name: str
    type: str
    tokenizer: str
    pre_tokenizer: str | None
    parameters: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    """Bits of tensor data per parameter, metadata not counted."""
    types: dict[str, TypeShare]
    seconds: float
    threads: int
    peak_memory_bytes: int
    """Largest resident size of the process so far."""
    prune: PruneRecord | None = None
    """Which blocks were removed; None: none."""
    calibration: CalibrationRecord | None = None
    """What the quantization was fitted on; None: on nothing."""
    importance: ImportanceRecord | None = None
    """The importance matrix gathered there; None: none."""
    scales: ScalesRecord | None = None
    """The activation-aware scales; None: none were searched."""
    compensation: CompensationRecord | None = None
    """The tensors whose errors were compensated; None: none were."""
    mix: MixRecord | None = None
    """Types chosen for a size; None: those of the recipe `type`."""

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def estimate(
    plan: Plan, types: Sequence[int], sizes: Sequence[int], source_bytes: int, *, threads: int, weighted: bool
) -> Estimate:
    """Time a small sample of every quantizer that will be used, and add up what will be held in memory.

    Args:
        plan: the tensors.
        types: their target types.
        sizes: their bytes in the output.
        source_bytes: bytes of the checkpoint's tensors.
        threads: workers.
        weighted: whether an importance matrix is used, which makes most quantizers slower.
    """
    elements: dict[int, int] = {}
    for tensor, type_id in zip(plan.tensors, types, strict=True):
        elements[type_id] = elements.get(type_id, 0) + math.prod(tensor.shape)
    seconds = sum(n * _seconds_per_element(type_id, weighted=weighted) for type_id, n in elements.items()) / threads
    # Held at once: a tensor as float32 while the next is read, and the stored bytes they come from.
    floats = [4 * math.prod(t.shape) for t in plan.tensors]
    held = max((a + b + max(a, b) // 2 for a, b in zip(floats, floats[1:], strict=False)), default=sum(floats))
    return Estimate(
        architecture=plan.arch,
        parameters=plan.parameters,
        source_bytes=source_bytes,
        output_bytes=sum(sizes),
        memory_bytes=psutil.Process().memory_info().rss + held,
        seconds=seconds,
    )


def _seconds_per_element(type_id: int, *, weighted: bool, rows: int = 32, columns: int = 2048) -> float:
    """Time of one thread per element: quantizing a small random matrix, or copying for the float types."""
    if type_id in (F32, F16, BF16):
        return 1e-9
    sample = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    out = np.empty((rows, ggml.row_bytes(type_id, columns)), np.uint8)
    importance = np.ones(columns, np.float32)
    ggml.prepare(type_id)
    start = time.perf_counter()
    ggml.quantize_rows(type_id, sample, out, importance if weighted or ggml.needs_importance(type_id) else None)
    return (time.perf_counter() - start) / sample.size


def share_by_type(plan: Plan, types: Sequence[int], sizes: Sequence[int]) -> dict[str, TypeShare]:
    """Tensors, parameters and bytes per type name, the largest share of bytes first."""
    shares: dict[str, TypeShare] = {}
    for tensor, type_id, size in zip(plan.tensors, types, sizes, strict=True):
        name = ggml.type_name(type_id)
        old = shares.get(name, TypeShare(0, 0, 0))
        shares[name] = TypeShare(old.tensors + 1, old.parameters + math.prod(tensor.shape), old.bytes + size)
    return dict(sorted(shares.items(), key=lambda item: -item[1].bytes))


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_json(path: Path, content: str) -> None:
    """Write a small file so that it is there whole or not at all; into a pipe or device directly.

    Raises:
        OutputError: the place cannot be written.
    """
    partial = partial_name(path)
    try:
        if is_special(path):
            path.write_text(content, encoding="utf-8")
            return
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, real(path))
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written ({e.strerror or e}): choose another place") from e
