"""`convert` against llama.cpp's own chain at the same type: what quantization costs, on text held out from calibration.

For the reference model and its outlier twin (tests/models/outliers.py), at each type: llama-imatrix and llama-quantize,
and `convert` plain, with the importance matrix, with AWQ's scales, with both, with errors compensated too (its
default), and with types mixed under the size of llama.cpp's file; also llama-quantize with the matrix that `convert`
exports, which has more than llama-imatrix's.
All are calibrated on the same token sequences; that both programs cut them out of their text files is verified.

Compared with the model in F32 by `ziggurat eval`: perplexity, mean KL divergence, share of tokens whose likeliest
successor stays. Differences of divergence to llama.cpp's file are taken chunk by chunk: the standard error is that of
their mean. With --weights also the divergence of the weights alone, of files turned back to F32: llama.cpp's CPU
kernels round the activations that meet a quantized matrix to 8 bits, 32 or 256 of them to one scale.

The starting file of the chain is `convert --type bf16`, whose tensors are those of convert_hf_to_gguf.py
(tests/converter/test_identity.py); that script does not know the reference model's vocabulary. The last line is JSON.

usage: python tests/benchmarks/quant_quality.py --tools DIR --texts DIR [--json FILE] [--plot FILE.png] [--weights]
           [--types q4_0 ...] [--variants plain ...] [--models reference twin] [--tokens 16384] [--threads 1]
DIR of --tools holds llama-imatrix and llama-quantize, built from the pinned source distribution; DIR of --texts the
texts of tests/reference_model/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import convert, evaluate, run
from llama_cpp_chain import Chain, dequantize
from texts import MODEL, calibration_pieces, held_out_text

TYPES = ("q4_0", "q4_k_s", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
SEQUENCE, OUTLIER_SHARE = 512, 0.03
THEIRS, THEIRS_OUR_MATRIX, DEFAULT, MIX = "llama.cpp", "llama.cpp, our matrix", "+ compensation", "mix"
RECIPES: dict[str, tuple[str, ...]] = {
    "plain": ("--no-awq", "--no-imatrix"),
    "imatrix": ("--no-awq",),
    "AWQ": ("--no-imatrix", "--no-compensation"),
    "AWQ + imatrix": ("--no-compensation",),
    DEFAULT: (),
}
VARIANTS = (THEIRS, THEIRS_OUR_MATRIX, *RECIPES, MIX)
MODELS = {"reference": "the reference model", "twin": "its outlier twin"}


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    chain: Chain
    folder: Path
    tokens: int
    threads: int
    weights: bool
    variants: tuple[str, ...]

    @property
    def calibration(self) -> tuple[object, ...]:
        """Options of `convert`."""
        text = self.folder / "calibration.txt"
        return ("--calibration", text, "--calibration-tokens", self.tokens, "--calibration-sequence", SEQUENCE,
                "--threads", self.threads)  # fmt: skip

    def reference(self, model: str) -> Path:
        """Log-probabilities of the model in F32."""
        return self.folder / f"{model}.logits"

    def quality(self, model: str, file: Path) -> dict[str, Any]:
        """Figures of a quantized file."""
        found = evaluate(file, self.folder / "held-out.txt", self.reference(model), self.threads)
        keys = ("perplexity", "perplexity_se", "kl_divergence", "kl_divergence_se", "kl_p99", "top1_agreement",
                "top1_agreement_se", "kl_by_chunk")  # fmt: skip
        row = {"bytes": file.stat().st_size, **{key: found[key] for key in keys}}
        if self.weights:
            whole = self.folder / "dequantized.gguf"
            dequantize(self.chain, file, whole)
            exact = evaluate(whole, self.folder / "held-out.txt", self.reference(model), self.threads)
            row |= {"weights_kl_divergence": exact["kl_divergence"], "weights_kl_by_chunk": exact["kl_by_chunk"]}
        return row


def prepare(options: argparse.Namespace, folder: Path) -> Bench:
    """Texts, models, references and llama-imatrix's matrices."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    pieces = calibration_pieces(options.texts, tokenizer, options.tokens, SEQUENCE - 1)
    (folder / "calibration.txt").write_text("".join(pieces), encoding="utf-8")
    # there llama-imatrix puts BOS over a token at the start of each chunk: it may as well have been one
    (folder / "marked.txt").write_text("<|begin_of_text|>".join(pieces), encoding="utf-8")
    (folder / "held-out.txt").write_text(held_out_text(options.texts, None), encoding="utf-8")
    chain = Chain(options.tools, options.threads)
    bench = Bench(chain, folder, len(pieces) * SEQUENCE, options.threads, options.weights, tuple(options.variants))
    (folder / "reference").symlink_to(MODEL)
    script = MODEL.parent / "models" / "outliers.py"
    run(sys.executable, script, MODEL, folder / "twin", "--share", OUTLIER_SHARE)
    for model in options.models:
        whole, half = folder / f"{model}-f32.gguf", folder / f"{model}-bf16.gguf"
        convert(folder / model, whole, "--type", "f32")
        convert(folder / model, half, "--type", "bf16")
        check_same_tokens(whole, folder)
        logits = bench.reference(model)
        evaluate(whole, folder / "held-out.txt", None, options.threads, "--save-logits", logits)
        run(*chain.imatrix(half, folder / "marked.txt", folder / f"{model}-imatrix.gguf", SEQUENCE))
    return bench


