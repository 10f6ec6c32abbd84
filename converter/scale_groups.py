"""Which tensors share activation-aware scales: one entry per architecture, as data.

A group is a place where a vector of scales can be divided out of what writes some channels and multiplied into the
columns of everything that reads them, so that the model computes the same (AWQ, arXiv:2306.00978). Names are those of
GGUF tensors within a block. The final norm is in no group: its reader may be the token embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from ziggurat.converter.checkpoint import Checkpoint


@dataclass(frozen=True)
class Group:
    """One vector of scales, with one entry per channel (and expert)."""

    writer: str
    """What is divided: the last rows of this tensor's weight and bias, as many as there are scales. Where several
    matrices are stored as one (q, k and v; gate and up), the one that is meant comes last. Names the group too."""
    readers: tuple[str, ...]
    """The matrices whose columns are multiplied: all that read the channels, routers of experts among them."""
    values: bool = False
    """Whether the channels are those of KV heads, which are read once for each of their query heads."""
    per_expert: bool = False
    """Whether every expert has scales of its own."""


_VALUES, _UP = Group("attn_v", ("attn_output",), values=True), Group("ffn_up", ("ffn_down",))
_QKV = Group("attn_norm", ("attn_q", "attn_k", "attn_v"))
_DENSE = (_QKV, _VALUES, Group("ffn_norm", ("ffn_gate", "ffn_up")), _UP)
_EXPERTS = (
    _QKV,
    _VALUES,
    Group("ffn_norm", ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps")),
    Group("ffn_up_exps", ("ffn_down_exps",), per_expert=True),
)
_FUSED = (
    Group("attn_norm", ("attn_qkv",)),
    Group("attn_qkv", ("attn_output",), values=True),
    Group("ffn_norm", ("ffn_up",)),
)

GROUPS: dict[str, tuple[Group, ...]] = {
    "LlamaForCausalLM": _DENSE,
    "MistralForCausalLM": _DENSE,
    "Qwen2ForCausalLM": _DENSE,
    "Qwen3ForCausalLM": _DENSE,
    "Phi3ForCausalLM": (*_FUSED, _UP),
    "Gemma2ForCausalLM": _DENSE,
    "Gemma3ForCausalLM": _DENSE[1:],  # scaling what q, k and v read has measured worse there
    "MixtralForCausalLM": _EXPERTS,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "Olmo2ForCausalLM": (_VALUES, _UP),  # its norms stand behind attention and feed-forward part
    "GPT2LMHeadModel": _FUSED,  # a nonlinearity stands between up and down
}


def find(checkpoint: Checkpoint) -> tuple[Group, ...]:
    """The groups of a checkpoint's blocks; none if its architecture is not in the table."""
    return GROUPS.get(checkpoint.architecture, ())
