"""Gives a Llama-style checkpoint the activation outliers of large models, without changing what it computes.

usage: python tests/models/outliers.py MODEL OUT [--seed 0] [--share 0.01] [--factors 8 16 32 64] [--places ...]

Small models trained for tests have even activations, and then activation-aware scaling (AWQ) has nothing to protect.
Large ones have a few input channels of their linear layers that are far larger than the rest. The transformation
multiplies what writes a channel by a factor and divides what reads it by the same factor; MODEL is the control.

    place      written by                      read by
    attention  input_layernorm                 columns of q_proj, k_proj, v_proj
    mlp        post_attention_layernorm        columns of gate_proj, up_proj
    up         rows of up_proj                 columns of down_proj
    values     rows of v_proj (and its bias)   columns of o_proj, of every query head of the KV head's group

What is published:
- LLM.int8() (Dettmers et al. 2022): from 6.7B parameters on, outlier features up to about 20 times larger than the
  others, in the same few feature dimensions (6 or 7 of thousands, 0.1 %) of nearly all layers.
- SmoothQuant (Xiao et al. 2023): outliers about 100 times larger than most activations, in fixed channels.
- AWQ (Lin et al. 2024): 0.1 to 1 % of the weight channels, found by activation size, decide over the loss.
- "Massive Activations in Large Language Models" (Sun et al. 2024): beside these, a handful of values of the residual
  stream are above 1000, at fixed dimensions and few tokens. RMSNorm sees those: no rescaling of single channels keeps
  the function, so this transformation does not make them.

What is our choice: 1 % of the channels, drawn at random; factors 8, 16, 32 or 64 at equal odds (the published range of
10 to 100 times); the same channels and factors in all layers' norms, as in LLM.int8(), and drawn for each layer in
`up` and `values`; no `values` by default, as SmoothQuant and AWQ report no outliers there, and it changes the V cache.
Powers of two only: then scaled BF16 and F32 weights are exact, and so is every product, so that the twin computes the
same numbers, only summed with other roundings at most. An F16 tensor that would become subnormal is stored as F32.
An F16 GGUF has the same limit: take BF16 or F32 as the twin's reference.

Files go through shard by shard; OUT gets MODEL's other files, a note in its README, and `outliers.json` with every
channel and factor.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

PLACES = ("attention", "mlp", "up", "values")
# In these every reader of a norm is known, and the norm multiplies by its weight (Gemma's by 1 + weight).
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_IGNORED = ("*.safetensors", "*.bin", "*.pth", "*.gguf", "*.onnx", ".git", ".cache")


@dataclass(frozen=True)
class OutlierSettings:
    """Which channels grow, and how much."""

    seed: int = 0
    share: float = 0.01
    """Of a place's channels; one channel at least."""
    factors: tuple[float, ...] = (8.0, 16.0, 32.0, 64.0)
    """Powers of two, one drawn for each channel."""
    places: tuple[str, ...] = ("attention", "mlp", "up")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")
        if not self.factors or any(f <= 0 or math.frexp(f)[0] != 0.5 for f in self.factors):
            raise ValueError(f"factors must be powers of two, not {self.factors}: others are not exact")
        if unknown := set(self.places) - set(PLACES):
            raise ValueError(f"unknown places {sorted(unknown)}; there are {', '.join(PLACES)}")


Scales = Mapping[str, list[torch.Tensor]]


def draw_scales(config: Mapping[str, Any], settings: OutlierSettings) -> Scales:
    """Draw place -> for each layer the channels' factors, (channels,) in F32, 1 where nothing changes.

    `values` has n_kv_heads * head_dim channels, the others hidden_size or intermediate_size. A place's draw does not
    depend on which other places are asked for.
    """
    layers = int(config["num_hidden_layers"])
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    values = int(config.get("num_key_value_heads") or heads) * head_dim

    def draw(place: str, layer: int, width: int) -> torch.Tensor:
        rng = np.random.default_rng([settings.seed, PLACES.index(place), layer])
        scale = np.ones(width, np.float32)
        channels = rng.choice(width, max(1, round(settings.share * width)), replace=False)
        scale[channels] = rng.choice(settings.factors, len(channels))
        return torch.from_numpy(scale)

    shared = draw("attention", 0, hidden)  # LLM.int8(): the same dimensions in nearly all layers
    make = {
        "attention": lambda layer: shared,
        "mlp": lambda layer: shared,
        "up": lambda layer: draw("up", layer, int(config["intermediate_size"])),
        "values": lambda layer: draw("values", layer, values),
    }
    return {place: [make[place](layer) for layer in range(layers)] for place in PLACES if place in settings.places}


