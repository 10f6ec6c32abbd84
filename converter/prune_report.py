"""What removing blocks would cost: influence of every block, and perplexity by number of removed blocks."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from ziggurat.converter import hub, prune_families
from ziggurat.converter import prune as choice
from ziggurat.converter.calibrate import CalibrateSettings, CalibrationProgress, Silent
from ziggurat.converter.calibration_text import TextSettings
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.depth import Measuring
from ziggurat.converter.errors import LibraryError, OutputError, PruneError
from ziggurat.converter.write import partial_name, real

# Up to so many blocks, or a quarter of them all if that is more.
COUNTS = 4


@dataclass(frozen=True)
class Row:
    """The model without a number of blocks, on the held-out calibration tokens; divergences in nats per token."""

    count: int
    blocks: tuple[int, ...]
    perplexity_pruned: float
    perplexity_repaired: float | None
    divergence_pruned: float
    divergence_repaired: float | None
    repair_kept: bool


@dataclass(frozen=True)
class PruneReport:
    """What `convert MODEL --prune-report` tells."""

    model: str
    criterion: str
    calibration: str
    calibration_tokens: int
    influence: tuple[float, ...]
    """By block: one less the mean cosine between the hidden states before and behind it."""
    perplexity: float
    """Of the whole model, on the held-out calibration tokens."""
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def report(
    model: str | Path,
    by: choice.Criterion = "influence",
    *,
    repair: bool = True,
    most: int | None = None,
    text: TextSettings | None = None,
    settings: CalibrateSettings | None = None,
    progress: CalibrationProgress | None = None,
    ignore_code: bool = False,
) -> PruneReport:
    """Measure the model without 1, 2, … blocks. Writes nothing.

    Args:
        model: a local folder or a hub id.
        by: the criterion that chooses the blocks.
        repair: whether each cut is measured with repair too.
        most: the largest number of blocks; default: four, or a quarter of them all.
        text: the calibration text; default: the built-in one.
        settings: device, batch and memory.
        progress: who is told.
        ignore_code: accept a checkpoint that brings its own code, which is not run.

    Raises:
        ConvertError: the model, the text or the numbers will not do.
    """
    checkpoint = open_checkpoint(hub.resolve(model), ignore_code=ignore_code)
    prune_families.check_prunable(checkpoint)
    if repair:
        prune_families.check_repairable(checkpoint)
    settings = dataclasses.replace(settings or CalibrateSettings(), work=None)  # a work folder is for one repair
    measuring = Measuring(checkpoint, text or TextSettings(), settings, progress or Silent())
    influence = measuring.calibration.influence
    allowed = len(choice.removable(len(influence)))
    if most is None:
        most = min(max(COUNTS, len(influence) // 4), allowed)
    if not 1 <= most <= allowed:
        raise PruneError(f"{most} of {len(influence)} blocks cannot be removed: {max(allowed, 0)} at most can go")
    rows: list[Row] = []
    whole, blocks = float("nan"), tuple[int, ...]()
    for count in range(1, most + 1):
        blocks = measuring.choose(by, count, blocks if by == "perplexity" else ())
        cut = measuring.cut(blocks, repair=repair)
        whole = cut.loss_whole
        repaired = None if cut.loss_repaired is None else perplexity(cut.loss_repaired)
        rows.append(
            Row(
                count, blocks, perplexity(cut.loss_pruned), repaired, cut.divergence_pruned, cut.divergence_repaired,
                cut.helps,
            )
        )  # fmt: skip
    return PruneReport(
        str(model), by, measuring.tokens.source, measuring.tokens.ids.size, tuple(float(x) for x in influence),
        perplexity(whole), tuple(rows),
    )  # fmt: skip


def perplexity(loss: float) -> float:
    """Perplexity of a mean loss in nats; infinite where it is beyond floats or no number."""
    try:
        return math.exp(loss) if math.isfinite(loss) else math.inf
    except OverflowError:
        return math.inf


def check_plot() -> None:
    """Make sure that matplotlib is there, before hours of work.

    Raises:
        LibraryError: it is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise LibraryError("pictures need matplotlib: `pip install 'ziggurat[plot]'`, or leave --plot out") from e


def plot(found: PruneReport, path: Path) -> None:
    """Draw influence by block and perplexity by number of removed blocks; the ending of `path` gives the format.

    Raises:
        LibraryError: matplotlib is not installed.
        OutputError: the place cannot be written, or the format is not known.
    """
    check_plot()
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(len(found.influence)), found.influence, color="#4477aa")
    left.set(xlabel="block", ylabel="block influence", xticks=range(0, len(found.influence), _step(found)))
    counts = [0, *(row.count for row in found.rows)]
    right.plot(counts, [found.perplexity, *(row.perplexity_pruned for row in found.rows)], "o-", label="no repair")
    repaired = [row.perplexity_repaired for row in found.rows]
    if all(value is not None for value in repaired):
        right.plot(counts, [found.perplexity, *repaired], "s-", label="repaired")
    right.set(xlabel=f"blocks removed (by {found.criterion})", ylabel="perplexity", yscale="log", xticks=counts)
    for axis_ticks in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        axis_ticks(ScalarFormatter())
    right.legend()
    partial = partial_name(path)
    try:
        figure.savefig(partial, dpi=120, format=path.suffix.removeprefix(".") or "png")
        partial.replace(real(path))
    except ValueError as e:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path}: pictures of this kind cannot be drawn ({e}): name a .png file") from e
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written ({e.strerror or e}): choose another place") from e


def _step(found: PruneReport) -> int:
    return max(1, len(found.influence) // 16)
