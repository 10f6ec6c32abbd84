"""`convert` with AWQ and importance matrix against llama.cpp's own chain that ends in the like, interleaved.

The chain is convert_hf_to_gguf.py, llama-imatrix and llama-quantize --imatrix; all sides calibrate on as many tokens
of the same text. `convert` runs with its defaults, and without compensating errors, which the chain has nothing like.
Wall time, and peak memory of whole processes (the largest of the chain's three), on a random model of the 1B shape. The
last line is JSON.

usage: python tests/benchmarks/quant_speed.py --llama-cpp TREE --tools DIR [--rounds 3] [--type q4_k_m] [--tokens 8192]
           [--outtype bf16] [--layers N] [--work FOLDER] [--json FILE]
TREE is the vendored llama.cpp of the pinned source distribution, DIR holds llama-imatrix and llama-quantize built from
it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from commands import measure
from llama_cpp_chain import Chain
from random_model import write_model

SEQUENCE = 512
DEFAULT, SCALES, CHAIN = "convert", "convert --no-compensation", "chain"
TEXT = "the quick brown fox jumps over the lazy dog, a model of random weights says nothing at all.\n"


def sides(options: argparse.Namespace, work: Path, threads: int) -> dict[str, list[list[str]]]:
    """The commands of both."""
    chunks, model, text = options.tokens // SEQUENCE, work / "model", work / "text.txt"
    text.write_text(TEXT * (options.tokens // 8), encoding="utf-8")
    chain, whole, matrix = Chain(options.tools, threads), work / "whole.gguf", work / "imatrix.gguf"
    ours = [sys.executable, "-m", "ziggurat.converter", model, work / "ours.gguf", "--force", "--type", options.type,
            "--calibration", text, "--calibration-tokens", chunks * SEQUENCE, "--calibration-sequence", SEQUENCE,
            "--threads", threads]  # fmt: skip
    theirs = [
        chain.convert(options.llama_cpp, model, whole, options.outtype),
        chain.imatrix(whole, text, matrix, SEQUENCE, chunks),
        chain.quantize(whole, work / "theirs.gguf", options.type, matrix),
    ]
    whole_convert = [str(word) for word in ours]
    return {DEFAULT: [whole_convert], SCALES: [[*whole_convert, "--no-compensation"]], CHAIN: theirs}


def summary(rows: list[dict[str, tuple[float, int]]]) -> dict[str, Any]:
    """Medians and extremes of the pairs."""
    found = {}
    for side in rows[0]:
        ratios = [row[side][0] / row[CHAIN][0] for row in rows]
        found[side] = {
            "seconds": statistics.median(row[side][0] for row in rows), "peak_bytes": max(row[side][1] for row in rows),
            "ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        }  # fmt: skip
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--outtype", choices=("bf16", "f16"), default="bf16")
    parser.add_argument("--layers", type=int, help="another depth than the shape's 16, for a quick look")
    parser.add_argument("--sides", nargs="+", choices=(DEFAULT, SCALES), default=[DEFAULT, SCALES])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    threads, rows = len(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        write_model(work / "model", "1b", options.layers)
        commands = {side: c for side, c in sides(options, work, threads).items() if side in (*options.sides, CHAIN)}
        for i in range(options.rounds):
            order = list(commands) if i % 2 == 0 else list(reversed(commands))
            rows.append({side: measure(*commands[side]) for side in order})
            for side in commands:
                seconds, peak = rows[-1][side]
                print(f"round {i + 1}, {side}: {seconds:.1f} s, {peak / 1e9:.2f} GB", flush=True)
    result = {
        "benchmark": "quant_speed", "type": options.type, "outtype": options.outtype, "tokens": options.tokens,
        "layers": options.layers, "threads": threads, "rounds": options.rounds, "sides": summary(rows),
    }  # fmt: skip
    text = json.dumps(result)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