def scale_tensor(name: str, weight: torch.Tensor, scales: Scales, config: Mapping[str, Any]) -> torch.Tensor:
    """Return the twin of one tensor of the checkpoint, by its Hugging Face name; exact, and unchanged if not named."""
    parts = name.split(".")
    if "layers" not in parts:
        return weight
    layer = int(parts[parts.index("layers") + 1])
    module, kind = parts[-2], parts[-1]
    writers = {"input_layernorm": "attention", "post_attention_layernorm": "mlp", "up_proj": "up", "v_proj": "values"}
    readers = {
        "q_proj": "attention", "k_proj": "attention", "v_proj": "attention",
        "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "up", "o_proj": "values",
    }  # fmt: skip
    rows, columns = scales.get(writers.get(module, "")), scales.get(readers.get(module, ""))
    exact = weight.to(torch.float32)
    if rows is not None:  # norms have one dimension, and biases go with the rows
        exact = exact * (rows[layer][:, None] if exact.dim() == 2 else rows[layer])
    if columns is not None and kind == "weight":
        scale = columns[layer]
        if module == "o_proj":  # (n_kv, head_dim) for each query head of a group
            kv_heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
            group = int(config["num_attention_heads"]) // kv_heads
            scale = scale.view(kv_heads, 1, -1).expand(-1, group, -1).reshape(-1)
        exact = exact / scale
    stored = exact.to(weight.dtype)
    return stored if torch.equal(stored.to(torch.float32), exact) else exact


def add_outliers(source: Path, out: Path, settings: OutlierSettings) -> Scales:
    """Write the twin of checkpoint folder `source` to `out`, which must not exist or be empty; return the factors."""
    config = json.loads((source / "config.json").read_text())
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"{source} is a {config.get('model_type')} model; this knows {', '.join(MODEL_TYPES)}")
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{source} has no safetensors files")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")
    scales = draw_scales(config, settings)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(*_IGNORED), dirs_exist_ok=True)
    total = 0
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors = {name: scale_tensor(name, file.get_tensor(name), scales, config) for name in file.keys()}
            metadata = file.metadata()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / shard.name, metadata)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = out / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content.setdefault("metadata", {})["total_size"] = total
        index.write_text(json.dumps(content, indent=2))
    _write_notes(source, out, settings, scales)
    return scales


def _write_notes(source: Path, out: Path, settings: OutlierSettings, scales: Scales) -> None:
    channels = {
        place: [{int(i): float(scale[i]) for i in torch.nonzero(scale != 1).flatten()} for scale in layers]
        for place, layers in scales.items()
    }
    note = {"source": source.name, **asdict(settings), "channels": channels}
    (out / "outliers.json").write_text(json.dumps(note, indent=1))
    readme = out / "README.md"
    card = readme.read_text() + "\n" if readme.exists() else ""
    readme.write_text(
        f"{card}## Outlier twin\n\nComputes the same as {source.name}, with {settings.share:.2%} of the channels at "
        f"{', '.join(settings.places)} scaled by {', '.join(f'{f:g}' for f in settings.factors)} (seed "
        f"{settings.seed}) and their readers scaled back. For tests of quantization; `outliers.json` lists them.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a twin of a Llama-style checkpoint with activation outliers and the same function."
    )
    default = OutlierSettings()
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder with safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument("--seed", type=int, default=default.seed, help="of channels and factors (default: 0)")
    parser.add_argument("--share", type=float, default=default.share, help="share of the channels (default: 0.01)")
    parser.add_argument("--factors", type=float, nargs="+", default=default.factors, metavar="F",
                        help="powers of two to draw from (default: 8 16 32 64)")  # fmt: skip
    parser.add_argument("--places", nargs="+", choices=PLACES, default=default.places,
                        help="where (default: attention mlp up)")  # fmt: skip
    a = parser.parse_args()
    try:
        scales = add_outliers(
            a.model, a.out, OutlierSettings(a.seed, a.share, tuple(a.factors), tuple(a.places))
        )  # fmt: skip
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for place, layers in scales.items():
        print(f"{place}: {int((layers[0] != 1).sum())} of {len(layers[0])} channels in each of {len(layers)} layers")


if __name__ == "__main__":
    main()
