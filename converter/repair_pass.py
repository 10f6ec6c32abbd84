"""Runs a cut model beside the whole one, block by block, and corrects what it can on the way.

Corrected are the down projections of the last kept block before every removed run and, unlike in ReplaceMe, of every
kept block behind the first run: what one correction leaves, later ones see and make up for in part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings, CalibrationProgress, Silent
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.calibration_work import WorkFolder, identity
from ziggurat.converter.correction import Corrected, RepairSettings, correct
from ziggurat.converter.flow import Flow, Windows, flow
from ziggurat.converter.hidden import HiddenStates
from ziggurat.converter.prune_families import check_repairable
from ziggurat.converter.repair import Fold


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
        settings: device, batch, memory, and the folder from which a killed run is taken up again.
        repair_settings: which corrections; None: no repair.
        progress: who is told; a step is a token that went through a block.

    Raises:
        PruneError: the family's blocks cannot be corrected.
        CalibrationError: too few tokens, hidden states that are no numbers, or the work folder is of other inputs.
    """
    settings, progress = settings or CalibrateSettings(), progress or Silent()
    removed = tuple(sorted(removed))
    if repair_settings is not None:
        check_repairable(blocks.checkpoint)
    with contextlib.ExitStack() as stack:
        work = None
        if settings.work is not None:
            tried = None if repair_settings is None else dataclasses.asdict(repair_settings)
            listed = ", ".join(map(str, removed))
            inputs = identity(blocks.checkpoint, tokens, settings, removed_blocks=listed, corrections=tried)
            work = stack.enter_context(WorkFolder(settings.work / "repair", inputs, "repair"))
        stream = stack.enter_context(flow(blocks, tokens, settings, progress, copies=3, work=work))
        return _Cut(stream, removed, repair_settings, work).result(progress)


@dataclass
class _Cut:
    """The way of up to three streams of hidden states through the blocks; a step is a kept block.

    Streams: `whole`, the whole model's; from the first removed run on `plain`, of the cut model, held-out sequences
    only; and `mended`, of the cut model with the corrections solved so far, when there is to be a repair.
    """

    flow: Flow
    removed: tuple[int, ...]
    settings: RepairSettings | None
    work: WorkFolder | None
    streams: dict[str, HiddenStates] = field(default_factory=dict)
    corrected: dict[int, Corrected] = field(default_factory=dict)

    def result(self, progress: CalibrationProgress) -> Repaired:
        """Go through the blocks that are not finished, then judge."""
        steps = self._steps()
        judged = None if self.work is None else self._resume(steps)
        done = 0 if self.work is None else min(self.work.finished, len(steps))
        progress.stage("repair", sum(self._tokens(*step) for step in steps[done:]))
        if judged is None:
            if done == 0:
                self.streams = {"whole": self.flow.start(self._windows("whole"))}
            for number in range(done, len(steps)):
                self._step(*steps[number])
                self._keep(number, steps[number][0])
            judged = self._judge()
            if self.work is not None:
                self.work.finish(len(steps), {name: np.array(value) for name, value in judged.items()})
        return Repaired(
            self.removed,
            {i: c.fold for i, c in self.corrected.items()},
            {i: c.ridge for i, c in self.corrected.items()},
            {i: c.left for i, c in self.corrected.items()},
            judged["loss_whole"], judged["loss_pruned"], judged["divergence_pruned"],
            judged.get("loss_repaired"), judged.get("divergence_repaired"),
        )  # fmt: skip

    def _steps(self) -> list[tuple[int, int]]:
        """Of each step the kept block, and the first block that is not removed behind it."""
        steps, index = [], 0
        while index < self.flow.blocks.n_layer:
            end = index + 1
            while end in self.removed:
                end += 1
            steps.append((index, end))
            index = end
        return steps

    def _windows(self, stream: str) -> Windows:
        """The batches that a stream has."""
        return self.flow.all if self.settings and stream != "plain" else self.flow.held_out

    def _tries(self, index: int, end: int) -> bool:
        """Whether a correction is looked for in a kept block that is behind the first removed run, or before one."""
        settings = self.settings
        return settings is not None and index not in settings.skip and (end > index + 1 or settings.behind)

    def _tokens(self, index: int, end: int) -> int:
        """Tokens that go through blocks in a step, all streams together."""
        share = {name: self.flow.count(self._windows(name)) for name in ("whole", "plain", "mended")}
        tokens = (end - index) * share["whole"]
        if self.removed and end > self.removed[0]:
            tokens += share["plain"] + (0 if self.settings is None else share["mended"])
        return tokens

    def _step(self, index: int, end: int) -> None:
        """Take all streams behind a kept block, and the whole model's behind the removed run that follows it."""
        stream, streams = self.flow, self.streams
        block = stream.blocks.block(index)
        if end > index + 1 and "plain" not in streams:
            for name in ("plain", "mended") if self.settings else ("plain",):
                streams[name] = stream.copy(streams["whole"], self._windows(name))
        if "plain" in streams:
            stream.through(block, streams["plain"], self._windows("plain"))
        stream.through(block, streams["whole"], self._windows("whole"))
        for gone in range(index + 1, end):
            del block  # one at a time
            block = stream.blocks.block(gone)
            stream.through(block, streams["whole"], self._windows("whole"))
        if "mended" in streams and self.settings is not None:
            if end > index + 1:
                del block
                block = stream.blocks.block(index)
            if self._tries(index, end):
                found = correct(stream, block, streams["mended"], streams["whole"], self.settings)
                if found is not None:
                    self.corrected[index] = found
            else:
                stream.through(block, streams["mended"], self._windows("mended"))

    def _judge(self) -> dict[str, float]:
        """Losses and divergences, by their names in `Repaired`."""
        stream, streams, held_out = self.flow, self.streams, self.flow.held_out
        judged = {"loss_whole": stream.loss(streams["whole"], held_out)}
        judged |= {"loss_pruned": judged["loss_whole"], "divergence_pruned": 0.0}
        for name, key in (("plain", "pruned"), ("mended", "repaired")):
            if name in streams:
                figures = stream.compare(streams[name], streams["whole"], held_out)
                judged[f"loss_{key}"], judged[f"divergence_{key}"] = figures
        stream.blocks.release_head()
        return judged

    def _keep(self, number: int, block: int) -> None:
        """Save what a step led to; all of it counts from the moment that the work folder notes the step."""
        if self.work is None:
            return
        for name, hidden in self.streams.items():
            hidden.copy_to(self.work.hidden_path(number + 1, name), self._windows(name))
        self.work.finish(number, self.corrected[block].pack() if block in self.corrected else {})

    def _resume(self, steps: list[tuple[int, int]]) -> dict[str, float] | None:
        """Read what is finished; what was judged, if that is."""
        work = self.work
        assert work is not None
        for number, (block, _) in enumerate(steps[: work.finished]):
            if arrays := work.block(number):
                self.corrected[block] = Corrected.unpack(arrays)
        if work.finished > len(steps):
            return {name: float(value) for name, value in work.block(len(steps)).items()}
        if work.finished:
            cut = bool(self.removed) and steps[work.finished - 1][1] > self.removed[0]
            for name in ("whole", "plain", "mended") if cut else ("whole",):
                if name != "mended" or self.settings is not None:
                    path = work.hidden_path(work.finished, name)
                    self.streams[name] = self.flow.resume(path, self._windows(name))
        return None
