"""Hidden states of all calibration tokens on their way through blocks, one block in memory, resumable after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter.calibration_work import WorkFolder
from ziggurat.converter.errors import CalibrationError
from ziggurat.converter.hidden import HiddenStates, fits_memory

if TYPE_CHECKING:
    import torch

    from ziggurat.converter.blocks import Block, Blocks
    from ziggurat.converter.calibrate import CalibrateSettings, CalibrationProgress
    from ziggurat.converter.calibration_text import CalibrationTokens

Batches = Iterator[tuple[int, "torch.Tensor", "torch.Tensor"]]
"""Of each batch its first sequence and the states before and behind the block: [sequences, positions, n_embd]."""

Visit = Callable[["Block", Batches], Mapping[str, npt.NDArray[Any]]]
"""Sends all batches through a block by going through them; gives the block's figures."""


class BlockPass:
    """Sends sequences through some of a checkpoint's blocks."""

    def __init__(
        self, blocks: Blocks, tokens: CalibrationTokens, windows: Sequence[tuple[int, int]],
        settings: CalibrateSettings, work: WorkFolder,
    ) -> None:  # fmt: skip
        """Prepare the way.

        Args:
            blocks: where blocks come from.
            tokens: the sequences.
            windows: first and behind-the-last sequence of each batch; together all of them.
            settings: memory, and whether hidden states are kept.
            work: where finished blocks are noted.
        """
        self._blocks, self._tokens, self._settings, self._work = blocks, tokens, settings, work
        self._shape = *tokens.ids.shape, blocks.n_embd
        self._in_memory = fits_memory(self._shape, settings.memory_share)
        self._windows = windows

    def run(
        self, indices: Sequence[int], visit: Visit, progress: CalibrationProgress, *,
        prepare: Callable[[Block], None] | None = None, before: Callable[[int, HiddenStates], None] | None = None,
    ) -> None:  # fmt: skip
        """Go through the blocks that are not finished.

        Args:
            indices: of the checkpoint's blocks, in order; the work folder counts places in this list.
            visit: what is done with each; its figures go to the work folder.
            progress: who is told; a step is a token that went through a block.
            prepare: changes a block's weights before it runs.
            before: looks at the hidden states before each place, and at those behind the last block.

        Raises:
            CalibrationError: hidden states are no numbers, or there is no room for them.
        """
        work = self._work
        if work.finished == len(indices):
            return
        hidden = self._first(before)
        for place in range(work.finished, len(indices)):
            block = self._blocks.block(indices[place])
            if prepare is not None:
                prepare(block)
            target = hidden if self._in_memory else HiddenStates(self._shape, work.partial_path())
            batches = self._batches(block, hidden, target, progress)
            arrays = visit(block, batches)
            assert next(batches, None) is None
            del block, batches  # before the next one is read
            self._keep(target, place + 1, before)
            work.finish(place, arrays, keep=self._settings.keep_hidden)
            hidden = target

    def _first(self, before: Callable[[int, HiddenStates], None] | None) -> HiddenStates:
        """Hidden states before the first block that is not finished."""
        place, work = self._work.finished, self._work
        if place == 0:
            hidden = HiddenStates(self._shape, None if self._in_memory else work.partial_path())
            embed(self._blocks, self._tokens, hidden, self._windows)
            self._keep(hidden, 0, before)
            return hidden
        old = HiddenStates(self._shape, work.hidden_path(place), create=False)
        if not self._in_memory:
            return old
        hidden = HiddenStates(self._shape)
        for start, stop in self._windows:
            hidden.write(start, old.read(start, stop))
        return hidden

    def _batches(
        self, block: Block, source: HiddenStates, target: HiddenStates, progress: CalibrationProgress
    ) -> Batches:
        for start, stop in self._windows:
            before = source.read(start, stop).to(self._blocks.device, self._blocks.dtype)
            behind = block(before)
            check_finite(behind, block.index, start)
            target.write(start, behind)
            progress.step((stop - start) * self._shape[1], f"block {block.index}")
            yield start, before, behind

    def _keep(self, hidden: HiddenStates, place: int, before: Callable[[int, HiddenStates], None] | None) -> None:
        """Save the hidden states before a place, and what is wanted of them."""
        if before is not None:
            before(place, hidden)
        if self._settings.work is not None or not self._in_memory:
            hidden.save(self._work.hidden_path(place))


def embed(blocks: Blocks, tokens: CalibrationTokens, hidden: HiddenStates, windows: Sequence[tuple[int, int]]) -> None:
    """Fill hidden states with those before the first block."""
    import torch

    for start, stop in windows:
        hidden.write(start, blocks.embed(torch.from_numpy(tokens.ids[start:stop].astype(np.int64))))


def check_finite(hidden: torch.Tensor, block: int, sequence: int) -> None:
    """Refuse hidden states that are no numbers.

    Raises:
        CalibrationError: there are NaN or infinite values behind `block` in the sequences from `sequence` on.
    """
    import torch

    if not bool(torch.isfinite(hidden).all()):
        raise CalibrationError(
            f"block {block} gives NaN or infinite values on the calibration text (sequence {sequence} or one of its "
            "batch): the checkpoint is damaged, or computed in too narrow a type; download it again"
        )
