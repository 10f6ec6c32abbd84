"""The reference model: Llama in plain PyTorch, with the parameter names and the arithmetic of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Everything that fixes the parameters' shapes, and the base of the rotary embedding."""

    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 512
    vocab: int = 2048
    rope_base: float = 1e8
    context: int = 4096


class RMSNorm(nn.Module):
    """Root mean square norm with a weight per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, dimension i paired with i + head_dim / 2. x: [..., length, head_dim]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, rows, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_rows, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_rows, bias=False)
        self.o_proj = nn.Linear(rows, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, length, hidden] to the same shape."""
        batch, length, _ = x.shape
        group = self.shape.heads // self.shape.kv_heads

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, self.shape.head_dim).transpose(1, 2)

        q = rotate(split(self.q_proj(x)), cos, sin)
        k = rotate(split(self.k_proj(x)), cos, sin).repeat_interleave(group, 1)
        v = split(self.v_proj(x)).repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One pre-norm decoder block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dropout: float) -> Tensor:
        """[batch, length, hidden] to the same shape; `dropout` of what the MLP adds.

        The attention has none: copying needs every channel, and texts are learnt by heart in the MLPs.
        """
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), dropout)


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)


class Llama(nn.Module):
    """The whole model; its state dict has the names of transformers' LlamaForCausalLM."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = 0.0  # only while training
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Random weights; the projections back into the residual stream are zero, so every block starts as identity."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                std = 1.0 if "embed" in name else 0.02 if "lm_head" in name else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)

    def attention(self, block: int) -> Attention:
        """The attention of a block."""
        layer = self.model.layers[block]
        assert isinstance(layer, Block)
        return layer.self_attn

    def states(self, ids: Tensor, blocks: int | None = None) -> Tensor:
        """The residual stream [batch, length, hidden] after `blocks` blocks (all of them by default).

        ids: [batch, length].
        """
        half = torch.arange(0, self.shape.head_dim, 2, device=ids.device).float()
        angle = torch.outer(
            torch.arange(ids.shape[1], device=ids.device).float(), self.shape.rope_base ** (-half / self.shape.head_dim)
        )
        x: Tensor = self.model.embed_tokens(ids)
        # The residual stream stays in the narrow type under autocast: twice as fast, and as good here.
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        dropout = self.dropout if self.training else 0.0
        for block in self.model.layers[:blocks]:
            x = block(x, cos, sin, dropout)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, length, vocab] of ids [batch, length]."""
        out: Tensor = self.lm_head(self.model.norm(self.states(ids)))
        return out

    def losses(self, ids: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy, weight and whether the best token is right, for the positions with a weight: each [n]."""
        keep = weights.reshape(-1) > 0
        states = self.states(ids).reshape(-1, self.shape.hidden)[keep]
        logits = self.lm_head(self.model.norm(states)).float()
        wanted = targets.reshape(-1)[keep]
        loss = F.cross_entropy(logits, wanted, reduction="none")
        return loss, weights.reshape(-1)[keep], logits.detach().argmax(-1) == wanted


def save_model(model: Llama, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16)."""
    shape = model.shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_base,
        "rms_norm_eps": NORM_EPS,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 4,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    generation = {"bos_token_id": 0, "eos_token_id": [4, 1], "pad_token_id": 1, "do_sample": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def load_model(folder: Path) -> Llama:
    """Read a folder that `save_model` wrote, into float32."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        ffn=config["intermediate_size"],
        vocab=config["vocab_size"],
        rope_base=config["rope_theta"],
        context=config["max_position_embeddings"],
    )
    model = Llama(shape)
    model.load_state_dict({k: v.float() for k, v in load_file(str(folder / "model.safetensors")).items()})
    return model
