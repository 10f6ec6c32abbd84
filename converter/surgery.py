"""Takes blocks out of a planned GGUF: tensors dropped and renumbered, metadata rewritten. Computes no weight.

Names and order come out as llama.cpp's quantizer makes them with `prune_layers`, which also rewrites the block count;
the arrays with one entry per block are rewritten here in addition.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ziggurat.converter.errors import PruneError
from ziggurat.converter.upstream import Plan

T = TypeVar("T")

_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")

# Arrays with one entry per block, without the architecture's prefix.
PER_BLOCK = frozenset({"attention.head_count", "attention.head_count_kv", "feed_forward_length"})
# Arrays with a length of their own, which may happen to be the number of blocks.
NOT_PER_BLOCK = frozenset({"rope.dimension_sections"})
# What adds the feed-forward part's output to the residual stream, without `blk.N.` and `.weight`.
DOWN_PROJECTIONS = ("ffn_down", "ffn_down_exps", "ffn_down_shexp")
# Numbers that count blocks from one end, or say which of them are of another kind.
INDEX_DEPENDENT = (
    "leading_dense_block_count", "nextn_predict_layers", "interleave_moe_layer_step", "moe_every_n_layers",
    "full_attention_interval", "attention.shared_kv_layers", "attention.sliding_window_pattern",
    "attention.recurrent_layers",
)  # fmt: skip


def block_count(plan: Plan) -> int:
    """Number of blocks of the planned model."""
    return int(plan.value("{arch}.block_count", 0))


def renumber(n_layer: int, removed: Collection[int]) -> dict[int, int]:
    """New index of every block that stays, by its old one."""
    return {old: new for new, old in enumerate(i for i in range(n_layer) if i not in removed)}


def renamed(name: str, places: Mapping[int, int]) -> str | None:
    """The name of a tensor after the surgery; None if it goes."""
    match = _BLOCK.match(name)
    if match is None:
        return name
    new = places.get(int(match[1]))
    return None if new is None else f"blk.{new}.{match[2]}"


def remove_blocks(plan: Plan, removed: Collection[int]) -> Plan:
    """The plan without the blocks `removed`, checked before.

    Raises:
        PruneError: the metadata ties blocks to their index.
    """
    n_layer = block_count(plan)
    places = renumber(n_layer, removed)
    tensors = [
        dataclasses.replace(tensor, name=name)
        for tensor in plan.tensors
        for name in [renamed(tensor.name, places)]
        if name is not None
    ]
    return Plan(plan.arch, _metadata(plan, places, n_layer), tensors)


def renumber_keys(values: Mapping[str, T], n_layer: int, removed: Collection[int]) -> dict[str, T]:
    """What belongs to the tensors that stay (importance data), under their new names."""
    places = renumber(n_layer, removed)
    return {name: value for old, value in values.items() for name in [renamed(old, places)] if name is not None}


def _metadata(plan: Plan, places: Mapping[int, int], n_layer: int) -> dict[str, Any]:
    prefix = f"{plan.arch}."
    metadata = dict(plan.metadata)
    for key, entry in plan.metadata.items():
        if not key.startswith(prefix):
            continue
        name, value = key.removeprefix(prefix), entry.value
        if name in INDEX_DEPENDENT and value not in (0, None, False):
            raise PruneError(
                f"no block can be removed: {key} in the metadata ties blocks to their index; convert the model whole, "
                "without --prune"
            )
        if not isinstance(value, (list, tuple)) or name in NOT_PER_BLOCK:
            continue
        if name in PER_BLOCK and len(value) == n_layer:
            metadata[key] = dataclasses.replace(entry, value=[value[old] for old in places])
        elif name in PER_BLOCK or len(value) == n_layer:
            raise PruneError(
                f"no block can be removed: whether the {len(value)} entries of {key} belong to the {n_layer} blocks is "
                "not known; convert the model whole, without --prune"
            )
    count = metadata[f"{prefix}block_count"]
    metadata[f"{prefix}block_count"] = dataclasses.replace(count, value=len(places))
    return metadata
