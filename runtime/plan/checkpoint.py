"""The outline of a Hugging Face checkpoint from its ``config.json``, before it is downloaded or converted.

Needs neither torch nor transformers. Where a config leaves a value out, the default is that of the family's config
class in transformers. Sliding windows are those of llama.cpp's architecture, which is what will run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ziggurat.runtime.errors import InvalidRequestError, ModelFileError, UnsupportedError
from ziggurat.runtime.plan.file_types import FileType, Role, bits_per_weight, file_type
from ziggurat.runtime.plan.kv import KVShape, sliding_windows
from ziggurat.runtime.plan.outline import Outline, Weights
from ziggurat.runtime.plan.safetensors import Shapes, tensor_shapes


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` becomes an architecture of llama.cpp, and what its config class has for defaults.

    ``fused``: q, k and v are one matrix. ``norms`` are vectors of the hidden size in a layer.
    """

    arch: str
    tied: bool = False
    head_dim: int | None = None
    fused: bool = False
    gated: bool = True
    norms: int = 2


FAMILIES = {
    "llama": Family("llama"),
    "mistral": Family("llama"),
    "mixtral": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", head_dim=128),
    "qwen3_moe": Family("qwen3moe"),
    "gemma2": Family("gemma2", tied=True, head_dim=256, norms=4),
    "gemma3_text": Family("gemma3", tied=True, head_dim=256, norms=4),
    "olmo2": Family("olmo2", norms=4),
    "phi3": Family("phi3", fused=True),
    "gpt2": Family("gpt2", tied=True, fused=True, gated=False),
}
# GPT-2's own names for what the others call alike
_GPT2 = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
_BETTER = re.compile(r"\.(v_proj|down_proj|w2|mlp\.c_proj)\.weight$")
_FUSED = re.compile(r"\.(qkv_proj|c_attn)\.weight$")
_ROUTER = re.compile(r"\.(mlp|block_sparse_moe)\.gate\.weight$")

# layer (None outside of them), part, number of weights
Part = tuple[int | None, Role, int]