def check_same_tokens(model: Path, folder: Path) -> None:
    """End unless both programs read the same sequences."""
    from ziggurat.converter.calibration_text import TextSettings, read_tokens
    from ziggurat.converter.checkpoint import open_checkpoint
    from ziggurat.runtime.bindings import Model

    text = (folder / "marked.txt").read_text(encoding="utf-8")
    with Model(model) as loaded:
        theirs = loaded.vocab.tokenize(text, add_special=True, parse_special=True)
    settings = TextSettings(folder / "calibration.txt", len(theirs), SEQUENCE)
    if read_tokens(open_checkpoint(MODEL), settings).ids.reshape(-1).tolist() != list(theirs):
        raise SystemExit("llama.cpp and convert cut other sequences out of the calibration text: choose another one")


def measure(bench: Bench, model: str, type_name: str) -> Iterator[dict[str, Any]]:
    """Rows of all variants at a type, llama.cpp's first."""
    out = bench.folder / "quantized.gguf"
    theirs: dict[str, Any] = {}
    for name in (THEIRS, *(name for name in bench.variants if name != THEIRS)):
        make(bench, model, type_name, name, out, theirs.get("bytes", 0))
        found = bench.quality(model, out)
        row = {"model": model, "type": type_name, "variant": name, **found}
        theirs = theirs or row
        for kind in ("kl", "weights_kl") if bench.weights else ("kl",):
            by_chunk = f"{kind}_by_chunk"
            row[f"{kind}_less"], row[f"{kind}_less_se"] = paired(theirs[by_chunk], row[by_chunk])
        yield row


def make(bench: Bench, model: str, type_name: str, variant: str, out: Path, size: int) -> None:
    """Write the file of a variant; `size` is that of llama.cpp's, in bytes."""
    folder, exported = bench.folder, bench.folder / f"{model}-exported.gguf"
    if variant in (THEIRS, THEIRS_OUR_MATRIX):
        if variant == THEIRS_OUR_MATRIX and not exported.exists():
            convert(folder / model, out, *bench.calibration, "--no-awq", "--export-imatrix", exported)
        matrix = folder / f"{model}-imatrix.gguf" if variant == THEIRS else exported
        run(*bench.chain.quantize(folder / f"{model}-bf16.gguf", out, type_name, matrix))
        return
    how = ("--size", size) if variant == MIX else ("--type", type_name, *RECIPES[variant])
    convert(folder / model, out, *bench.calibration, *how)


