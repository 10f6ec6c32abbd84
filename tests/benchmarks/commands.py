"""Runs the commands that benchmarks measure: llama.cpp's tools, `convert` and `ziggurat eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run(*command: object) -> str:
    """Run a command and return all it wrote; ends with its last lines when it fails."""
    done = subprocess.run([str(w) for w in command], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    text = (done.stdout + done.stderr).decode(errors="replace")
    if done.returncode:
        raise SystemExit(f"{command[0]} fails: {text[-800:]}")
    return text


def convert(model: Path, out: Path, *options: object) -> dict[str, Any]:
    """Convert with the `convert` command, over a file that may be there; its report."""
    report = out.with_suffix(".report.json")
    run(sys.executable, "-m", "ziggurat.converter", model, out, "--force", "--report", report, *options)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def evaluate(model: Path, text: Path, against: Path | None, threads: int, *options: object) -> dict[str, Any]:
    """What `ziggurat eval` finds on a text, against a reference if there is one."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        reference = [] if against is None else ["--against", against]
        words = ["eval", model, "--text", text, *reference, "--threads", threads, "--json", out.name, *options]
        run(sys.executable, "-m", "ziggurat.runtime", *words)
        found: dict[str, Any] = json.loads(Path(out.name).read_text())
    return found


def measure(*commands: list[str]) -> tuple[float, int]:
    """Wall seconds of the commands one after the other, and the largest peak memory of any of them, in bytes."""
    start, peak = time.perf_counter(), 0
    for command in commands:
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                errors.seek(0)
                raise SystemExit(f"{command[0]} fails: {errors.read().decode(errors='replace')[-500:]}")
        peak = max(peak, usage.ru_maxrss * 1024)
    return time.perf_counter() - start, peak
