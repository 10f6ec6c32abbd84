"""Trying out quantized weights in a block: what llama.cpp would compute with them, and what the block makes of that.

Llama.cpp's kernels round activations too, to 8 bits in blocks as long as those of the weights' type, with one step
size each. A channel that is far larger than its neighbours costs these their precision: scales that would make one so
have to pay for it here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
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


def restored(rows: Float32, type_id: int, pool: Executor, importance: Float32 | None = None) -> Float32:
    """What a model computes with in place of `rows` once they are quantized: their dequantized form.

    Args:
        rows: shape [n, columns].
        type_id: a quantized ggml type, prepared.
        pool: who does it.
        importance: of the columns, shape [columns].

    Raises:
        QuantizeError: the result holds non-finite scales.
    """
    columns, out = rows.shape[1], np.empty(rows.shape, np.float32)

    def task(part: slice) -> None:
        values = np.ascontiguousarray(rows[part], np.float32)
        packed = np.empty((len(values), ggml.row_bytes(type_id, columns)), np.uint8)
        ggml.quantize_rows(type_id, values, packed, importance)
        out[part] = ggml.dequantize_rows(type_id, packed, columns)

    step = max(1, TASK_ELEMENTS // columns)
    for future in [pool.submit(task, slice(begin, begin + step)) for begin in range(0, len(rows), step)]:
        future.result()
    return out


def rounded_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """Activations [..., columns] as the kernels take them: ggml's Q8_K for blocks of 256, Q8_0 for blocks of 32."""
    blocks = x.reshape(-1, block)
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / step).round() * step).reshape(x.shape)


@dataclass(frozen=True)
class Substitute:
    """Rows of a block's matrix as the file will have them."""

    rows: torch.Tensor
    """A view of the block's own, evenly spread: shape [n, columns]."""
    step: int
    """Distance between them in the matrix."""
    values: torch.Tensor
    """What the model computes with in their place, of the same shape, if its activations are divided by `scales`."""
    scales: torch.Tensor | None
    """Shape [columns]."""
    block: int
    """Columns of a block of the weights' type."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What they give for activations [..., columns]: shape [..., n]."""
        return rounded_activations(x if self.scales is None else x / self.scales, self.block) @ self.values.T


@contextmanager
def substituted(substitutes: Sequence[Substitute]) -> Iterator[None]:
    """Let products with matrices of a block give meanwhile what the file's rows would; the others stay exact."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Substituting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.linear:
                _substitute(out, args[0], args[1], args[1].stride(0), substitutes)
            elif func is torch.addmm:  # GPT-2's Conv1D, whose matrix is [columns, rows]
                _substitute(out, args[1], args[2], args[2].stride(1), substitutes)
            return out

    with torch.no_grad(), Substituting():
        yield


def _substitute(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: int, substitutes: Sequence[Substitute]
) -> None:
    """Correct the products `out` of activations with the rows of a matrix, which stand `stride` values apart."""
    for substitute in substitutes:
        offset = substitute.rows.data_ptr() - weight.data_ptr()  # of a matrix that is stored behind another
        if 0 <= offset < weight.numel() * weight.element_size():
            first = offset // (stride * weight.element_size())
            places = slice(first, first + (len(substitute.rows) - 1) * substitute.step + 1, substitute.step)
            out[..., places] += substitute(x) - x @ substitute.rows.T


class Part:
    """A part of a block, with inputs to run it on again and again."""

    def __init__(self, block: Block, module: Any, hidden: torch.Tensor) -> None:
        """Take what `module` reads while the block reads `hidden`.

        Args:
            block: with the weights of the model in floats.
            module: within it.
            hidden: states before the block, shape [sequences, positions, n_embd].
        """
        self._module = module
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

    def loss(self, substitutes: Sequence[Substitute]) -> float:
        """Squared error of what the part gives with substitutes, relative to what it gives without."""
        if self._size == 0:
            return 0.0
        with substituted(substitutes):
            return float((self._run() - self._wanted).double().square().sum()) / self._size

    def _run(self) -> torch.Tensor:
        import torch

        args, kwargs = self._call
        with torch.no_grad():
            out = self._module(*args, **kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result.float()
