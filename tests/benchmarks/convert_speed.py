"""`convert` against llama.cpp's own chain (convert_hf_to_gguf.py --outtype f16, then llama-quantize), interleaved.

Time and peak memory of whole processes, on a random model of the 1B shape; the memory of `convert` also on one twice
as deep. The last line is JSON.

usage: python tests/benchmarks/convert_speed.py --llama-cpp TREE [--pairs 3] [--type q4_k_m] [--work FOLDER]
TREE is the vendored llama.cpp of the pinned source distribution, with build/bin/llama-quantize built in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from commands import measure
from random_model import write_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    tree, threads = options.llama_cpp, len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        write_model(work / "model", "1b")
        ours = [sys.executable, "-m", "ziggurat.converter", str(work / "model"), str(work / "ours.gguf"), "--force",
                "--type", options.type, "--threads", str(threads), "--no-awq", "--no-imatrix"]  # fmt: skip
        theirs = (
            [sys.executable, str(tree / "convert_hf_to_gguf.py"), str(work / "model"), "--outtype", "f16", "--outfile",
             str(work / "f16.gguf")],
            [str(tree / "build/bin/llama-quantize"), str(work / "f16.gguf"), str(work / "theirs.gguf"), options.type,
             str(threads)],
        )  # fmt: skip
        rows = []
        for i in range(options.pairs):
            order = [("ours", [ours]), ("theirs", list(theirs))]
            row = {side: measure(*commands) for side, commands in (order if i % 2 == 0 else reversed(order))}
            rows.append(row)
            print(f"pair {i + 1}: convert {row['ours'][0]:.1f} s, chain {row['theirs'][0]:.1f} s", flush=True)
        for path in (work / "f16.gguf", work / "theirs.gguf", work / "ours.gguf"):
            path.unlink()
        write_model(work / "deep", "1b", layers=32)
        deep = [str(work / "deep") if part == str(work / "model") else part for part in ours]
        _, deep_peak = measure(deep)
        ratios = [row["ours"][0] / row["theirs"][0] for row in rows]
        result = {
            "benchmark": "convert_speed", "type": options.type, "threads": threads, "pairs": options.pairs,
            "ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            "convert_seconds": statistics.median(row["ours"][0] for row in rows),
            "chain_seconds": statistics.median(row["theirs"][0] for row in rows),
            "convert_peak_bytes": max(row["ours"][1] for row in rows),
            "chain_peak_bytes": max(row["theirs"][1] for row in rows),
            "convert_peak_bytes_twice_as_deep": deep_peak,
        }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
