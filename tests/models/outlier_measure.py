"""Measures an outlier twin against its control: same logits, other activations, and what Q4_0 does to both.

usage: python tests/models/outlier_measure.py MODEL TWIN [--tokens 256 | --text FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
import transformers

Readers = dict[str, torch.Tensor]


@dataclass(frozen=True)
class InputStats:
    """Size of what a linear layer reads, over (tokens, channels)."""

    max_to_median: float
    """Largest magnitude over the median magnitude."""
    kurtosis: float
    """Fourth moment over the squared second; 3 for a Gaussian."""
    channel_rms: torch.Tensor
    """(channels,)"""


def load(folder: Path) -> transformers.PreTrainedModel:
    """Load in F32, ready to evaluate."""
    level, bars = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _linears(model: transformers.PreTrainedModel) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers." in name
    }


@torch.no_grad()
def run(model: transformers.PreTrainedModel, tokens: list[int]) -> tuple[torch.Tensor, Readers]:
    """Return logits (tokens, vocabulary) and what each linear layer of the blocks reads, (tokens, channels)."""
    inputs: Readers = {}

    def keep(name: str, value: torch.Tensor) -> None:
        inputs[name] = value[0].detach()

    with contextlib.ExitStack() as stack:
        for name, module in _linears(model).items():
            hook = module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
            stack.callback(hook.remove)
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits, inputs


def input_stats(inputs: Readers) -> dict[str, InputStats]:
    """Statistics of every linear layer's input, by module name."""
    stats = {}
    for name, x in inputs.items():
        x64 = x.double()
        square = (x64**2).mean()
        stats[name] = InputStats(
            float(x64.abs().max() / x64.abs().median()),
            float((x64**4).mean() / square**2),
            (x64**2).mean(0).sqrt(),
        )
    return stats


def nmse(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Squared error relative to the squared size of what was wanted."""
    return float(((got.double() - wanted.double()) ** 2).sum() / (wanted.double() ** 2).sum())


def q4_0(weight: torch.Tensor) -> torch.Tensor:
    """Round a weight (rows, columns) to Q4_0 and back: blocks of 32 columns share one scale.

    Rows that are no whole blocks stay as they are; llama.cpp gives such tensors another type.
    """
    if weight.shape[1] % 32:
        return weight
    kind = gguf.GGMLQuantizationType.Q4_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))


@torch.no_grad()
def q4_0_output_errors(model: transformers.PreTrainedModel, inputs: Readers) -> dict[str, float]:
    """Relative squared error of each linear layer's output, on the exact inputs, when its weight is Q4_0."""
    errors = {}
    for name, module in _linears(model).items():
        exact = inputs[name] @ module.weight.T
        errors[name] = nmse(inputs[name] @ q4_0(module.weight).T, exact)
    return errors


@torch.no_grad()
def q4_0_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Logits with every linear layer of the blocks rounded to Q4_0, (tokens, vocabulary)."""
    model = load(folder)
    for module in _linears(model).values():
        module.weight.copy_(q4_0(module.weight))
    return run(model, tokens)[0]


def _kinds(names: Iterator[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rsplit(".", 1)[1], []).append(name)
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare an outlier twin with its control; all of it in F32.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="the control's folder")
    parser.add_argument("twin", type=Path, metavar="TWIN", help="what outliers.py wrote from it")
    parser.add_argument("--tokens", type=int, default=256, help="random tokens, or the text's first (default: 256)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to read instead of random tokens")
    a = parser.parse_args()
    control, twin = load(a.model), load(a.twin)
    if a.text is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(control.config.vocab_size, (a.tokens,), generator=generator).tolist()
    else:
        tokens = transformers.AutoTokenizer.from_pretrained(a.model)(
            a.text.read_text(), truncation=True, max_length=a.tokens
        ).input_ids
    (logits, inputs), (twin_logits, twin_inputs) = run(control, tokens), run(twin, tokens)
    print(f"{len(tokens)} tokens; NMSE of the twin's logits: {nmse(twin_logits, logits):.1e}")
    for label, folder in (("control", a.model), ("twin", a.twin)):
        rounded = q4_0_logits(folder, tokens)
        divergence = torch.nn.functional.kl_div(
            rounded.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        print(f"{label} in Q4_0: NMSE of logits {nmse(rounded, logits):.2e}, KL divergence {float(divergence):.4f}")
    stats, twin_stats = input_stats(inputs), input_stats(twin_inputs)
    errors, twin_errors = q4_0_output_errors(control, inputs), q4_0_output_errors(twin, twin_inputs)
    print("\nmedian over layers   max / median      kurtosis          Q4_0 output error")
    for kind, names in _kinds(iter(stats)).items():
        pairs = [
            [statistics.median(values[name] for name in names) for values in pair]
            for pair in (
                ({n: s.max_to_median for n, s in stats.items()}, {n: s.max_to_median for n, s in twin_stats.items()}),
                ({n: s.kurtosis for n, s in stats.items()}, {n: s.kurtosis for n, s in twin_stats.items()}),
                (errors, twin_errors),
            )
        ]
        print(f"{kind:20}" + "".join(f" {before:6.3g} -> {after:<7.3g}" for before, after in pairs))


if __name__ == "__main__":
    main()
