"""What each step of one conversion costs: `convert MODEL OUT.gguf --prune 1 --type q4_k_m`, taken apart.

The steps are added one by one, each file made by `convert` and compared with the whole model in F32 by `ziggurat eval`:
perplexity, mean KL divergence and facts found in documents of 512 tokens. The last line is JSON.

usage: python tests/benchmarks/convert_steps.py --texts DIR [--model FOLDER] [--prune 1] [--type q4_k_m] [--trials 25]
           [--threads 1] [--json FILE]
DIR holds the texts of tests/reference_model/README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from commands import convert, evaluate
from quant_quality import heading
from texts import MODEL, write_texts


def steps(options: argparse.Namespace) -> dict[str, tuple[object, ...]]:
    """Options of `convert` by what is new in them."""
    cut, small = ("--prune", options.prune), ("--type", options.type)
    return {
        "whole, F32": ("--type", "f32"),
        f"{options.prune} block removed": (*cut, "--no-repair", "--type", "f32"),
        "repaired": (*cut, "--type", "f32"),
        f"{options.type}, plain": (*cut, *small, "--no-awq", "--no-imatrix"),
        "with importance matrix": (*cut, *small, "--no-awq"),
        "with scales": (*cut, *small, "--no-compensation"),
        "with compensation: the command": (*cut, *small),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prune", type=int, default=1)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    needle = ("--needle", "--needle-lengths", 512, "--needle-trials", options.trials)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        calibration, text = write_texts(options.texts, folder, facts=True)
        whole = folder / "whole.gguf"
        for name, how in steps(options).items():
            out = folder / "step.gguf" if rows else whole
            convert(options.model, out, "--calibration", calibration, "--threads", options.threads, *how)
            found = evaluate(out, text, whole, options.threads, *needle)
            figures = {key: found[key] for key in ("perplexity", "kl_divergence", "top1_agreement")}
            rows.append(
                {"step": name, "bytes": out.stat().st_size, **figures, "retrieval": found["needle"]["accuracy"]}
            )
            print(rows[-1], flush=True)
    lines = heading(["step", "MB", "perplexity", "KLD", "same top", "facts found"])
    for row in rows:
        lines.append(
            f"| {row['step']} | {row['bytes'] / 1e6:.2f} | {row['perplexity']:.2f} | {row['kl_divergence']:.4f} | "
            f"{row['top1_agreement']:.1%} | {row['retrieval']:.0%} |"
        )
    print("\n".join(lines))
    result = json.dumps({"benchmark": "convert_steps", "prune": options.prune, "type": options.type, "rows": rows})
    if options.json is not None:
        options.json.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
