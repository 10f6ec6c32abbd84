"""Runs a cut model beside the whole one, block by block, and corrects what it can on the way.

Corrected are the down projections of the last kept block before every removed run and, unlike in ReplaceMe, of every
kept block behind the first run: what one correction leaves, later ones see and make up for in part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ziggurat.converter import repair
from ziggurat.converter.blocks import Block, Blocks
from ziggurat.converter.calibrate import CalibrateSettings, CalibrationProgress, Silent
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.errors import PruneError
from ziggurat.converter.flow import Flow, Windows, flow
from ziggurat.converter.hidden import HiddenStates
from ziggurat.converter.repair import Correction, Fold, Sums

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


@dataclass(frozen=True)
class Repaired:
    """A cut model with and without repair.

    Losses and divergences from the whole model's predictions are means per held-out token, in nats.
    """

    removed: tuple[int, ...]
    folds: dict[int, Fold]
    """What becomes of the down projections, by block of the checkpoint."""
    ridge: dict[int, float]
    left: dict[int, float]
    """Share of the held-out squared error that each correction leaves."""
    loss_whole: float
    loss_pruned: float
    divergence_pruned: float
    loss_repaired: float | None
    """None when no repair was tried."""
    divergence_repaired: float | None

    @property
    def helps(self) -> bool:
        """Whether predictions with the repair are nearer to the whole model's than without, on the held-out tokens.

        Judged by divergence, not by the loss: on a text that is strange to a model, a cut one may guess better by
        chance.
        """
        return (
            bool(self.folds)
            and self.divergence_repaired is not None
            and (
                self.divergence_repaired < self.divergence_pruned
                or (math.isfinite(self.divergence_repaired) and not math.isfinite(self.divergence_pruned))
            )
        )


def cut(
    blocks: Blocks,
    tokens: CalibrationTokens,
    removed: Collection[int],
    settings: CalibrateSettings | None = None,
    repair_settings: RepairSettings | None = None,
    progress: CalibrationProgress | None = None,
) -> Repaired:
    """Measure the model without some blocks, and with corrections solved for it.

    Args:
        blocks: of a checkpoint whose blocks may go; the first stays.
        tokens: at least two sequences; a fifth of them are held out.
        removed: which blocks.
        settings: device, batch and memory.
        repair_settings: which corrections; None: no repair.
        progress: who is told; a step is a token that went through a block.

    Raises:
        PruneError: norms stand between the down projections and the residual stream.
        CalibrationError: too few tokens, or hidden states that are no numbers.
    """
    settings, progress = settings or CalibrateSettings(), progress or Silent()
    if repair_settings is not None and blocks.family.post_norm:
        raise PruneError(
            f"removed blocks of a {blocks.checkpoint.architecture} cannot be made up for: a norm follows the down "
            "projection, so no correction can be folded into it; leave the repair out with --no-repair"
        )
    with flow(blocks, tokens, settings, progress, copies=3) as stream:
        run = _Cut(stream, tuple(sorted(removed)), repair_settings)
        progress.stage("repair", run.steps())
        return run.result()


@dataclass
class _Cut:
    flow: Flow
    removed: tuple[int, ...]
    settings: RepairSettings | None
    corrections: dict[int, Correction] = field(default_factory=dict)

    def steps(self) -> int:
        """Tokens that go through blocks, all streams together."""
        n_layer, n_removed, tokens = self.flow.blocks.n_layer, len(self.removed), self.flow.tokens
        cut = n_layer - n_removed - (self.removed[0] - 1 if self.removed else n_layer)
        held = sum(b - a for a, b in self.flow.held_out) / sum(b - a for a, b in self.flow.all)
        steps = tokens * (n_layer + cut * held + (2 * cut if self.settings else 0))
        return int(steps)

    def result(self) -> Repaired:
        """Go through the blocks."""
        stream, settings = self.flow, self.settings
        whole = stream.start(stream.all if settings else stream.held_out)
        plain: HiddenStates | None = None
        mended: HiddenStates | None = None
        windows = stream.all if settings else stream.held_out
        index = 0
        while index < stream.blocks.n_layer:
            end = index + 1
            while end in self.removed:
                end += 1
            block = stream.blocks.block(index)
            if end > index + 1 and plain is None:
                plain = stream.copy(whole, stream.held_out)
                mended = stream.copy(whole, stream.all) if settings else None
            if plain is not None:
                stream.through(block, plain, stream.held_out)
            stream.through(block, whole, windows)
            for gone in range(index + 1, end):
                del block  # one at a time
                block = stream.blocks.block(gone)
                stream.through(block, whole, windows)
            if mended is not None and settings is not None:
                if end > index + 1:
                    del block
                    block = stream.blocks.block(index)
                if end > index + 1 or settings.behind:
                    self._correct(block, mended, whole, settings)
                else:
                    stream.through(block, mended, stream.all)
            index = end
        loss_whole = stream.loss(whole, stream.held_out)
        pruned = (loss_whole, 0.0) if plain is None else stream.compare(plain, whole, stream.held_out)
        repaired = (None, None) if mended is None else stream.compare(mended, whole, stream.held_out)
        stream.blocks.release_head()
        fold = repair.fold_inputs if settings and _on_inputs(stream.blocks, settings) else repair.fold_outputs
        return Repaired(
            self.removed,
            {i: fold(c) for i, c in self.corrections.items()},
            {i: c.ridge for i, c in self.corrections.items()},
            {i: c.left for i, c in self.corrections.items()},
            loss_whole, *pruned, *repaired,
        )  # fmt: skip

    def _correct(self, block: Block, mended: HiddenStates, wanted: HiddenStates, settings: RepairSettings) -> None:
        """Bring the states of the cut model, before `block`, behind it and closer to those of the whole one."""
        import torch

        stream = self.flow
        on_inputs = _on_inputs(stream.blocks, settings)

        def summed(windows: Windows) -> Sums | None:
            total: Sums | None = None
            for window in windows:
                with _regressors(block, on_inputs) as seen:
                    behind = stream.run(block, mended, window)
                target = stream.read(wanted, window).flatten(0, 1)
                weight = repair.weights(target) if settings.weighted else torch.ones_like(target[:, 0]).double()
                part = repair.sums(seen[0], target.double() - behind.flatten(0, 1).double(), weight)
                total = part if total is None else total + part
            return total

        fit, held_out = summed(stream.fit), summed(stream.held_out)
        correction = None if fit is None or held_out is None else repair.choose(fit, held_out)
        if correction is None:
            stream.through(block, mended, stream.all)
            return
        self.corrections[block.index] = correction
        matrix = correction.matrix.to(stream.blocks.dtype)
        for window in stream.all:
            with _regressors(block, on_inputs) as seen:
                behind = stream.run(block, mended, window)
            mended.write(window[0], behind + (seen[0] @ matrix).reshape(behind.shape))


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
