"""`convert` against llama.cpp's own chain on a tiny random model of each tested family, at one type and size.

A smoke test: that statistics, scales, compensation and the mix fit every family's layout. Random weights have no
outliers and no text to know, so gains are smaller than on trained models and say nothing about these. Both sides
calibrate on the same text; files may differ in size by some metadata. The last line is JSON: mean KL divergences from
the model in F32 on other text.

usage: python tests/benchmarks/quant_families.py --tools DIR --texts DIR [--type q4_k_m] [--families NAME ...]
           [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from commands import convert, evaluate, run
from llama_cpp_chain import Chain
from quant_quality import MIX, RECIPES, SEQUENCE, THEIRS, Bench, heading, measure
from texts import held_out_text

sys.path.insert(0, str(Path(__file__).parent.parent))

VARIANTS = (THEIRS, *RECIPES, MIX)
TOKENS, CALIBRATION_CHARACTERS = 4096, 100_000


def rows(bench: Bench, family: str, type_name: str) -> list[dict[str, Any]]:
    """Figures of all variants for one family."""
    from helpers.families import build

    folder = bench.folder
    build(family, folder / family)
    whole, half, logits = folder / f"{family}-f32.gguf", folder / f"{family}-bf16.gguf", bench.reference(family)
    convert(folder / family, whole, "--type", "f32")
    convert(folder / family, half, "--type", "bf16")
    evaluate(whole, folder / "held-out.txt", None, bench.threads, "--save-logits", logits)
    matrix = folder / f"{family}-imatrix.gguf"
    run(*bench.chain.imatrix(half, folder / "calibration.txt", matrix, SEQUENCE, TOKENS // SEQUENCE))
    return [{k: v for k, v in row.items() if not k.endswith("_by_chunk")} for row in measure(bench, family, type_name)]


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Divergences, in thousandths of a nat."""
    lines = heading(["family", *VARIANTS])
    for family, of_family in found.items():
        cells = (f"{1000 * row['kl_divergence']:.3f}" for row in of_family)
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    from helpers.families import FAMILIES

    causal = [name for name, family in FAMILIES.items() if family.causal]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--families", nargs="+", choices=causal, default=causal)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = held_out_text(options.texts, None)
        (folder / "calibration.txt").write_text(text[:CALIBRATION_CHARACTERS], encoding="utf-8")
        (folder / "held-out.txt").write_text(text[CALIBRATION_CHARACTERS:], encoding="utf-8")
        bench = Bench(Chain(options.tools, options.threads), folder, TOKENS, options.threads, False, VARIANTS)
        for family in options.families:
            found[family] = rows(bench, family, options.type)
            print(family, *(f"{row['variant']} {row['kl_divergence']:.6f}" for row in found[family]), flush=True)
    print(table(found))
    result = json.dumps({"benchmark": "quant_families", "type": options.type, "families": found})
    if options.json is not None:
        options.json.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
