"""One pass of the calibration text through the model that will be written, and what is found for each of its blocks.

The model is the checkpoint's without removed blocks and with their repair folded in, in floats. Of each block the
inputs of its linear layers are gathered: sums for the importance matrix, and what the steps look at that search scales
or compensate errors. What they find is saved before the next block is read: a killed pass goes on behind the last
finished block, and memory does not grow with the number of blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ziggurat.converter import activations, surgery
from ziggurat.converter.activations import ChannelStatistics
from ziggurat.converter.block_pass import Batches, BlockPass
from ziggurat.converter.blocks import Block, Blocks
from ziggurat.converter.calibrate import (
    CalibrateSettings,
    CalibrationProgress,
    Silent,
    rounded_products,
    torch_threads,
)
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.calibration_work import WorkFolder, identity
from ziggurat.converter.linears import HEAD
from ziggurat.converter.repair import Fold
from ziggurat.converter.samples import Sampler
from ziggurat.converter.split import Split, split

if TYPE_CHECKING:
    import torch

SAMPLE_ROWS = 1024
HELD_OUT_TOKENS = 2048

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Captured:
    """What one block of the model that will be written reads; layers are named as in `activations.Collector`.

    Tensors are float32, on the device that blocks compute on.
    """

    block: Block
    """With its weights, repair folded in, callable on hidden states; a step leaves it as it was."""
    place: int
    """Its index in the GGUF; `block.index` is that in the checkpoint."""
    tensors: Mapping[str, str]
    """Layer to the GGUF tensor that holds its weight."""
    channels: Mapping[str, ChannelStatistics]
    """Of the tokens to fit on."""
    all_channels: Mapping[str, ChannelStatistics]
    """Of all tokens: what the importance matrix is made of."""
    samples: Mapping[str, torch.Tensor]
    """Layer to rows that it read, shape [at most SAMPLE_ROWS, columns], spread evenly over the tokens to fit on.

    Layers with one input share one tensor. Experts' rows are of all of them together.
    """
    sample_experts: Mapping[str, torch.Tensor]
    """For the experts of a mixture: which expert read each row of their sample, int64."""
    grams: Mapping[str, torch.Tensor]
    """Layer to the sum of x x^T over the tokens to fit on, [columns, columns]; shared like the samples, not of experts.

    Empty unless a step asks for it, which may use them up: they are large.
    """
    held_out: torch.Tensor
    """Hidden states before the block of held-out sequences: [sequences, positions, n_embd], about HELD_OUT_TOKENS."""
    found: Mapping[str, Arrays]
    """What the steps before this one found for the block, by their names."""


class BlockStep(Protocol):
    """Something that is searched for each block: scales, compensated weights, losses by type."""

    @property
    def name(self) -> str:
        """What its arrays are kept under."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that decides its arrays beside the block, as JSON values: a pass resumes only with the same."""

    @property
    def grams(self) -> bool:
        """Whether it looks at Gram matrices."""

    def __call__(self, captured: Captured) -> dict[str, npt.NDArray[Any]]:
        """Arrays to keep of a block."""


@dataclass(frozen=True)
class TunedModel:
    """Which model is run."""

    blocks: Blocks
    tensors: Mapping[str, str]
    """`linears.tensor_names`."""
    removed: tuple[int, ...] = ()
    """Blocks of the checkpoint that are left out."""
    folds: Mapping[int, Fold] = dataclasses.field(default_factory=dict)
    """Repair of down projections, by block of the checkpoint."""

    @property
    def kept(self) -> list[int]:
        """Blocks of the checkpoint in the order of the GGUF's."""
        return list(surgery.renumber(self.blocks.n_layer, self.removed))


def tune(
    model: TunedModel, tokens: CalibrationTokens, steps: Sequence[BlockStep], settings: CalibrateSettings,
    progress: CalibrationProgress | None = None, *, stage: str = "tuning",
) -> WorkFolder:  # fmt: skip
    """Run the calibration text through the model, and the steps on every block.

    The same inputs and parameters give the same arrays, bit for bit, on the same machine with the same number of
    threads, whether or not the pass was interrupted.

    Args:
        model: which.
        tokens: at least two sequences.
        steps: in order; each sees what those before it found.
        settings: device, memory and batches; in `work`, which is not None, the arrays stay.
        progress: who is told; a step is a token that went through a block.
        stage: what it is called, and its folder in `work`.

    Returns:
        The folder, of whose places `block` reads the figures: statistics as `activations.pack` has them, and the
        arrays of each step under `name/`.

    Raises:
        CalibrationError: hidden states are no numbers, the folder is of other inputs, or there is no room.
    """
    assert settings.work is not None
    progress = progress or Silent()
    parts = split(tokens, settings.batch_tokens)
    folder, inputs = settings.work / stage, _identity(model, tokens, steps, settings)
    with torch_threads(settings.threads), rounded_products(), WorkFolder(folder, inputs, stage) as work:
        kept = model.kept
        progress.stage(stage, (len(kept) - work.finished) * tokens.ids.size)
        visitor = _Visitor(model, parts, steps)
        BlockPass(model.blocks, parts.tokens, parts.all, settings, work).run(
            kept, visitor.visit, progress, prepare=visitor.prepare
        )
    return work


