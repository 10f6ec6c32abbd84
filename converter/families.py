"""What this package knows about each family of models beyond llama.cpp's own converter: data, no code.

Only families whose hidden states are compared with transformers in the tests stand here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import UnsupportedModelError


@dataclass(frozen=True)
class Experts:
    """Where a checkpoint keeps the experts of a block, one by one; transformers may keep them fused in one tensor."""

    module: str
    """Path of the mixture in the checkpoint, within its block."""
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """How to stream one architecture's decoder blocks; paths are those of transformers' modules."""

    layers: str = "layers"
    """The list of blocks, within the base model."""
    embedding: str = "embed_tokens"
    """The token embedding, within the base model."""
    norm: str = "norm"
    """The norm before the head, within the base model."""
    mlp: str = "mlp"
    """The feed-forward part, within a block."""
    down: str | None = "down_proj"
    """The linear layer that ends the feed-forward part, within it; None: there are several, one per expert."""
    attention: str = "sdpa"
    """Transformers' attention to compute with: `eager` where `sdpa` leaves something out (soft caps)."""
    experts: Experts | None = None
    """Set for mixtures of experts."""
    post_norm: bool = False
    """Whether norms follow the attention and the feed-forward part, before their output is added: no linear map of
    that output can be folded into `down` then."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(),
    "Phi3ForCausalLM": Family(),
    "Olmo2ForCausalLM": Family(post_norm=True),
    "Gemma2ForCausalLM": Family(attention="eager", post_norm=True),
    "Gemma3ForCausalLM": Family(post_norm=True),
    "MixtralForCausalLM": Family(down=None, experts=Experts("block_sparse_moe", gate="w1", up="w3", down="w2")),
    "Qwen3MoeForCausalLM": Family(down=None, experts=Experts("mlp", gate="gate_proj", up="up_proj", down="down_proj")),
    "GPT2LMHeadModel": Family(layers="h", embedding="wte", norm="ln_f", down="c_proj"),
}


def find(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint.

    Raises:
        UnsupportedModelError: its blocks cannot be streamed: the message says what would be needed.
    """
    family = FAMILIES.get(checkpoint.architecture)
    if family is None:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: blocks of {checkpoint.architecture} cannot be computed one at a time, only those of "
            f"{', '.join(FAMILIES)}: convert it with --no-awq --no-imatrix, or with --imatrix FILE --no-awq, and "
            "without pruning; or add it to the table of families with a test that compares its hidden states with "
            "those of transformers"
        )
    return family
