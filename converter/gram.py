"""Sums over the calibration tokens from which the repair of removed blocks is solved.

A run of removed blocks is made up for in the block before it, whose feed-forward part adds M to the hidden states:
T is sought so that H_start - M + M T comes near H_end, the states behind the run, that is M T near Z = H_end -
(H_start - M) (ReplaceMe, arXiv:2505.02819). All that the least-squares solution and its error on other tokens need
are sums over tokens. Deviation: with several runs, each may be solved on the states that the model has once the runs
before it are removed and repaired, so that it makes up for what they left as well.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter.blocks import Block, Blocks
from ziggurat.converter.calibrate import (
    CalibrateSettings,
    CalibrationProgress,
    Silent,
    batches,
    check_finite,
    embed,
    torch_threads,
)
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import CalibrationError, UnsupportedModelError
from ziggurat.converter.hidden import HiddenStates, fits_memory

if TYPE_CHECKING:
    import torch

    from ziggurat.converter.calibration_text import CalibrationTokens
    from ziggurat.converter.calibration_work import WorkFolder

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Sums over tokens, with M and Z of shape [tokens, n_embd]."""

    mtm: Float64
    """M^T M, shape [n_embd, n_embd]."""
    mtz: Float64
    """M^T Z, shape [n_embd, n_embd]."""
    ztz: float
    """Sum of the squares of Z."""
    tokens: int

    def error(self, transform: Float64) -> float:
        """Mean squared length of M T - Z per token; with the identity for T that of doing without a repair."""
        mean = (np.sum((self.mtm @ transform - 2 * self.mtz) * transform) + self.ztz) / max(self.tokens, 1)
        return float(mean)


@dataclass(frozen=True)
class Gram:
    """A run of removed blocks and the sums for its repair."""

    start: int
    """First removed block."""
    count: int
    """How many are removed from there on."""
    fit: Moments
    """Of the tokens to solve on."""
    held_out: Moments
    """Of tokens of other sequences, to choose by."""


Solve = Callable[[Gram], "Float64 | None"]


def gram(
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    runs: Sequence[tuple[int, int]],
    settings: CalibrateSettings | None = None,
    progress: CalibrationProgress | None = None,
    *,
    held_out: float = 0.2,
    solve: Solve | None = None,
    work: WorkFolder | None = None,
) -> list[Gram]:
    """Sums for the repair of runs of removed blocks, in one pass up to the end of the last run.

    Args:
        checkpoint: of a family whose blocks add the feed-forward part's output as it is.
        tokens: at least two sequences.
        runs: first removed block and number of them, ascending, with a kept block before each.
        settings: device, type, batch and memory as in the calibration.
        progress: who is told; a step is a token that went through a block.
        held_out: share of the sequences that is held out, at least one of them, at most all but one.
        solve: gives T for a run, of shape [n_embd, n_embd], or None for no repair. With it, the sums of later runs are
            those of a model without the runs before them, repaired by T; without, those of the whole model.
        work: folder of a finished calibration of the same tokens that kept its hidden states: spares most of the pass.

    Raises:
        UnsupportedModelError: norms follow the feed-forward part, or what `Blocks` raises.
        CalibrationError: the runs or tokens will not do, or there are NaN or infinite values.
    """
    settings = settings or CalibrateSettings()
    blocks = Blocks(checkpoint, settings.device, settings.dtype)
    if blocks.family.post_norm:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: removed blocks of {checkpoint.architecture} cannot be made up for: a norm follows "
            "the feed-forward part, so its output is not what is added; leave the repair out with --no-repair"
        )
    _check(runs, blocks.n_layer, len(tokens.ids))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(settings.threads))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ziggurat-", dir=settings.work)))
        stream = _Stream(blocks, tokens, settings, folder, progress or Silent(), work)
        return _Runs(stream, _held_out(len(tokens.ids), held_out), solve).all(runs)


