"""Statistics of what goes into a block's linear layers, channel by channel, and samples of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ziggurat.converter import products

if TYPE_CHECKING:
    import torch

    from ziggurat.converter.blocks import Block

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ChannelStatistics:
    """Sums over the inputs x of a linear layer; those of a mixture's experts have a first axis [experts]."""

    absolute: Float64
    """Sum of |x|, shape [columns] or [experts, columns]."""
    squares: Float64
    """Sum of x squared, of the same shape."""
    count: npt.NDArray[np.int64]
    """How many inputs: shape [] or [experts]."""

    @property
    def mean_absolute(self) -> Float64:
        """Mean |x| per channel, zero for experts that no token came to."""
        result: Float64 = self.absolute / np.maximum(self.count, 1)[..., None]
        return result

    @property
    def mean_squares(self) -> Float64:
        """Mean x squared per channel: llama.cpp's importance matrix."""
        result: Float64 = self.squares / np.maximum(self.count, 1)[..., None]
        return result

    def __add__(self, other: ChannelStatistics) -> ChannelStatistics:
        return ChannelStatistics(self.absolute + other.absolute, self.squares + other.squares, self.count + other.count)


class Observer(Protocol):
    """Who wants to see the inputs themselves."""

    def add(self, leader: str, x: torch.Tensor, expert: int | None, experts: int | None) -> None:
        """Inputs of shape [n, columns], float32, that `leader` and all layers that follow it read.

        `expert` says which of `experts` read them; None: all of a layer that is no mixture.
        """


class _Sums:
    """Accumulates one linear layer's statistics."""

    def __init__(self, experts: int | None, columns: int) -> None:
        shape = (columns,) if experts is None else (experts, columns)
        self.absolute, self.squares = np.zeros(shape), np.zeros(shape)
        self.count = np.zeros(shape[:-1], np.int64)


class Collector:
    """Sums up the inputs of all linear layers of blocks while they run.

    Layers are named as their weights in the checkpoint, without `.weight`; the experts of a mixture share a name
    without their number (`model.layers.0.mlp.experts.gate_proj`), however transformers keeps them, and its router is
    one of the layers.

    Attributes:
        leaders: for each layer, the first of those that read the same input (q, k and v; gate and up).
    """

    def __init__(self, observer: Observer | None = None) -> None:
        self._sums: dict[str, _Sums] = {}
        self._last: tuple[Any, str, tuple[Float64, Float64, int]] | None = None
        self._observer = observer
        self.leaders: dict[str, str] = {}

    def take(self) -> dict[str, ChannelStatistics]:
        """What was gathered since the last call."""
        sums, self._sums = self._sums, {}
        return {name: ChannelStatistics(s.absolute, s.squares, s.count) for name, s in sums.items()}

    @contextmanager
    def watching(self, block: Block) -> Iterator[None]:
        """Gather what goes into the linear layers of `block` in calls meanwhile."""
        try:
            with products.watching(block, self._see):
                yield
        finally:
            self._last = None

    def _see(self, layers: tuple[str, ...], x: Any, out: Any, expert: int | None, experts: int | None) -> None:
        if self._last is None or self._last[0] is not x:  # q, k and v, gate and up look at the same input
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            self._last = x, layers[0], _column_sums(flat)
            if self._observer is not None:
                self._observer.add(layers[0], flat, expert, experts)
        _, leader, (absolute_sum, squares_sum, count) = self._last
        for name in layers:
            self.leaders[name] = leader
            if name not in self._sums:
                self._sums[name] = _Sums(experts, x.shape[-1])
            sums, place = self._sums[name], (() if expert is None else (expert,))
            sums.absolute[place] += absolute_sum
            sums.squares[place] += squares_sum
            sums.count[place] += count


def channel_statistics(x: torch.Tensor) -> ChannelStatistics:
    """Statistics of inputs of shape [..., columns]."""
    absolute, squares, count = _column_sums(x.detach().reshape(-1, x.shape[-1]).float())
    return ChannelStatistics(absolute, squares, np.array(count))


def _column_sums(flat: torch.Tensor) -> tuple[Float64, Float64, int]:
    import torch

    absolute, squares = flat.abs().sum(0, dtype=torch.float64), flat.square().sum(0, dtype=torch.float64)
    return absolute.cpu().numpy(), squares.cpu().numpy(), len(flat)


def pack(statistics: Mapping[str, ChannelStatistics]) -> dict[str, npt.NDArray[Any]]:
    """Flat arrays of statistics, to be saved."""
    return {
        f"{name}:{field}": getattr(s, field)
        for name, s in statistics.items()
        for field in ("absolute", "squares", "count")
    }


def unpack(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, ChannelStatistics]:
    """Statistics from what `pack` made of them; other arrays are left out."""
    names = [key.removesuffix(":count") for key in arrays if key.endswith(":count")]
    return {
        name: ChannelStatistics(arrays[f"{name}:absolute"], arrays[f"{name}:squares"], arrays[f"{name}:count"])
        for name in names
    }
