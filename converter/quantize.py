"""Turns planned tensors into the bytes of the file: in slabs of rows, on all cores, in the file's order."""

from __future__ import annotations

import collections
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter import ggml
from ziggurat.converter.errors import QuantizeError
from ziggurat.converter.upstream import PlannedTensor

F32, F16, BF16 = 0, 1, 30  # enum ggml_type

# Elements a task works on: small enough to stay near the caches, large enough that Python's share vanishes.
SLAB_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Slab:
    """Finished bytes of a tensor, the next in the file, and the number of values they hold."""

    tensor: PlannedTensor
    data: npt.NDArray[np.uint8]
    elements: int


def stored_bytes(shape: Sequence[int], type_id: int) -> int:
    """Bytes of a tensor of `shape` (outermost dimension first) stored as `type_id`."""
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    return rows * ggml.row_bytes(type_id, shape[-1]) if shape else ggml.row_bytes(type_id, 1)


def stream(
    tensors: Sequence[PlannedTensor],
    types: Sequence[int],
    *,
    threads: int,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> Generator[Slab, None, None]:
    """Convert tensors one after the other, yielding finished slabs in order.

    Matrices of an unquantized type bf16 are rounded to bf16 first, so that quantizing equals what `llama-quantize`
    makes of a BF16 GGUF of the same checkpoint. At most two tensors are held at a time: one being converted, one
    being read.

    Args:
        tensors: what to convert.
        types: target ggml type of each.
        threads: workers.
        importance: per tensor name the importance of each column, shape [columns] or [experts, columns].

    Raises:
        QuantizeError: a tensor has NaN or infinite values, or values beyond the target's range.
    """
    for type_id in set(types):
        ggml.prepare(type_id)
    pending: collections.deque[tuple[Future[npt.NDArray[np.uint8]], PlannedTensor, int]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
        try:
            for tensor, type_id in zip(tensors, types, strict=True):
                # Everything but the last tensor's slabs has to be out before the next one is read.
                while len(pending) > 2 * threads:
                    yield _finish(*pending.popleft())
                source = tensor.load()
                weights = None if importance is None else importance.get(tensor.name)
                for task in _tasks(tensor, source, weights):
                    while len(pending) > 4 * threads:
                        yield _finish(*pending.popleft())
                    pending.append((pool.submit(_convert, tensor, task, type_id), tensor, task.elements))
                    del task
                del source
            while pending:
                yield _finish(*pending.popleft())
        finally:
            for future, *_ in pending:
                future.cancel()


@dataclass(frozen=True)
class _Task:
    rows: npt.NDArray[Any]
    importance: npt.NDArray[np.float32] | None
    elements: int


def _tasks(tensor: PlannedTensor, source: npt.NDArray[Any], weights: npt.NDArray[np.float32] | None) -> Iterator[_Task]:
    """Cut a tensor into slabs of rows; a slab never crosses an expert, since each has importance data of its own."""
    if source.dtype == np.uint8 and tensor.type_id not in (F32, F16, BF16):  # raw bytes, already in their final type
        yield _Task(source.reshape(-1), None, math.prod(tensor.shape))
        return
    columns = tensor.shape[-1] if tensor.shape else 1
    rows = tensor.shape[-2] if len(tensor.shape) > 2 else -1
    matrices = source.reshape(-1 if rows > 0 else 1, rows, columns)
    step = max(1, SLAB_ELEMENTS // columns)
    if weights is not None:
        weights = np.ascontiguousarray(weights, np.float32).reshape(-1, columns)
    for i, matrix in enumerate(matrices):
        for begin in range(0, len(matrix), step):
            part = matrix[begin : begin + step]
            yield _Task(part, None if weights is None else weights[i % len(weights)], part.size)


def _convert(tensor: PlannedTensor, task: _Task, type_id: int) -> npt.NDArray[np.uint8]:
    if tensor.type_id not in (F32, F16, BF16):
        return task.rows
    rows = np.ascontiguousarray(task.rows, np.float32)
    if not np.isfinite(rows).all():
        raise QuantizeError(f"tensor {tensor.name} has NaN or infinite values: the checkpoint is damaged, get it again")
    if BF16 in (type_id, tensor.type_id):
        bits = ggml.to_bf16(rows)
        if type_id == BF16:
            return bits.view(np.uint8).reshape(-1)
        rows = (bits.astype(np.uint32) << 16).view(np.float32)
    if type_id == F32:
        return rows.view(np.uint8).reshape(-1)
    if type_id == F16:
        with np.errstate(over="ignore"):
            half = rows.astype(np.float16)
        if not np.isfinite(half).all():
            raise QuantizeError(f"tensor {tensor.name} has values beyond the range of f16: take bf16 or f32")
        return half.view(np.uint8).reshape(-1)
    out = np.empty((len(rows), ggml.row_bytes(type_id, rows.shape[1])), np.uint8)
    try:
        ggml.quantize_rows(type_id, rows, out, task.importance)
    except QuantizeError as e:
        raise QuantizeError(f"tensor {tensor.name}: {e}") from None
    return out.reshape(-1)


def _finish(future: Future[npt.NDArray[np.uint8]], tensor: PlannedTensor, elements: int) -> Slab:
    return Slab(tensor, future.result(), elements)