def _check(runs: Sequence[tuple[int, int]], n_layer: int, sequences: int) -> None:
    end = 0
    for start, count in runs:
        if start <= end or count < 1 or start + count > n_layer:
            raise CalibrationError(
                f"blocks {start} to {start + count - 1} of {n_layer} cannot be made up for: there has to be a block "
                "that stays before each run of removed ones"
            )
        end = start + count
    if sequences < 2:
        raise CalibrationError(
            "the repair needs at least two sequences of calibration tokens, one to solve on and one to choose by: give "
            "more text or a smaller sequence length"
        )


def _held_out(sequences: int, share: float) -> npt.NDArray[np.bool_]:
    """Which sequences are held out, evenly spread."""
    count = min(max(1, round(share * sequences)), sequences - 1)
    chosen = np.zeros(sequences, np.bool_)
    chosen[((np.arange(count) + 0.5) * sequences / count).astype(np.int64)] = True
    return chosen


class _Stream:
    """Hidden states of the whole model, block after block, and room for others."""

    def __init__(
        self, blocks: Blocks, tokens: CalibrationTokens, settings: CalibrateSettings, folder: Path,
        progress: CalibrationProgress, work: WorkFolder | None,
    ) -> None:  # fmt: skip
        sequences, positions = tokens.ids.shape
        self.blocks, self.progress = blocks, progress
        self.shape = sequences, positions, blocks.n_embd
        self.batches = batches(sequences, positions, settings.batch_tokens)
        # at once: states of the whole model and of the repaired one, and those of a run's two ends
        self._in_memory = fits_memory((5 * sequences, positions, blocks.n_embd), settings.memory_share)
        self._folder, self._work, self._tokens, self._made = folder, work, tokens, 0
        self._index = 0
        self._hidden: HiddenStates | None = None

    def room(self) -> HiddenStates:
        """Room for hidden states of all tokens."""
        self._made += 1
        return HiddenStates(self.shape, None if self._in_memory else self._folder / f"{self._made}.f32")

    def release(self, hidden: HiddenStates) -> None:
        """Give the room back."""
        if hidden.path is not None and hidden.path.parent == self._folder:
            hidden.path.unlink(missing_ok=True)

    def at(self, index: int) -> HiddenStates:
        """The whole model's states before block `index`, which never goes back."""
        if self.keeps(index):
            assert self._work is not None
            return HiddenStates(self.shape, self._work.hidden_path(index), create=False)
        if self._hidden is None:
            self._hidden = self.room()
            embed(self.blocks, self._tokens, self._hidden, self.batches)
        self.forward(self._hidden, self._index, index)
        self._index = index
        return self._hidden

    def keeps(self, index: int) -> bool:
        """Whether a calibration left the whole model's states before block `index`."""
        return self._work is not None and self._work.hidden_path(index).is_file()

    def skip(self, index: int, hidden: HiddenStates) -> None:
        """Go on from the whole model's states before block `index`, computed elsewhere; they are copied."""
        if self._hidden is not None:
            for start, stop in self.batches:
                self._hidden.write(start, hidden.read(start, stop))
            self._index = index

    def forward(self, hidden: HiddenStates, first: int, end: int) -> HiddenStates:
        """States behind the blocks from `first` up to `end`, in the place of those before them."""
        for index in range(first, end):
            block = self.blocks.block(index)
            for start, before in self.windows(hidden):
                behind = self.run(block, before, start)
                hidden.write(start, behind)
        return hidden

    def windows(self, hidden: HiddenStates) -> Iterator[tuple[int, torch.Tensor]]:
        """First sequence and states of each batch, on the device."""
        for start, stop in self.batches:
            yield start, hidden.read(start, stop).to(self.blocks.device, self.blocks.dtype)

    def run(self, block: Block, before: torch.Tensor, start: int) -> torch.Tensor:
        """States behind a block, checked and counted."""
        behind = block(before)
        check_finite(behind, block.index, start)
        self.progress.step(before.shape[0] * before.shape[1], f"block {block.index}")
        return behind