def paired(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """How much less ours is, and the standard error of that."""
    less = [a - b for a, b in zip(theirs, ours, strict=True)]
    return statistics.mean(less), statistics.stdev(less) / math.sqrt(len(less))


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["model"] == model:
                found.setdefault(row["type"], {})[row["variant"]] = row
        lines += [f"KLD, {MODELS[model]}:", "", *divergences(found, "kl"), ""]
        if "weights_kl_divergence" in rows[0]:
            lines += [f"KLD of the weights alone, {MODELS[model]}:", "", *divergences(found, "weights_kl"), ""]
        lines += [f"Perplexity and same top token, {MODELS[model]}:", "", *others(found), ""]
    return "\n".join(lines).rstrip()


def divergences(found: dict[str, dict[str, Any]], kind: str) -> list[str]:
    """A table of divergences by type, and how much less ours have, as shares of llama.cpp's."""
    names = list(next(iter(found.values())))
    ours = [name for name in (DEFAULT, MIX) if name in names]
    lines = heading(["type", "MB", *names, *(f"{name}: less by" for name in ours)])
    for type_name, row in found.items():
        of = row[THEIRS][f"{kind}_divergence"]
        cells = [f"{row[name][f'{kind}_divergence']:.4f}" for name in names]
        cells += [f"{row[name][f'{kind}_less'] / of:.1%} ± {row[name][f'{kind}_less_se'] / of:.1%}" for name in ours]
        lines.append(f"| {type_name} | {row[THEIRS]['bytes'] / 1e6:.2f} | {' | '.join(cells)} |")
    return lines


def others(found: dict[str, dict[str, Any]]) -> list[str]:
    """A table of perplexity and of how often the likeliest token stays."""
    names = [name for name in (THEIRS, DEFAULT, MIX) if name in next(iter(found.values()))]
    lines = heading(["type", *(f"perplexity, {name}" for name in names), *(f"same top, {name}" for name in names)])
    for type_name, row in found.items():
        cells = [f"{row[name]['perplexity']:.2f}" for name in names]
        cells += [f"{row[name]['top1_agreement']:.1%}" for name in names]
        lines.append(f"| {type_name} | {' | '.join(cells)} |")
    return lines


def heading(names: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Divergence by file size."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5.5 * len(models), 4), layout="constrained")
    colours = {"plain": "#999999", THEIRS: "#cc6677", DEFAULT: "#4477aa", MIX: "#228833"}
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for name in (name for name in colours if any(row["variant"] == name for row in rows)):
            line = sorted((r["bytes"] / 1e6, r["kl_divergence"], r["type"]) for r in rows
                          if (r["model"], r["variant"]) == (model, name))  # fmt: skip
            sizes, values, types = zip(*line, strict=True)
            axes.plot(sizes, values, "o-", color=colours[name], label=name, markersize=4)
            if name == THEIRS:
                for at in zip(types, sizes, values, strict=True):
                    axes.annotate(at[0], at[1:], (3, 5), textcoords="offset points", fontsize=7)
        axes.set(title=MODELS[model], xlabel="file (MB)", ylabel="mean KLD (nats)", yscale="log")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--weights", action="store_true", help="also measure the weights alone")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(options, Path(folder))
        for model in options.models:
            for type_name in options.types:
                for row in measure(bench, model, type_name):
                    rows.append({key: value for key, value in row.items() if not key.endswith("_by_chunk")})
                    figures = f"{row['bytes']} bytes, KLD {row['kl_divergence']:.5f} ± {row['kl_divergence_se']:.5f}"
                    print(f"{model} {type_name} {row['variant']}: {figures}", flush=True)
    print(tables(rows))
    result = json.dumps({"benchmark": "quant_quality", "calibration_tokens": bench.tokens, "rows": rows})
    if options.json is not None:
        options.json.write_text(result + "\n")
    if options.plot is not None:
        plot(rows, options.plot)
    print(result)


if __name__ == "__main__":
    main()
