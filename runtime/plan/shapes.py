"""What a model asks of a device, from its GGUF file, its config, or the name of a well-known shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ziggurat.runtime.errors import InvalidRequestError, UnsupportedError
from ziggurat.runtime.gguf_file import GGUFFile, TensorInfo, read_gguf
from ziggurat.runtime.plan.checkpoint import config_of, weight_counts
from ziggurat.runtime.plan.kv import KVShape, kv_shape
from ziggurat.runtime.plan.roofline import Demand

#: Configs by name, as their makers publish them; what is not needed here is left out.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama-3.1-405b": {
        "model_type": "llama",
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_EXPERTS = re.compile(r"_exps\.(weight|bias)$")


def shape_demand(name: str, *, blocks: int | None = None, bpw: float | None = None, type_name: str) -> Demand:
    """Return the demand of a named shape; see ``config_demand``. Raises InvalidRequestError for an unknown name."""
    config = SHAPES.get(name.lower())
    if config is None:
        raise InvalidRequestError(f"there is no shape {name!r}; take one of {', '.join(SHAPES)}, or give a config.json")
    return config_demand(name.lower(), config, blocks=blocks, bpw=bpw, type_name=type_name)


def folder_demand(path: Path, *, blocks: int | None = None, bpw: float | None = None, type_name: str) -> Demand:
    """Return the demand of a checkpoint by its config. Raises ModelFileError; see ``config_demand``."""
    return config_demand(str(path), config_of(path), blocks=blocks, bpw=bpw, type_name=type_name)


def config_demand(
    name: str, config: Mapping[str, Any], *, blocks: int | None = None, bpw: float | None = None, type_name: str
) -> Demand:
    """Return the demand of a Hugging Face config, converted to a file type, or at ``bpw`` bits for every weight.

    ``blocks`` are those that are left after pruning. Raises ModelFileError for a config that makes no sense,
    UnsupportedError for a family or file type that is not known and for experts, InvalidRequestError for more blocks
    than there are.
    """
    counts = weight_counts(Path(name), config, type_name=type_name, blocks=blocks)
    if bpw is not None:
        step, resident = ((number * bpw / 8) for number in (counts.layers + counts.output, counts.all))
    else:
        weights = counts.weights
        step = sum(weights.layers) + (weights.embedding if weights.tied else weights.output)
        resident = weights.total
    return Demand(name, round(resident), round(step), counts.layers, counts.output, counts.n_embd, counts.kv)


def file_demand(path: Path) -> Demand:
    """Return the demand of a GGUF file. Raises ModelFileError."""
    return gguf_demand(read_gguf(path))


def gguf_demand(file: GGUFFile) -> Demand:
    """Return the demand of a GGUF file that was read. Raises ModelFileError for what is no language model."""
    arch = file.architecture
    try:
        kv: KVShape | None = kv_shape(file)
    except UnsupportedError:
        kv = None
    n_layer = kv.n_layer if kv is not None else file.integer(f"{arch}.block_count") or 0
    names = {tensor.name for tensor in file.tensors}
    head = "output.weight" if "output.weight" in names else "token_embd.weight"
    experts = [tensor for tensor in file.tensors if _EXPERTS.search(tensor.name) and _runs(tensor, n_layer)]
    others = [
        tensor
        for tensor in file.tensors
        if (_runs(tensor, n_layer) and not _EXPERTS.search(tensor.name)) or tensor.name in (head, "output_norm.weight")
    ]
    n_expert = file.integer(f"{arch}.expert_count") or 0
    used = min(file.integer(f"{arch}.expert_used_count") or n_expert, n_expert)
    dense = sum(tensor.n_elements for tensor in others if len(tensor.shape) > 1 and tensor.name != head)
    routed = sum(tensor.n_elements for tensor in experts) * used // max(n_expert, 1)
    return Demand(
        name=file.path.name,
        resident=file.weights_bytes,
        step=sum(tensor.n_bytes for tensor in others),
        layers=dense + routed,
        output=next((tensor.n_elements for tensor in file.tensors if tensor.name == head), 0),
        n_embd=file.integer(f"{arch}.embedding_length") or 0,
        kv=kv,
        experts=sum(tensor.n_bytes for tensor in experts),
        n_expert=n_expert,
        n_expert_used=used,
    )


def _runs(tensor: TensorInfo, n_layer: int) -> bool:
    """Whether it is of a block that is computed; those that predict beyond the next token are not."""
    block = _BLOCK.match(tensor.name)
    return block is not None and int(block[1]) < n_layer
