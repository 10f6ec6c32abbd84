"""Which models may lose blocks, and into which a repair can be folded: one entry per architecture, as data.

A block may go if llama.cpp computes every block the same way whatever its index. Where a block's index decides what it
does (a sliding window in every other block, no rotation in every fourth, dense blocks before those with experts), the
blocks after a removed one would get another's role, and nothing would tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import PruneError

ALTERNATING_WINDOW = "its blocks alternate between a sliding window and the whole context by their index"
NO_ROTATION = "every few blocks, by their index, have no rotary positions"
DENSE_LEAD = "its first blocks, by their index, are dense and the others have experts"
ALTERNATING_KIND = "its blocks are of several kinds that follow each other by their index"
LAYER_TABLE = "a table beside the blocks belongs to them by their index"


@dataclass(frozen=True)
class PruneFamily:
    """What removing blocks means in one architecture."""

    refusal: str | None = None
    """Why no block can go; None: blocks can go."""
    post_norm: bool = False
    """Whether a norm stands between the down projection and the residual stream: then no linear map of the MLP's
    output can be folded into the projection."""


_PLAIN = PruneFamily()

FAMILIES: Mapping[str, PruneFamily] = {
    "LlamaForCausalLM": _PLAIN,
    "MistralForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": _PLAIN,
    "Qwen3ForCausalLM": _PLAIN,
    "Phi3ForCausalLM": _PLAIN,
    "MixtralForCausalLM": _PLAIN,
    "Qwen3MoeForCausalLM": _PLAIN,
    "GPT2LMHeadModel": _PLAIN,
    "Olmo2ForCausalLM": PruneFamily(post_norm=True),
    "Gemma2ForCausalLM": PruneFamily(ALTERNATING_WINDOW, post_norm=True),
    "Gemma3ForCausalLM": PruneFamily(ALTERNATING_WINDOW, post_norm=True),
    "Gemma3ForConditionalGeneration": PruneFamily(ALTERNATING_WINDOW, post_norm=True),
    "Gemma3nForConditionalGeneration": PruneFamily(LAYER_TABLE, post_norm=True),
    "Cohere2ForCausalLM": PruneFamily(ALTERNATING_WINDOW),
    "GptOssForCausalLM": PruneFamily(ALTERNATING_WINDOW),
    "Olmo3ForCausalLM": PruneFamily(ALTERNATING_WINDOW, post_norm=True),
    "Exaone4ForCausalLM": PruneFamily(ALTERNATING_WINDOW, post_norm=True),
    "Llama4ForCausalLM": PruneFamily(NO_ROTATION),
    "Llama4ForConditionalGeneration": PruneFamily(NO_ROTATION),
    "SmolLM3ForCausalLM": PruneFamily(NO_ROTATION),
    "DeepseekForCausalLM": PruneFamily(DENSE_LEAD),
    "DeepseekV2ForCausalLM": PruneFamily(DENSE_LEAD),
    "DeepseekV3ForCausalLM": PruneFamily(DENSE_LEAD),
    "Glm4MoeForCausalLM": PruneFamily(DENSE_LEAD),
    "Dots1ForCausalLM": PruneFamily(DENSE_LEAD),
    "Ernie4_5_MoeForCausalLM": PruneFamily(DENSE_LEAD),
    "Qwen3NextForCausalLM": PruneFamily(ALTERNATING_KIND),
    "JambaForCausalLM": PruneFamily(ALTERNATING_KIND),
    "FalconH1ForCausalLM": PruneFamily(ALTERNATING_KIND),
    "GraniteMoeHybridForCausalLM": PruneFamily(ALTERNATING_KIND),
    "Lfm2ForCausalLM": PruneFamily(ALTERNATING_KIND),
}


def _set(value: Any) -> bool:
    return bool(value)


def _mixed(value: Any) -> bool:
    return isinstance(value, list) and len({str(x) for x in value}) > 1


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


# What a configuration may say that ties blocks to their index, in any family: key, when it does, why that matters.
INDEX_KEYS = (
    ("layer_types", _mixed, ALTERNATING_KIND),
    ("use_sliding_window", _set, "a sliding window begins at a block given by its index"),
    ("sliding_window_pattern", _above_one, ALTERNATING_WINDOW),
    ("no_rope_layers", _mixed, NO_ROTATION),
    ("first_k_dense_replace", _set, DENSE_LEAD),
    ("mlp_only_layers", _set, "blocks given by their index have no experts"),
    ("decoder_sparse_step", _above_one, "blocks have experts by their index"),
    ("interleave_moe_layer_step", _above_one, "blocks have experts by their index"),
    ("num_nextn_predict_layers", _set, "its last blocks predict further tokens"),
    ("scale_attn_by_inverse_layer_idx", _set, "attention is scaled by the block's index"),
)


def family_of(checkpoint: Checkpoint) -> PruneFamily:
    """The family of a checkpoint from which blocks may be removed.

    Raises:
        PruneError: they may not, with the reason.
    """
    name = checkpoint.architecture
    family = FAMILIES.get(name)
    if family is None:
        known = ", ".join(key for key, value in FAMILIES.items() if value.refusal is None)
        raise PruneError(
            f"no block of a {name} can be removed: whether its blocks depend on their index is not known here; "
            f"convert it whole, without --prune (known to stand it: {known})"
        )
    if family.refusal is not None:
        raise PruneError(f"no block of a {name} can be removed: {family.refusal}; convert it whole, without --prune")
    for key, tied, why in INDEX_KEYS:
        if tied(checkpoint.config.get(key)):
            raise PruneError(
                f"no block of this {name} can be removed: {why} ({key} in config.json); convert it whole, "
                "without --prune"
            )
    return family
