"""The reference model without 1 to 4 blocks, by every criterion, with and without repair: quality by `ziggurat eval`.

Each cut model is converted to bf16 and compared with the whole one: perplexity and mean KL divergence on held-out text,
share of hidden facts found in documents of 512 tokens. Beside it, on the calibration's own held-out tokens, what the
parts of the repair bring. Calibrated on parts of the texts that the model was trained on and on chats that ask for
facts; evaluated on other texts and other facts.

usage: python tests/benchmarks/prune_quality.py --texts DIR [--json FILE] [--plot FILE.png] [--trials 8] [--threads 1]
DIR holds the texts of tests/reference_model/README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import commands
from texts import MODEL, write_texts

COUNTS = (1, 2, 3, 4)
ABLATED = 3  # blocks removed where single corrections are left out to see what they do
VARIANTS = {
    "ReplaceMe": {"inputs": False, "behind": False, "weighted": False},
    "+ weighted tokens": {"inputs": False, "behind": False},
    "+ inputs of the projection": {"behind": False},
    "+ blocks behind": {},
}


def evaluate(model: Path, reference: Path, text: Path, options: argparse.Namespace) -> dict[str, float]:
    """What `ziggurat eval` finds."""
    needle = ["--needle", "--needle-lengths", 512, "--needle-trials", options.trials]
    found = commands.evaluate(model, text, reference, options.threads, *needle)
    return {name: found[name] for name in ("perplexity", "kl_divergence", "top1_agreement")} | {
        "retrieval": found["needle"]["accuracy"]
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    from ziggurat.converter.blocks import Blocks
    from ziggurat.converter.calibrate import CalibrateSettings, Silent
    from ziggurat.converter.calibration_text import TextSettings
    from ziggurat.converter.checkpoint import open_checkpoint
    from ziggurat.converter.correction import RepairSettings
    from ziggurat.converter.depth import Measuring
    from ziggurat.converter.pipeline import ConvertSettings, convert
    from ziggurat.converter.prune import CRITERIA, PruneSettings, runs
    from ziggurat.converter.repair_pass import cut

    calibration, text = write_texts(options.texts, folder, facts=not options.no_facts)
    settings, source = CalibrateSettings(threads=options.threads), TextSettings(calibration)
    measuring = Measuring(open_checkpoint(MODEL), source, settings, Silent())
    whole = folder / "whole.gguf"
    convert(MODEL, whole, ConvertSettings(type="bf16", threads=options.threads))
    none = evaluate(whole, whole, text, options)
    print(f"whole: {none}", flush=True)

    def without(prune: PruneSettings) -> dict[str, float]:
        out = folder / "cut.gguf"
        how = ConvertSettings(type="bf16", threads=options.threads, prune=prune, calibration=source, force=True)
        record = convert(MODEL, out, how).prune
        assert record is not None
        figures = evaluate(out, whole, text, options)
        print(f"{prune.blocks}, {record.repair.method} of {record.repair.blocks}: {figures}", flush=True)
        return figures

    done: dict[tuple[tuple[int, ...], bool], dict[str, float]] = {}
    rows = []
    for criterion in CRITERIA:
        blocks: tuple[int, ...] = ()
        for count in COUNTS:
            blocks = measuring.choose(criterion, count, blocks if criterion == "perplexity" else ())
            for repair in (False, True):
                key = blocks, repair
                if key not in done:
                    done[key] = without(PruneSettings(blocks=blocks, repair=repair))
                rows.append({"criterion": criterion, "count": count, "blocks": blocks, "repair": repair, **done[key]})
    variants = []
    for count in COUNTS:
        blocks = measuring.choose("influence", count)
        row: dict[str, Any] = {"count": count, "blocks": blocks}
        for name, parts in VARIANTS.items():
            found = cut(Blocks(measuring.checkpoint), measuring.tokens, blocks, settings, RepairSettings(**parts))
            row["no repair"], row[name] = found.divergence_pruned, found.divergence_repaired
        variants.append(row)
    blocks = measuring.choose("influence", ABLATED)
    left_out = [
        {"count": ABLATED, "blocks": blocks, "uncorrected": before,
         **without(PruneSettings(blocks=blocks, uncorrected=(before,)))}
        for before in (first - 1 for first, _ in runs(blocks))
    ]  # fmt: skip
    return {"whole": none, "rows": rows, "held_out_divergence": variants, "one_correction_less": left_out}


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| removed | by | blocks | perplexity | repaired | KLD | repaired | retrieval | repaired |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| 0 | | | {found['whole']['perplexity']:.2f} | | 0 | | {found['whole']['retrieval']:.0%} | |",
    ]
    pairs = zip(found["rows"][::2], found["rows"][1::2], strict=True)
    for plain, mended in sorted(pairs, key=lambda pair: pair[0]["count"]):
        blocks = ", ".join(map(str, plain["blocks"]))
        lines.append(
            f"| {plain['count']} | {plain['criterion']} | {blocks} | {plain['perplexity']:.2f} | "
            f"{mended['perplexity']:.2f} | {plain['kl_divergence']:.3f} | {mended['kl_divergence']:.3f} | "
            f"{plain['retrieval']:.0%} | {mended['retrieval']:.0%} |"
        )
    names = ["no repair", *VARIANTS]
    lines += ["", f"| removed | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for row in found["held_out_divergence"]:
        lines.append(f"| {row['count']} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")
    for row in found["one_correction_less"]:
        blocks = ", ".join(map(str, row["blocks"]))
        figures = (
            f"perplexity {row['perplexity']:.2f}, KLD {row['kl_divergence']:.3f}, retrieval {row['retrieval']:.0%}"
        )
        lines += ["", f"Without blocks {blocks}, repaired but for block {row['uncorrected']}: {figures}"]
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Perplexity, divergence and retrieval by number of removed blocks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    colours = {"influence": "#4477aa", "angular": "#228833", "perplexity": "#cc6677"}
    panels = (("perplexity", "perplexity"), ("kl_divergence", "mean KLD (nats)"), ("retrieval", "facts found"))
    for axes, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for criterion, colour in colours.items():
            for repair in (False, True):
                rows = [r for r in found["rows"] if r["criterion"] == criterion and r["repair"] == repair]
                start = 0.0 if key == "kl_divergence" else found["whole"][key]
                values = [start, *(r[key] for r in rows)]
                name = f"{criterion}, repaired" if repair else criterion
                axes.plot([0, *COUNTS], values, "o-" if repair else "o--", color=colour, label=name, markersize=4)
        axes.set(xlabel="blocks removed of 8", ylabel=label, xticks=[0, *COUNTS])
        if key == "perplexity":
            axes.set_yscale("log")
            axes.set_yticks([30, 50, 100, 200], ["30", "50", "100", "200"], minor=False)
            axes.set_yticks([], minor=True)
            axes.legend(fontsize=7, handlelength=3.5)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--no-facts", action="store_true", help="calibrate on the texts alone, without chats")
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