@dataclass(frozen=True)
class _Dims:
    """What a config says, under one name for all families. ``n_expert`` is 0 for dense models."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx: int
    n_expert: int
    n_expert_used: int
    tied: bool
    window: int | None


def checkpoint_outline(path: Path, type_name: str) -> Outline:
    """Read the outline of a checkpoint as a file of a given type: ``path`` is its folder or its ``config.json``.

    With all safetensors files there, weights are counted by their tables, else by the config; bytes are an estimate
    either way. Raises ModelFileError for a file that is missing or makes no sense, UnsupportedError for a family or a
    file type that is not known here.
    """
    config_path = _config_path(path)
    kind = file_type(type_name)
    config = _read(config_path)
    family = _family(config_path, config)
    dims = _dims(config_path, config, family)
    shapes = tensor_shapes(config_path.parent)
    parts = _parts_of(shapes, dims) if shapes is not None else _parts(dims, family)
    weights = _weights(parts, dims, kind)
    return Outline(
        path=path,
        architecture=family.arch,
        n_embd=dims.n_embd,
        n_ff=dims.n_ff * max(dims.n_expert_used, 1),
        n_vocab=dims.n_vocab,
        n_ctx_train=dims.n_ctx,
        kv=_kv_shape(dims, family),
        weights=weights,
    )


@dataclass(frozen=True)
class WeightCounts:
    """How many weights a token is multiplied with, in the layers and for the output, and how many there are in all.

    ``weights`` are the bytes of them as a file of some type.
    """

    layers: int
    output: int
    all: int
    n_embd: int
    kv: KVShape
    weights: Weights


def config_of(path: Path) -> Mapping[str, Any]:
    """Read the config of a checkpoint: its folder, or ``config.json`` itself. Raises ModelFileError."""
    return _read(_config_path(path))


def weight_counts(path: Path, config: Mapping[str, Any], *, type_name: str, blocks: int | None = None) -> WeightCounts:
    """Count the weights of a dense model by its config alone, of which ``blocks`` blocks are left; None: all.

    ``path`` is for messages. Raises ModelFileError, UnsupportedError and InvalidRequestError.
    """
    kind = file_type(type_name)
    family = _family(path, config)
    dims = _dims(path, config, family)
    if dims.n_expert:
        raise UnsupportedError(f"{path}: experts are counted in a converted file only; give the .gguf")
    if blocks is not None and not 1 <= blocks <= dims.n_layer:
        raise InvalidRequestError(f"{path}: has {dims.n_layer} blocks; {blocks} of them cannot be left")
    dims = replace(dims, n_layer=blocks or dims.n_layer)
    parts = list(_parts(dims, family))
    embedding = dims.n_embd * dims.n_vocab
    return WeightCounts(
        layers=sum(count for layer, role, count in parts if layer is not None and role != "vector"),
        output=embedding,
        all=sum(count for _, _, count in parts),
        n_embd=dims.n_embd,
        kv=_kv_shape(dims, family),
        weights=_weights(iter(parts), dims, kind),
    )


def _config_path(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def _family(path: Path, config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedError(
            f"{path}: models of type {model_type} cannot be planned before they are converted;"
            f" known are {', '.join(FAMILIES)}"
        )
    return family


def _kv_shape(dims: _Dims, family: Family) -> KVShape:
    return KVShape(
        n_head=(dims.n_head,) * dims.n_layer,
        n_head_kv=(dims.n_head_kv,) * dims.n_layer,
        key_length=dims.head_dim,
        value_length=dims.head_dim,
        window=sliding_windows(family.arch, dims.n_layer, dims.window),
        n_ctx_train=dims.n_ctx,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; give a .gguf file, a model's folder or its config.json") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise ModelFileError(f"{path}: is not JSON; download it again") from None
    if not isinstance(config, dict):
        raise ModelFileError(f"{path}: does not hold a JSON object; it is no model's config")
    text = config.get("text_config")  # models that see images too keep the language model's part in there
    return text if isinstance(text, dict) else config


def _dims(path: Path, config: Mapping[str, Any], family: Family) -> _Dims:
    config = {_GPT2.get(key, key): value for key, value in config.items()}

    def number(*keys: str, default: int | None = None) -> int:
        value = next((config[key] for key in keys if config.get(key) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ModelFileError(f"{path}: {keys[0]} is {value!r}; it must be a number, so the config is not complete")
        return value

    n_embd, n_head = number("hidden_size"), number("num_attention_heads")
    n_layer = number("num_hidden_layers")
    if not n_embd or not n_head or not n_layer:
        raise ModelFileError(f"{path}: a model without layers, heads or width makes no sense")
    n_expert = number("num_local_experts", "num_experts", default=0)
    dense = number("intermediate_size", default=4 * n_embd)
    return _Dims(
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=number("num_key_value_heads", default=n_head),
        head_dim=number("head_dim", default=family.head_dim or n_embd // n_head),
        n_ff=number("moe_intermediate_size", default=dense) if n_expert else dense,
        n_vocab=number("vocab_size"),
        n_ctx=number("max_position_embeddings", default=0),
        n_expert=n_expert,
        n_expert_used=number("num_experts_per_tok") if n_expert else 0,
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        window=number("sliding_window", default=0) or None,
    )


def _parts(dims: _Dims, family: Family) -> Iterator[Part]:
    """Count the weights by the config."""
    yield None, "embedding", dims.n_embd * dims.n_vocab
    if not dims.tied:
        yield None, "output", dims.n_embd * dims.n_vocab
    if family.arch == "gpt2":
        yield None, "vector", dims.n_embd * dims.n_ctx
    query, key_value = dims.n_head * dims.head_dim, dims.n_head_kv * dims.head_dim
    experts = max(dims.n_expert, 1)
    for layer in range(dims.n_layer):
        if family.fused:
            yield layer, "fused", dims.n_embd * (query + 2 * key_value)
        else:
            yield layer, "matrix", dims.n_embd * (query + key_value)
            yield layer, "better", dims.n_embd * key_value
        yield layer, "matrix", query * dims.n_embd
        yield layer, "matrix", experts * dims.n_embd * dims.n_ff * (2 if family.gated else 1)
        yield layer, "better", experts * dims.n_ff * dims.n_embd
        yield layer, "vector", family.norms * dims.n_embd + dims.n_expert * dims.n_embd


def _parts_of(shapes: Shapes, dims: _Dims) -> Iterator[Part]:
    """Count the weights by the checkpoint's own tables."""
    for name, shape in shapes.items():
        count = 1
        for extent in shape:
            count *= extent
        layer = _LAYER.search(name)
        role: Role = "matrix"
        if len(shape) < 2 or _ROUTER.search(name) or ".wpe." in f".{name}":
            role = "vector"
        elif layer is None:
            role = "output" if "lm_head" in name else "embedding"
        elif _BETTER.search(name):
            role = "better"
        elif _FUSED.search(name):
            role = "fused"
        # some checkpoints of tied models store the matrix twice; a converted file never does
        if not (role == "output" and dims.tied):
            yield int(layer[1]) if layer else None, role, count


def _weights(parts: Iterator[Part], dims: _Dims, kind: FileType) -> Weights:
    layers = [0.0] * dims.n_layer
    sums = {"embedding": 0.0, "output": 0.0, "vector": 0.0}
    for layer, role, count in parts:
        # tied embeddings are the output matrix too and get its type
        bits = bits_per_weight(kind, "output" if role == "embedding" and dims.tied else role)
        if layer is None:
            sums[role if role in sums else "embedding"] += count * bits / 8
        elif layer < dims.n_layer:  # a block that predicts beyond the next token is not run
            layers[layer] += count * bits / 8
    return Weights(
        input=round(sums["embedding"] + sums["vector"]),
        layers=tuple(round(size) for size in layers),
        output=round(sums["output"]),
        embedding=round(sums["embedding"]),
        tied=dims.tied,
        exact=False,
    )
