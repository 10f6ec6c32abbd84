"""Corrects one block of a cut model while its calibration tokens go through it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter import repair
from ziggurat.converter.blocks import Block, Blocks
from ziggurat.converter.flow import Flow, Windows
from ziggurat.converter.hidden import HiddenStates
from ziggurat.converter.repair import Fold, Sums

if TYPE_CHECKING:
    import torch

# With more inputs than this the sums take gigabytes and want more tokens than anybody calibrates with.
MAX_INPUTS = 16384


@dataclass(frozen=True)
class RepairSettings:
    """Which corrections are tried."""

    inputs: bool = True
    """Regress on what the down projection reads; False, or a mixture of experts: on what it gives, as in ReplaceMe."""
    behind: bool = True
    """Correct the kept blocks behind the first removed run too."""
    weighted: bool = True
    """Weigh tokens by the size of their hidden state."""
    skip: tuple[int, ...] = ()
    """Blocks that are not corrected."""


@dataclass(frozen=True)
class Corrected:
    """A correction as it is kept."""

    fold: Fold
    ridge: float
    left: float

    def pack(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays to keep in a work folder."""
        fold = {f.name: getattr(self.fold, f.name) for f in dataclasses.fields(Fold)}
        parts = {name: value for name, value in fold.items() if value is not None}
        return {"ridge": np.array(self.ridge), "left": np.array(self.left), **parts}

    @classmethod
    def unpack(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Corrected:
        """What `pack` made arrays of."""
        parts = {name: value for name, value in arrays.items() if name not in ("ridge", "left")}
        return cls(Fold(**parts), float(arrays["ridge"]), float(arrays["left"]))


def correct(
    stream: Flow, block: Block, mended: HiddenStates, wanted: HiddenStates, settings: RepairSettings
) -> Corrected | None:
    """Bring the states of the cut model, before `block`, behind it and closer to those of the whole one.

    Args:
        stream: the tokens' way.
        block: a kept one.
        mended: the states before it; changed to those behind it.
        wanted: those of the whole model, behind the block and the removed ones that follow it.
        settings: which corrections.

    Returns:
        What becomes of the block's down projection; None when no correction helps on the held-out tokens.
    """
    import torch

    on_inputs = _on_inputs(stream.blocks, settings)
    regressors: HiddenStates | None = None

    def summed(windows: Windows) -> Sums | None:
        nonlocal regressors
        total: Sums | None = None
        for window in windows:
            with _regressors(block, on_inputs) as seen:
                behind = stream.run(block, mended, window)
            target = stream.read(wanted, window).flatten(0, 1)
            weight = repair.weights(target) if settings.weighted else torch.ones_like(target[:, 0]).double()
            part = repair.sums(seen[0], target.double() - behind.flatten(0, 1).double(), weight)
            total = part if total is None else total + part
            if regressors is None:
                regressors = stream.room(seen[0].shape[-1])
            regressors.write(window[0], seen[0].reshape(*behind.shape[:2], -1))
            mended.write(window[0], behind)
        return total

    fit, held_out = summed(stream.fit), summed(stream.held_out)
    correction = None if fit is None or held_out is None else repair.choose(fit, held_out)
    assert regressors is not None
    if correction is not None:
        matrix = correction.matrix.to(stream.blocks.dtype)
        for window in stream.all:
            mended.write(window[0], stream.read(mended, window) + stream.read(regressors, window) @ matrix)
    stream.release(regressors)
    if correction is None:
        return None
    fold = (repair.fold_inputs if on_inputs else repair.fold_outputs)(correction)
    return Corrected(fold, correction.ridge, correction.left)


def _on_inputs(blocks: Blocks, settings: RepairSettings) -> bool:
    """Whether corrections are regressed on the inputs of the down projections."""
    config: dict[str, Any] = blocks.checkpoint.config
    wide = int(config.get("intermediate_size") or config.get("n_inner") or 4 * blocks.n_embd) > MAX_INPUTS
    return settings.inputs and blocks.family.down is not None and not wide


@contextmanager
def _regressors(block: Block, on_inputs: bool) -> Iterator[list[torch.Tensor]]:
    """Collect, while a block runs, what corrections are regressed on: shape [tokens, f]."""
    seen: list[torch.Tensor] = []

    def inputs(module: Any, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().flatten(0, -2))

    def outputs(module: Any, args: tuple[Any, ...], result: Any) -> None:
        out = result[0] if isinstance(result, tuple) else result
        seen.append(out.detach().reshape(-1, out.shape[-1]))

    if on_inputs:
        handle = getattr(block.mlp, block.family.down or "").register_forward_pre_hook(inputs)
    else:
        handle = block.mlp.register_forward_hook(outputs)
    try:
        yield seen
    finally:
        handle.remove()