class _Runs:
    """The sums of one run after the other."""

    def __init__(self, stream: _Stream, held_out: npt.NDArray[np.bool_], solve: Solve | None) -> None:
        self._stream, self._held_out, self._solve = stream, held_out, solve

    def all(self, runs: Sequence[tuple[int, int]]) -> list[Gram]:
        """The sums of all runs."""
        stream, result = self._stream, []
        repaired: HiddenStates | None = None  # states of the model without the runs so far, behind the last of them
        end = 0
        tokens = stream.shape[0] * stream.shape[1]
        stream.progress.stage("repair", tokens * self._blocks_to_run(runs))
        for start, count in runs:
            if repaired is None:
                before = stream.at(start - 1)
            else:
                before = stream.forward(repaired, end, start - 1)
            added, ahead = self._last_kept(before, start - 1)
            if repaired is None:
                stream.skip(start, ahead)
            end = start + count
            found = self._sums(start, count, added, ahead, stream.at(end))
            result.append(found)
            if self._solve is not None:
                repaired = self._repair(found, added, ahead, repaired)
            for hidden in (added, ahead):
                stream.release(hidden)
        return result

    def _blocks_to_run(self, runs: Sequence[tuple[int, int]]) -> int:
        """How many times all tokens go through a block."""
        if not runs:
            return 0
        first, last = runs[0][0], runs[-1][0] + runs[-1][1]
        whole = 1 if self._stream.keeps(last) else last
        if self._solve is None:
            return len(runs) if self._stream.keeps(last) else last
        return whole + last - first - sum(count for _, count in runs)

    def _last_kept(self, before: HiddenStates, index: int) -> tuple[HiddenStates, HiddenStates]:
        """What the feed-forward part of block `index` adds, and the states behind the block."""
        stream = self._stream
        block, added, behind = stream.blocks.block(index), stream.room(), stream.room()
        seen: list[Any] = []
        handle = block.mlp.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            for start, states in stream.windows(before):
                behind.write(start, stream.run(block, states, start))
                out = seen.pop()
                added.write(start, (out[0] if isinstance(out, tuple) else out).reshape(states.shape))
        finally:
            handle.remove()
        return added, behind

    def _sums(self, start: int, count: int, added: HiddenStates, ahead: HiddenStates, target: HiddenStates) -> Gram:
        import torch

        stream = self._stream
        width, device = stream.shape[2], stream.blocks.device
        matrices = torch.zeros(2, 2, width, width, dtype=torch.float64, device=device)
        squares, counts = [0.0, 0.0], [0, 0]
        for first, last in stream.batches:
            m, begin, end = (h.read(first, last).to(device).double() for h in (added, ahead, target))
            z = end - begin + m
            for part in (0, 1):
                chosen = torch.from_numpy(self._held_out[first:last] == bool(part)).to(device)
                part_m, part_z = m[chosen].flatten(0, 1), z[chosen].flatten(0, 1)
                matrices[part, 0].addmm_(part_m.T, part_m)
                matrices[part, 1].addmm_(part_m.T, part_z)
                squares[part] += float(part_z.square().sum())
                counts[part] += len(part_m)
        fit, held_out = (
            Moments(matrices[part, 0].cpu().numpy(), matrices[part, 1].cpu().numpy(), squares[part], counts[part])
            for part in (0, 1)
        )
        return Gram(start, count, fit, held_out)

    def _repair(
        self, found: Gram, added: HiddenStates, ahead: HiddenStates, repaired: HiddenStates | None
    ) -> HiddenStates:
        """States behind the removed run in the model that has the repair."""
        import torch

        assert self._solve is not None
        transform, stream = self._solve(found), self._stream
        target = repaired or stream.room()
        matrix = None if transform is None else torch.from_numpy(np.ascontiguousarray(transform, np.float32))
        for start, stop in stream.batches:
            states = ahead.read(start, stop)
            if matrix is not None:
                m = added.read(start, stop)
                states = states - m + m @ matrix
            target.write(start, states)
        return target
