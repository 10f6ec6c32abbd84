"""Tiny random checkpoints of the families the converter is tested on, as folders that look like hub repositories.

Widths are multiples of 256, so that K-quants apply. Nothing is left at its initial value: norm weights and biases are
random too, otherwise a bias that gets lost, or a "+ 1" that is applied twice, would not show in the logits.

`save_pretrained` of transformers 5 writes a config that repositories made before it do not have (`rope_parameters`,
`dtype`, other names for the number of experts). `build` writes the classic form; `build(..., config="saved")` keeps
what the installed transformers writes. The tensors need no such care: it restores the classic names when it saves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from helpers.vocabularies import special_ids, tokenizer_size, write_tokenizer

CLASSIC_VERSION = "4.48.0"

_COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "head_dim",
    "query_pre_attn_scalar",
    "n_embd",
    "d_model",
    "d_kv",
    "d_ff",
)
_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """How to make one family's checkpoint; `options` go to its config class, `classic` into the classic config.json."""

    model: type[transformers.PreTrainedModel]
    config: type[transformers.PretrainedConfig]
    tokenizer: str
    options: dict[str, Any]
    classic: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()  # keys of the saved config that classic ones do not have
    norm_offset: float = 1.0  # what norm weights are centred on; Gemma stores weight - 1
    padded_vocab: int = 0  # rows of the embedding beyond the tokenizer's ids, as in Qwen's checkpoints
    causal: bool = True
    seed: int = 0  # for mixtures of experts: one that keeps most tokens of the tests' prompt away from routing ties