def found(work: WorkFolder, place: int, step: str, ending: str = "") -> dict[str, npt.NDArray[Any]]:
    """What a step found for a block; of that, the arrays whose names end so.

    Raises:
        CalibrationError: it is missing or damaged.
    """
    prefix = f"{step}/"
    arrays = work.block(place, lambda name: name.startswith(prefix) and name.endswith(ending))
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def _identity(
    model: TunedModel, tokens: CalibrationTokens, steps: Sequence[BlockStep], settings: CalibrateSettings
) -> dict[str, Any]:
    """All that decides what is found."""
    common = identity(
        model.blocks.checkpoint, tokens, settings,
        removed_blocks=list(model.removed), repair=folds_hash(model.folds), steps=[step.name for step in steps],
    )  # fmt: skip
    return {**common, **{f"{step.name} {key}": value for step in steps for key, value in step.identity.items()}}


def folds_hash(folds: Mapping[int, Fold]) -> str:
    """Hash of a repair."""
    digest = hashlib.sha256()
    for index, fold in sorted(folds.items()):
        for field in dataclasses.fields(fold):
            value = getattr(fold, field.name)
            digest.update(f"{index} {field.name} {getattr(value, 'shape', value)}\n".encode())
            if isinstance(value, np.ndarray):
                digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


class _Visitor:
    """What is done with each block."""

    def __init__(self, model: TunedModel, parts: Split, steps: Sequence[BlockStep]) -> None:
        self._model, self._steps = model, steps
        self._fit = len(parts.fit)
        self._chosen = _held_out(parts)
        self._places = surgery.renumber(model.blocks.n_layer, model.removed)
        grams = any(step.grams for step in steps)
        self._sampler = Sampler(SAMPLE_ROWS, self._fit, grams=grams) if steps else None
        self._collector = activations.Collector(self._sampler)

    def prepare(self, block: Block) -> None:
        """Fold the repair in."""
        fold = self._model.folds.get(block.index)
        if fold is not None:
            block.fold_down(fold)

    def visit(self, block: Block, passing: Batches) -> dict[str, npt.NDArray[Any]]:
        """Send the batches through, then call the steps."""
        fit: dict[str, ChannelStatistics] = {}
        held_out: list[torch.Tensor] = []
        head: ChannelStatistics | None = None
        with self._collector.watching(block):
            self._begin_batch()
            for number, (start, before, behind) in enumerate(passing, 1):
                if number > self._fit:
                    held_out += [states.clone() for i, states in enumerate(before, start) if i in self._chosen]
                if number == self._fit:
                    fit = self._collector.take()
                if self._places[block.index] == len(self._places) - 1 and HEAD in self._model.tensors:
                    of_head = activations.channel_statistics(self._model.blocks.final_norm(behind))
                    head = of_head if head is None else head + of_head
                self._begin_batch()
        every = _added(fit, self._collector.take())
        arrays = activations.pack(every if head is None else {**every, HEAD: head})
        if self._steps:
            captured = self._captured(block, fit, every, held_out)
            for step in self._steps:
                captured = dataclasses.replace(captured, found={**captured.found, step.name: step(captured)})
            for name, of_step in captured.found.items():
                arrays.update({f"{name}/{key}": array for key, array in of_step.items()})
        return arrays

    def _begin_batch(self) -> None:
        if self._sampler is not None:
            self._sampler.begin_batch()

    def _captured(
        self, block: Block, fit: Mapping[str, ChannelStatistics], every: Mapping[str, ChannelStatistics],
        held_out: list[torch.Tensor],
    ) -> Captured:  # fmt: skip
        import torch

        assert self._sampler is not None
        sampled, leaders = self._sampler.take(), self._collector.leaders
        mine = {name: leaders[name] for name in every}
        return Captured(
            block=block,
            place=self._places[block.index],
            tensors={name: self._model.tensors[name] for name in every if name in self._model.tensors},
            channels=fit,
            all_channels=every,
            samples={name: sampled.rows[leader] for name, leader in mine.items() if leader in sampled.rows},
            sample_experts={
                name: sampled.experts[leader] for name, leader in mine.items() if leader in sampled.experts
            },
            grams={name: sampled.grams[leader] for name, leader in mine.items() if leader in sampled.grams},
            held_out=torch.stack(held_out),
            found={},
        )


def _added(a: Mapping[str, ChannelStatistics], b: Mapping[str, ChannelStatistics]) -> dict[str, ChannelStatistics]:
    """Statistics of both; a mixture's expert layers may be in one only."""
    every = dict(a)
    for name, statistics in b.items():
        every[name] = every[name] + statistics if name in every else statistics
    return every


def _held_out(parts: Split) -> set[int]:
    """The held-out sequences that steps get: so many that they have about HELD_OUT_TOKENS, evenly spread."""
    first, last = parts.held_out[0][0], parts.held_out[-1][1]
    count = min(max(1, HELD_OUT_TOKENS // parts.tokens.ids.shape[1]), last - first)
    return {first + i * (last - first) // count for i in range(count)}
