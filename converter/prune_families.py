"""Which models may lose blocks: one entry per architecture, as data.

A block may go if llama.cpp computes every block the same way whatever its index. Where a block's index decides what it
does (a sliding window in every other block, no rotation in every fourth, dense blocks before those with experts), the
blocks after a removed one would get another's role, and nothing would tell.
"""

from __future__ import annotations

from typing import Any

from ziggurat.converter import families
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import PruneError

ALTERNATING_WINDOW = "its blocks alternate between a sliding window and the whole context by their index"
NO_ROTATION = "every few blocks, by their index, have no rotary positions"
DENSE_LEAD = "its first blocks, by their index, are dense and the others have experts"
ALTERNATING_KIND = "its blocks are of several kinds that follow each other by their index"
LAYER_TABLE = "a table beside the blocks belongs to them by their index"


SAFE = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM",
    "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel", "Olmo2ForCausalLM",
)  # fmt: skip

UNSAFE = {
    "Gemma2ForCausalLM": ALTERNATING_WINDOW,
    "Gemma3ForCausalLM": ALTERNATING_WINDOW,
    "Gemma3ForConditionalGeneration": ALTERNATING_WINDOW,
    "Gemma3nForConditionalGeneration": LAYER_TABLE,
    "Cohere2ForCausalLM": ALTERNATING_WINDOW,
    "GptOssForCausalLM": ALTERNATING_WINDOW,
    "Olmo3ForCausalLM": ALTERNATING_WINDOW,
    "Exaone4ForCausalLM": ALTERNATING_WINDOW,
    "Llama4ForCausalLM": NO_ROTATION,
    "Llama4ForConditionalGeneration": NO_ROTATION,
    "SmolLM3ForCausalLM": NO_ROTATION,
    "DeepseekForCausalLM": DENSE_LEAD,
    "DeepseekV2ForCausalLM": DENSE_LEAD,
    "DeepseekV3ForCausalLM": DENSE_LEAD,
    "Glm4MoeForCausalLM": DENSE_LEAD,
    "Dots1ForCausalLM": DENSE_LEAD,
    "Ernie4_5_MoeForCausalLM": DENSE_LEAD,
    "Qwen3NextForCausalLM": ALTERNATING_KIND,
    "JambaForCausalLM": ALTERNATING_KIND,
    "FalconH1ForCausalLM": ALTERNATING_KIND,
    "GraniteMoeHybridForCausalLM": ALTERNATING_KIND,
    "Lfm2ForCausalLM": ALTERNATING_KIND,
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


def check_prunable(checkpoint: Checkpoint) -> None:
    """Make sure that the blocks of a checkpoint do not depend on their index.

    Raises:
        PruneError: they do, with the reason, or nobody knows.
    """
    name, whole = checkpoint.architecture, "convert it whole, without --prune"
    if name in UNSAFE:
        raise PruneError(f"no block of a {name} can be removed: {UNSAFE[name]}; {whole}")
    if name not in SAFE:
        raise PruneError(
            f"no block of a {name} can be removed: whether its blocks depend on their index is not known here; {whole} "
            f"(known to stand it: {', '.join(SAFE)})"
        )
    for key, tied, why in INDEX_KEYS:
        if tied(checkpoint.config.get(key)):
            raise PruneError(f"no block of this {name} can be removed: {why} ({key} in config.json); {whole}")


def check_repairable(checkpoint: Checkpoint) -> None:
    """Make sure that a correction can be folded into the family's blocks.

    Raises:
        PruneError: norms stand between the down projections and the residual stream.
        UnsupportedModelError: the family is not known.
    """
    if families.find(checkpoint).post_norm:
        raise PruneError(
            f"removed blocks of {checkpoint.architecture} cannot be made up for: a norm follows the down "
            "projection, so no correction can be folded into it; leave the repair out with --no-repair"
        )