FAMILIES: dict[str, Family] = {
    "llama_tied": Family(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        "llama3",
        {**_COMMON, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "llama_untied": Family(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        "llama2",
        {**_COMMON, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "llama_gqa": Family(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        "llama3",
        {**_COMMON, "num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 500000.0},
    ),
    "llama31_rope": Family(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        "llama3",
        {**_COMMON, "rope_theta": 500000.0, "rope_scaling": dict(_LLAMA31_ROPE), "tie_word_embeddings": True},
    ),
    "mistral": Family(
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        "mistral",
        {**_COMMON, "rope_theta": 1000000.0, "sliding_window": None, "head_dim": 64},
    ),
    "qwen2": Family(
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        "qwen2",
        {**_COMMON, "rope_theta": 1000000.0, "tie_word_embeddings": True},
        dropped=("layer_types",),
        padded_vocab=21,
    ),
    "qwen3": Family(
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        "qwen3",
        {**_COMMON, "rope_theta": 1000000.0, "head_dim": 128, "tie_word_embeddings": False},
        dropped=("layer_types",),
        padded_vocab=17,
    ),
    "gemma2": Family(
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        "gemma",
        {**_COMMON, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16},
        dropped=("layer_types", "use_bidirectional_attention"),
        norm_offset=0.0,
    ),
    "gemma3": Family(
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        "gemma3",
        # every sixth layer looks at the whole context, so six is the least that has both kinds
        {**_COMMON, "num_hidden_layers": 6, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16},
        classic={"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
        dropped=("layer_types", "use_bidirectional_attention", "_sliding_window_pattern"),
        norm_offset=0.0,
    ),
    "olmo2": Family(
        transformers.Olmo2ForCausalLM,
        transformers.Olmo2Config,
        "llama3",
        {**_COMMON, "rope_theta": 500000.0, "tie_word_embeddings": False},
    ),
    "phi3": Family(
        transformers.Phi3ForCausalLM,
        transformers.Phi3Config,
        "phi3",
        {**_COMMON, "num_key_value_heads": 4, "sliding_window": 511, "original_max_position_embeddings": 512},
    ),
    "mixtral": Family(
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        "llama2",
        {**_COMMON, "rope_theta": 1000000.0, "num_local_experts": 4, "num_experts_per_tok": 2},
        dropped=("head_dim",),
        seed=1,
    ),
    "qwen3_moe": Family(
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        "qwen3",
        {
            **_COMMON,
            "rope_theta": 1000000.0,
            "head_dim": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
        },
        classic={"num_experts": 8},
        dropped=("num_local_experts",),
        seed=5,
    ),
    "gpt2": Family(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        "gpt2",
        {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512},
        classic={"n_ctx": 512},
    ),
    # an encoder and a decoder: here for its tokenizer, the one that upstream writes from a SentencePiece unigram model
    "t5": Family(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        "t5",
        {
            "d_model": 256,
            "d_kv": 64,
            "d_ff": 512,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        classic={"n_positions": 512},
        causal=False,
    ),
}


def build(
    name: str,
    folder: Path,
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    config: Literal["classic", "saved"] = "classic",
    tokenizer: str | None = None,
    max_shard_size: str = "5GB",
    layers: int | None = None,
    narrow: bool = False,
) -> Path:
    """Write the checkpoint of family `name` into `folder`, with its tokenizer or another, and return the folder.

    `layers` makes it another number of blocks deep; `narrow` makes all widths a quarter, too little for K-quants.
    """
    family = FAMILIES[name]
    tokenizer = tokenizer or family.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = tokenizer_size(tokenizer) + family.padded_vocab
    ids = special_ids(tokenizer)
    options = dict(family.options)
    if layers is not None:
        options["n_layer" if "n_layer" in options else "num_hidden_layers"] = layers
    if narrow:
        options.update({name: options[name] // 4 for name in _WIDTHS if name in options})
    settings = family.config(vocab_size=vocab_size, **ids, **options)
    with _quiet():
        model = family.model(settings)
        randomize(model, family.seed, family.norm_offset)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(tokenizer, folder)
    if config == "classic":
        path = folder / "config.json"
        path.write_text(json.dumps(_classic(json.loads(path.read_text()), family), indent=2))
    return folder


def randomize(model: torch.nn.Module, seed: int, norm_offset: float) -> None:
    """Fill every parameter so that each one matters for the logits and none drowns the others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("bias"):
                scale, offset = 0.2, 0.0
            elif weight.dim() == 1:
                scale, offset = 0.2, norm_offset
            elif "embed" in name or ".wte." in name or ".wpe." in name or name.startswith("lm_head"):
                scale, offset = 0.15, 0.0
            elif name.endswith("mlp.gate.weight"):
                # the router: far enough from ties that rounding seldom sends a token to another expert
                scale, offset = 6 * weight.shape[-1] ** -0.5, 0.0
            else:
                # fused experts are (experts, out, in) and GPT-2's Conv1D is (in, out): both sides are about as wide
                scale, offset = weight.shape[-1] ** -0.5, 0.0
            weight.copy_(noise * scale + offset)


def _classic(config: dict[str, Any], family: Family) -> dict[str, Any]:
    rope = config.pop("rope_parameters", None)
    if rope is not None and "full_attention" not in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        rope.pop("partial_rotary_factor", None)
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    for key in family.dropped:
        config.pop(key, None)
    return {**config, **family.classic, "transformers_version": CLASSIC_VERSION}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice out of the tests' output."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Reference:
    """What transformers computes in F32: logits (tokens, vocabulary), and for each token by how much the last expert
    that was chosen beat the first that was not, in router logits, in the layer where that was closest."""

    logits: torch.Tensor
    margins: torch.Tensor | None

    def clear(self, margin: float) -> int:
        """Number of leading tokens before the first whose routing could go the other way."""
        if self.margins is None:
            return len(self.logits)
        unclear = (self.margins < margin).nonzero()
        return len(self.logits) if len(unclear) == 0 else int(unclear[0])


def reference(folder: Path, tokens: list[int], *, without: tuple[int, ...] = ()) -> Reference:
    """Run the checkpoint in transformers, in F32, on one prompt; `without` names blocks that are left out."""
    with _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    experts = getattr(model.config, "num_experts_per_tok", None)
    if without:
        owner, name = (model.transformer, "h") if hasattr(model, "transformer") else (model.model, "layers")
        kept = [block for i, block in enumerate(getattr(owner, name)) if i not in without]
        setattr(owner, name, torch.nn.ModuleList(kept))
        model.config.num_hidden_layers = len(kept)  # the blocks are counted by it
    with torch.no_grad():
        wanted: dict[str, Any] = {"output_router_logits": True} if experts else {}
        output = model(torch.tensor([tokens]), use_cache=False, **wanted)
    margins = None
    if experts:
        best = torch.stack([r.topk(experts + 1).values for r in output.router_logits])
        margins = (best[..., experts - 1] - best[..., experts]).min(0).values
    return Reference(output.logits[0], margins)
