"""Time and peak memory of a conversion that removes blocks and repairs, on a random model of the 1B shape.

Blocks are chosen by influence; the conversion runs in a process of its own. The last line is JSON, with the time of
each stage and what a token and a corrected block take. From these, and from the floating point operations of both
shapes, it projects a 70B: a projection, not a measurement.

usage: python tests/benchmarks/prune_cost.py [--tokens 4096] [--prune 2] [--threads 2] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from random_model import SHAPES, write_model

LLAMA_70B = (8192, 28672, 64, 8, 128256, 80)

CHILD = """
import json, sys, time
from pathlib import Path
from ziggurat.converter.calibration_text import TextSettings
from ziggurat.converter.pipeline import ConvertSettings, convert
from ziggurat.converter.prune import PruneSettings

folder, out, tokens, count, threads = json.loads(sys.argv[1])
began, stages = time.perf_counter(), []

class Clock:
    def stage(self, name, total):
        stages.append([name, total, time.perf_counter() - began])
        print(name, total, file=sys.stderr, flush=True)
    def step(self, count, what): ...
    def planned(self, estimate): self.stage("write", 0)
    def advance(self, parameters, tensor): ...

settings = ConvertSettings(prune=PruneSettings(count=count), threads=threads, calibration=TextSettings(tokens=tokens),
                           awq=False, gather_imatrix=False)
report = convert(folder, out, settings, Clock())
ends = [start for _, _, start in stages[1:]] + [time.perf_counter() - began]
print(json.dumps({
    "seconds": report.seconds, "peak_bytes": report.peak_memory_bytes, "corrected": len(report.prune.repair.blocks),
    "stages": [{"name": name, "tokens_through_blocks": total, "seconds": end - start}
               for (name, total, start), end in zip(stages, ends)],
}))
"""


def operations(shape: tuple[int, ...], tokens: int, *, outputs: bool) -> tuple[float, float]:
    """Floating point operations of a token's way through one block, and of one correction (sums, three ridges).

    `outputs`: the correction is regressed on what the down projection gives, as where the MLP is very wide.
    """
    hidden, ffn, heads, kv_heads = shape[:4]
    head = hidden // heads
    block = 2.0 * hidden * (2 * heads * head + 2 * kv_heads * head + 3 * ffn)
    width = hidden if outputs else ffn
    return block, 2.0 * tokens * width * (width + hidden) + 3 * (width**3 / 3 + 4.0 * width**2 * hidden)


def project(measured: dict[str, Any], tokens: int) -> dict[str, float]:
    """Hours of a Llama-3-70B's stages on as many tokens, with the same share of its blocks, by their operations."""
    (block, solve), (block_70b, solve_70b) = (
        operations(SHAPES["1b"], tokens, outputs=False), operations(LLAMA_70B, tokens, outputs=True)
    )  # fmt: skip
    stages = {stage["name"]: stage for stage in measured["stages"]}
    deeper = LLAMA_70B[-1] / SHAPES["1b"][-1]
    calibration, repair = stages["calibration"], stages["repair"]
    token = calibration["seconds"] / calibration["tokens_through_blocks"]
    forward = token * repair["tokens_through_blocks"]
    return {
        "seconds_per_correction_measured": (repair["seconds"] - forward) / measured["corrected"],
        "calibration_hours": calibration["seconds"] * deeper * block_70b / block / 3600,
        "repair_hours": deeper
        * (forward * block_70b / block + (repair["seconds"] - forward) * solve_70b / solve)
        / 3600,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prune", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name) / "1b"
        write_model(folder, "1b")
        arguments = [str(folder), str(Path(name) / "out.gguf"), options.tokens, options.prune, options.threads]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        child = [sys.executable, "-c", CHILD, json.dumps(arguments)]
        done = subprocess.run(child, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit("the conversion fails")
    measured = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({
        "benchmark": "prune_cost", "shape": "1b", "tokens": options.tokens, "removed": options.prune,
        "threads": options.threads, **measured, "projected_70b": project(measured, options.tokens),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
