"""Time and peak memory of the calibration pass, on a random model of the 1B shape and on one twice as deep.

Each runs in a process of its own, once with the hidden states in memory and once spilled to a file. The last line is
JSON.

usage: python tests/benchmarks/calibrate_memory.py [--tokens 4096] [--sequence 512] [--threads 1] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_model import SHAPES, write_model

CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np, psutil, torch, transformers
from ziggurat.converter.calibrate import CalibrateSettings, calibrate
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.report import peak_memory_bytes

folder, tokens, sequence, threads, share, work = json.loads(sys.argv[1])
torch.set_num_threads(threads)
ids = np.random.default_rng(0).integers(3, 32000, (tokens // sequence, sequence)).astype(np.int32)
start, libraries = time.perf_counter(), psutil.Process().memory_info().rss
settings = CalibrateSettings(threads=threads, memory_share=share, batch_tokens=sequence, work=Path(work))
result = calibrate(open_checkpoint(Path(folder)), CalibrationTokens(ids), settings)
print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak_memory_bytes(),
                  "libraries_bytes": libraries, "layers": len(result.influence)}))
"""


def measure(folder: Path, options: argparse.Namespace, *, share: float) -> dict[str, float]:
    """One pass in a process of its own: wall seconds, and its largest resident size in bytes."""
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        arguments = [str(folder), options.tokens, options.sequence, options.threads, share, work]
        command = [sys.executable, "-c", CHILD, json.dumps(arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise SystemExit(f"the pass fails: {process.stderr[-800:]}")
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    print(
        f"{folder.name}, share {share}: {result['seconds']:.1f} s, peak {result['peak_bytes'] / 1e6:.0f} MB", flush=True
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    hidden, layers = SHAPES["1b"][0], SHAPES["1b"][-1]
    rows, start = {}, time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        for depth in (layers, 2 * layers):
            folder = Path(name) / f"{depth}-layers"
            write_model(folder, "1b", layers=depth)
            rows[depth] = {
                "in_memory": measure(folder, options, share=0.25),
                "spilled": measure(folder, options, share=0.0),
            }
            (folder / "model.safetensors").unlink()
    growth = {how: rows[2 * layers][how]["peak_bytes"] / rows[layers][how]["peak_bytes"] for how in rows[layers]}
    result = {
        "benchmark": "calibrate_memory", "shape": "1b", "tokens": options.tokens, "sequence": options.sequence,
        "threads": options.threads, "hidden_states_bytes": 4 * options.tokens * hidden,
        "peak_growth_twice_as_deep": growth, "runs": {str(depth): row for depth, row in rows.items()},
        "benchmark_seconds": time.perf_counter() - start,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
