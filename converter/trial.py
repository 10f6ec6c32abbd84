"""Trying out changed weights in a block: what their quantization leaves of them, and what the block makes of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter import ggml
from ziggurat.converter.blocks import Block

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]

# Values that a task quantizes: large enough that Python's share vanishes, small enough that all cores have some.
TASK_ELEMENTS = 1 << 16


def restored(
    rows: Float32, type_id: int, pool: Executor, *, scales: Float32 | None = None, importance: Float32 | None = None
) -> Float32:
    """What a model computes with in place of `rows` once they are quantized: their dequantized form.

    Args:
        rows: shape [n, columns].
        type_id: a quantized ggml type, prepared.
        pool: who does it.
        scales: what columns are multiplied by before, and divided by afterwards, shape [columns].
        importance: of the columns of the unscaled rows, shape [columns].

    Raises:
        QuantizeError: the result holds non-finite scales.
    """
    columns = rows.shape[1]
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance if scales is None else importance / np.square(scales), np.float32)
    out = np.empty(rows.shape, np.float32)

    def task(begin: int, end: int) -> None:
        part = rows[begin:end] if scales is None else rows[begin:end] * scales
        part = np.ascontiguousarray(part, np.float32)
        packed = np.empty((len(part), ggml.row_bytes(type_id, columns)), np.uint8)
        ggml.quantize_rows(type_id, part, packed, weights)
        back = ggml.dequantize_rows(type_id, packed, columns)
        out[begin:end] = back if scales is None else back / scales

    step = max(1, TASK_ELEMENTS // columns)
    for future in [pool.submit(task, begin, begin + step) for begin in range(0, len(rows), step)]:
        future.result()
    return out


class Part:
    """The attention or the feed-forward part of a block, with inputs to run it on again and again."""

    def __init__(self, block: Block, layer: str, hidden: torch.Tensor) -> None:
        """Take the part that the linear layer `layer` is in, and its inputs while the block reads `hidden`.

        Args:
            block: with the weights of the model in floats.
            layer: its name in the checkpoint.
            hidden: states before the block, shape [sequences, positions, n_embd].
        """
        mlp, name = block.mlp, layer.removeprefix(block.prefix).split(".")[0]
        self._module = getattr(block.layer, name) if hasattr(block.layer, name) else mlp
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

        def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._call = args, kwargs

        handle = self._module.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            block(hidden)
        finally:
            handle.remove()
        self._wanted = self._run()
        self._size = float(self._wanted.double().square().sum())

    def loss(self) -> float:
        """Squared error of what the part gives now, relative to what it gave at first."""
        if self._size == 0:
            return 0.0
        return float((self._run() - self._wanted).double().square().sum()) / self._size

    def _run(self) -> torch.Tensor:
        import torch

        args, kwargs = self._call
        with torch.no_grad():
            out = self._module(*args, **kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result.float()


@contextmanager
def replaced(matrices: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let a block compute with other matrices meanwhile; `matrices` are views of its own."""
    old = [matrix.clone() for matrix in matrices]
    try:
        for matrix, value in zip(matrices, values, strict=True):
            matrix.copy_(value)
        yield
    finally:
        for matrix, value in zip(matrices, old, strict=True):
            matrix.copy_(value)
