"""`ziggurat eval --against` beside llama-perplexity of the same source tree: same model, reference, text and chunks.

Both compute perplexity and divergence; ours a second time against the base file that llama-perplexity wrote, which
takes its 16-bit rounding of the reference out of the comparison. The last line is JSON: figures and relative
differences. Accepted are 0.1 % in perplexity and 1 % in divergence; the exit status says whether that holds.

usage: python tests/benchmarks/eval_vs_llama_perplexity.py --llama-cpp TREE --model Q.gguf --reference F16.gguf
           --text FILE [--ctx 512] [--chunks 32] [--threads 2]
TREE is the vendored llama.cpp of the pinned source distribution, with build/bin/llama-perplexity built in it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from commands import run

PATTERNS = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "perplexity_se": r"Mean PPL\(Q\)\s*:\s*[\d.]+ ±\s*([\d.]+)",
    "reference_perplexity": r"Mean PPL\(base\)\s*:\s*([\d.]+)",
    "kl_divergence": r"Mean\s+KLD:\s*([-\d.]+)",
    "kl_divergence_se": r"Mean\s+KLD:\s*[-\d.]+ ±\s*([\d.]+)",
    "kl_p99": r"99\.0%\s+KLD:\s*([-\d.]+)",
    "kl_median": r"Median\s+KLD:\s*([-\d.]+)",
    "kl_max": r"Maximum KLD:\s*([-\d.]+)",
    "top1_agreement": r"Same top p:\s*([\d.]+)",
}
LIMITS = {"perplexity": 1e-3, "reference_perplexity": 1e-3, "kl_divergence": 1e-2}


def find(pattern: str, text: str) -> float:
    """The number a pattern finds in a tool's output; ends with the output's last lines when there is none."""
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"nothing like {pattern!r} in: {text[-800:]}")
    return float(match[1])


def theirs(options: argparse.Namespace, base: Path) -> dict[str, float]:
    """What llama-perplexity finds; the base file stays."""
    tool = options.llama_cpp / "build/bin/llama-perplexity"
    common = ["-c", options.ctx, "-t", options.threads, "--kl-divergence-base", base]
    alone = run(tool, "-m", options.reference, "-f", options.text, "--chunks", options.chunks, *common)
    text = run(tool, "-m", options.model, *common, "--kl-divergence")
    figures = {name: find(pattern, text) for name, pattern in PATTERNS.items()}
    figures["top1_agreement"] /= 100
    # what it prints beside the divergence is from 16 bits, cut off at 16 nats below the likeliest token
    figures["reference_perplexity_16_bits"] = figures["reference_perplexity"]
    figures["reference_perplexity"] = find(r"Final estimate: PPL = ([\d.]+)", alone)
    return figures


def ours(options: argparse.Namespace, reference: Path, report: Path) -> dict[str, Any]:
    """What `ziggurat eval` finds."""
    command = [sys.executable, "-m", "ziggurat.runtime", "eval", options.model, "--text", options.text]
    sizes = ["--ctx", options.ctx, "--chunks", options.chunks, "--threads", options.threads]
    run(*command, *sizes, "--against", reference, "--json", report)
    figures = json.loads(report.read_text())
    return {name: figures[name] for name in (*PATTERNS, "tokens", "chunks")}


def difference(mine: dict[str, Any], other: dict[str, float]) -> dict[str, float]:
    """Relative differences, ours against theirs."""
    return {name: mine[name] / other[name] - 1 if other[name] else mine[name] for name in PATTERNS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--llama-cpp", "--model", "--reference", "--text"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base.kld"
        upstream = theirs(options, base)
        direct = ours(options, options.reference, Path(name) / "direct.json")
        from_base = ours(options, base, Path(name) / "base.json")
    result = {
        "model": options.model.name,
        "reference": options.reference.name,
        "text": options.text.name,
        "n_ctx": options.ctx,
        "llama_perplexity": upstream,
        "ziggurat_eval": direct,
        "relative_difference": difference(direct, upstream),
        "relative_difference_same_base_file": difference(from_base, upstream),
    }
    result["accepted"] = all(abs(result["relative_difference"][name]) < limit for name, limit in LIMITS.items())
    for name in PATTERNS:
        value = upstream[name]
        print(f"{name:22} theirs {value:<12.6g} ours {direct[name]:<14.8g} {result['relative_difference'][name]:+.3%}")
    print(json.dumps(result))
    return 0 if result["accepted"] else 1


if __name__ == "__main__":
    sys.exit(main())
