"""Calibration tokens flowing through some of a checkpoint's blocks: the means of everything that tries out a cut.

Sequences are held out for judging: of the tokens, about a fifth in whole sequences, evenly spread. They flow behind the
others, so that every batch is of one kind.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ziggurat.converter.block_pass import check_finite, embed
from ziggurat.converter.blocks import Block, Blocks
from ziggurat.converter.calibrate import CalibrateSettings, CalibrationProgress, torch_threads
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.calibration_work import WorkFolder
from ziggurat.converter.hidden import HiddenStates, Shape, fits_memory
from ziggurat.converter.split import split

if TYPE_CHECKING:
    import torch

# Tokens whose logits are held at a time.
LOGIT_TOKENS = 256

Windows = Sequence[tuple[int, int]]


class Flow:
    """Hidden states of all tokens, in as many copies as are asked for, and their way through blocks.

    Attributes:
        blocks: where the blocks come from.
        fit: first and behind-the-last sequence of each batch to solve on.
        held_out: the same of the batches to judge by.
        tokens: number of tokens.
    """

    def __init__(
        self, blocks: Blocks, tokens: CalibrationTokens, settings: CalibrateSettings, folder: Path,
        progress: CalibrationProgress, copies: int,
    ) -> None:  # fmt: skip
        """Order the sequences; `copies` is how many hidden states will be held at once.

        Raises:
            CalibrationError: there are not two sequences.
        """
        parts = split(tokens, settings.batch_tokens)
        self._ids, self.fit, self.held_out = parts.tokens, parts.fit, parts.held_out
        self.blocks, self.tokens, self._progress = blocks, tokens.ids.size, progress
        self._shape = *tokens.ids.shape, blocks.n_embd
        whole = (copies * self._shape[0], *self._shape[1:])
        self._memory_share, self._folder, self._made = settings.memory_share, folder, 0
        self._in_memory = fits_memory(whole, settings.memory_share)

    @property
    def all(self) -> Windows:
        """All batches."""
        return [*self.fit, *self.held_out]

    def count(self, windows: Windows) -> int:
        """Number of tokens in batches."""
        return sum(stop - start for start, stop in windows) * int(self._shape[1])

    def start(self, windows: Windows) -> HiddenStates:
        """Hidden states before the first block, of the sequences in `windows`; what others hold is undefined."""
        hidden = self._room()
        embed(self.blocks, self._ids, hidden, list(windows))
        return hidden

    def copy(self, hidden: HiddenStates, windows: Windows) -> HiddenStates:
        """A copy of hidden states."""
        copy = self._room()
        for start, stop in windows:
            copy.write(start, hidden.read(start, stop))
        return copy

    def resume(self, path: Path, windows: Windows) -> HiddenStates:
        """A copy of the hidden states in a file that `HiddenStates.copy_to` made."""
        return self.copy(HiddenStates(self._shape, path, create=False), windows)

    def release(self, hidden: HiddenStates) -> None:
        """Give the room back."""
        if hidden.path is not None:
            hidden.path.unlink(missing_ok=True)

    def read(self, hidden: HiddenStates, window: tuple[int, int]) -> torch.Tensor:
        """A batch of hidden states, on the device."""
        return hidden.read(*window).to(self.blocks.device, self.blocks.dtype)

    def run(self, block: Block, hidden: HiddenStates, window: tuple[int, int]) -> torch.Tensor:
        """A batch behind a block; `hidden` stays as it is."""
        behind = block(self.read(hidden, window))
        check_finite(behind, block.index, window[0])
        self._progress.step(behind.shape[0] * behind.shape[1], f"block {block.index}")
        return behind

    def through(self, block: Block, hidden: HiddenStates, windows: Windows) -> None:
        """Send batches through a block, in their place."""
        for window in windows:
            hidden.write(window[0], self.run(block, hidden, window))

    def loss(self, hidden: HiddenStates, windows: Windows) -> float:
        """Mean loss, in nats, of predicting each next token from the states behind the last block; may be no number."""
        return self.compare(hidden, None, windows)[0]

    def compare(self, hidden: HiddenStates, whole: HiddenStates | None, windows: Windows) -> tuple[float, float]:
        """Mean loss of `hidden`, as `loss` has it, and mean divergence of its predictions from those of `whole`, nats.

        The divergence is that of `ziggurat eval --against`, KL(whole || cut); 0 without `whole`.
        """
        import torch

        loss, divergence, count = 0.0, 0.0, 0
        for start, stop in windows:
            ids = torch.from_numpy(self._ids.ids[start:stop, 1:].astype(np.int64)).flatten().to(self.blocks.device)
            states = self.read(hidden, (start, stop))[:, :-1].flatten(0, 1)
            wanted = None if whole is None else self.read(whole, (start, stop))[:, :-1].flatten(0, 1)
            for i in range(0, len(ids), LOGIT_TOKENS):
                part = slice(i, i + LOGIT_TOKENS)
                predicted = self.blocks.head(states[part]).log_softmax(-1)
                loss -= float(predicted.gather(-1, ids[part, None]).double().sum())
                if wanted is not None:
                    true = self.blocks.head(wanted[part]).log_softmax(-1)
                    divergence += float((true.exp() * (true - predicted)).sum(-1).double().sum())
            count += len(ids)
        return (loss / count, divergence / count) if count else (math.nan, math.nan)

    def room(self, width: int) -> HiddenStates:
        """Room for something else of each token: shape [sequences, positions, width]."""
        shape = *self._shape[:2], width
        return self._new(shape, in_memory=fits_memory(shape, self._memory_share))

    def _room(self) -> HiddenStates:
        return self._new(self._shape, in_memory=self._in_memory)

    def _new(self, shape: Shape, *, in_memory: bool) -> HiddenStates:
        self._made += 1
        return HiddenStates(shape, None if in_memory else self._folder / f"flow-{self._made}.f32")


@contextlib.contextmanager
def flow(
    blocks: Blocks, tokens: CalibrationTokens, settings: CalibrateSettings, progress: CalibrationProgress, copies: int,
    work: WorkFolder | None = None,
) -> Iterator[Flow]:  # fmt: skip
    """A flow whose files are gone afterwards; its computations take the threads of `settings`.

    Its files are in `work`, or in a temporary folder.

    Raises:
        CalibrationError: there are not two sequences.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(settings.threads))
        if work is not None:
            folder = stack.enter_context(work.scratch())
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ziggurat-")))
        yield Flow(blocks, tokens, settings, folder, progress, copies)
