"""What the commands say about removed blocks, and `convert MODEL --prune-report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ziggurat.converter.display import Display
from ziggurat.converter.errors import PruneError
from ziggurat.converter.prune import parse_amount, prune_settings
from ziggurat.converter.prune_record import PruneRecord

if TYPE_CHECKING:
    from ziggurat.converter.calibration_text import TextSettings
    from ziggurat.converter.prune_report import PruneReport


@dataclass(frozen=True)
class ReportOptions:
    """The command's options that a report looks at."""

    model: str
    amount: str | None
    by: str | None
    repair: bool
    text: TextSettings
    device: str
    threads: int | None
    ignore_code: bool
    json: Path | None
    plot: Path | None


def show_prune_report(console: Console, options: ReportOptions) -> None:
    """Measure, print a table, and write what else is wanted.

    Raises:
        ConvertError: the model, the text, the numbers or the places will not do.
    """
    from ziggurat.converter import prune_report
    from ziggurat.converter.calibrate import CalibrateSettings
    from ziggurat.converter.report import write_json
    from ziggurat.converter.write import check_target

    most, percent = (None, None) if options.amount is None else parse_amount(options.amount)
    if percent is not None:
        raise PruneError("--prune-report tries 1, 2, … blocks: give --prune as the largest number of them")
    settings = prune_settings(options.amount or "1", None, options.by, repair=options.repair)
    assert settings is not None
    for path in (options.json, options.plot):
        if path is not None:
            check_target(path, force=True, special=path == options.json)
    if options.plot is not None:
        prune_report.check_plot()
    with Display(console) as display:
        found = prune_report.report(
            options.model, settings.by, repair=options.repair, most=most, text=options.text,
            settings=CalibrateSettings(device=options.device, threads=options.threads), progress=display,
            ignore_code=options.ignore_code,
        )  # fmt: skip
    _print(Console(highlight=False), found)
    if options.json is not None:
        write_json(options.json, found.to_json())
    if options.plot is not None:
        prune_report.plot(found, options.plot)


def _print(console: Console, found: PruneReport) -> None:
    blocks = Table("block", "influence", box=None, pad_edge=False, header_style="bold")
    for index, influence in enumerate(found.influence):
        blocks.add_row(str(index), f"{influence:.4f}")
    console.print(blocks)
    costs = Table(box=None, pad_edge=False, header_style="bold", title=f"Blocks removed by {found.criterion}")
    for heading in ("removed", "blocks", "perplexity", "repaired", "divergence", "repaired"):
        costs.add_column(heading, justify="left" if heading == "blocks" else "right")
    costs.add_row("0", "", f"{found.perplexity:.3f}", "", "0", "")
    for row in found.rows:
        repaired = ("-", "-")
        if row.perplexity_repaired is not None and row.divergence_repaired is not None:
            kept = "" if row.repair_kept else " (dropped)"
            repaired = f"{row.perplexity_repaired:.3f}", f"{row.divergence_repaired:.4f}{kept}"
        costs.add_row(
            str(row.count), ", ".join(map(str, row.blocks)), f"{row.perplexity_pruned:.3f}", repaired[0],
            f"{row.divergence_pruned:.4f}", repaired[1],
        )  # fmt: skip
    console.print(costs)
    console.print(f"on held-out parts of {found.calibration_tokens} tokens of {found.calibration}; divergence in nats")


def removed_text(record: PruneRecord) -> str:
    """One line about what was removed and repaired."""
    text = f"removed {len(record.blocks)} of {record.n_layer} blocks ({', '.join(map(str, record.blocks))})"
    text += " as listed" if record.criterion == "list" else f" by {record.criterion}"
    repair = record.repair
    if repair.divergence_repaired is None:
        return f"{text}; no repair: {repair.reason}"
    figures = f"held-out divergence {repair.divergence_pruned:.4f} without, {repair.divergence_repaired:.4f} with it"
    if repair.reason is not None:
        return f"{text}; no repair: {repair.reason} ({figures})"
    return f"{text}; repaired in blocks {', '.join(map(str, repair.blocks))}: {figures}"
