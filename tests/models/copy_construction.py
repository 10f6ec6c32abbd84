"""The weights of a Llama that copies exactly: which channel holds what, and which row reads it.

A prompt that says "... K V W ... K" is to be continued with "V W", wherever the first K stood. Two attention layers do
it, as in Olsson et al., "In-context Learning and Induction Heads" (2022); here they are written down, not trained.

Residual stream (hidden size D, code length n, channels in this order)

    cur    [0, n)     code of the token at this position, ±1               written by the embedding
    prev   [n, 2n)    code of the token one position earlier, ±1           written by the first layer's heads
    out    [2n, 3n)   code of the token to say next, ±1                    written by the second layer's heads
    const  3n         1 everywhere                                         written by the embedding
    spare  (3n, D)    0 (filler blocks may write here)

Every token's code has the same norm, so the RMS of the stream is the same at every position: sqrt((n + 1) / D) after
the embedding, sqrt((2n + 1) / D) after the first layer, sqrt((3n + 1) / D) after the second. A norm whose weights
are that RMS undoes its own division, and each reader sees the ±1 as they are.

RoPE turns the pair i of a head by f_i radians a position, f_i = theta ** (-2i / d). A large base (1e16 by default)
gives both kinds of pairs that are needed, also in 32 dimensions:

    fast   f_i * context > 0.1     these tell positions apart
    slow   f_i * context <= 0.1    these hardly notice the distance

Previous-token layer. Queries and keys read `const` only, so that they depend on the position alone. Key (1, 0) and
query (cos f_i, -sin f_i) in every fast pair: the score over a distance of x positions is A * sum_i cos(f_i (x - 1)),
and its only maximum is x = 1. A is chosen such that the second best distance stays `margin` nats behind. The first
position has nothing before it and attends to itself: BOS counts as its own predecessor. Values move cur to prev.

Match layer. Queries read `cur`, keys read `prev`, in the slow pairs: the score is B * <code(token here), code(token
before there)>, highest where the token that ends the prompt was followed by something. A code of distance h leaves
the others 2h * B behind, less what the slow rotation takes away; B makes that `margin` nats. Values move cur to out.

Head. Row t of lm_head reads `out` with the code of t: the right token leads by at least `logit_gap`.

Under GQA every KV head does the whole match by itself, carries the code's places j with j mod n_kv_heads = its number,
and each query head of its group writes an equal share. So every head of both layers has the same, known attention.

All weights are values that bf16 holds, and those that matter are normal numbers in F16: F32, BF16 and F16 files are
the same model. MLPs have random gates and a down projection of zeros. Filler blocks also have random queries, keys and
values, and an output projection of zeros, or of noise into the spare channels (`filler_noise`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from models.copy_code import MAX_LENGTH, Code, make_code

Array = npt.NDArray[np.float32]
# Radians a slow pair may turn over the whole context: cos 0.1 = 0.995.
SLOW_ANGLE = 0.1
NORM_EPS = 1e-6


@dataclass(frozen=True)
class CopyModel:
    """Sizes of an exact-copy model. Sizes that cannot work raise ValueError, with what to change."""

    vocab_size: int = 1024
    n_layers: int = 4
    hidden_size: int = 256
    ffn_size: int = 256
    head_dim: int = 64
    n_heads: int = 4
    n_kv_heads: int = 2
    copy_layers: tuple[int, int] = (1, 2)
    """Layers of the previous-token heads and of the match heads."""
    context: int = 65536
    """Positions the construction is laid out for."""
    rope_theta: float = 1e16
    margin: float = 32.0
    """Nats by which the right key's score leads, in both layers, at the full context."""
    logit_gap: float = 16.0
    filler_noise: float = 0.0
    """About what a filler block adds to each spare channel, relative to the code's 1."""
    seed: int = 0

    def __post_init__(self) -> None:
        first, second = self.copy_layers
        checks = {
            "n_heads must be a multiple of n_kv_heads": self.n_heads % self.n_kv_heads == 0,
            "head_dim must be even": self.head_dim % 2 == 0,
            "copy_layers must be two different layers, in order": 0 <= first < second < self.n_layers,
            "vocab_size must hold 3 special tokens, 256 bytes and some words: 320 at least": self.vocab_size >= 320,
            "context must be 2 at least": self.context >= 2,
            "every head dimension is slow (or none): change rope_theta or context": 0 < self.n_fast < self.n_pairs,
        }
        for message, fine in checks.items():
            if not fine:
                raise ValueError(message)
        _ = self.code  # raises where the code does not fit

    @property
    def n_pairs(self) -> int:
        return self.head_dim // 2

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.n_heads // self.n_kv_heads

    @cached_property
    def frequencies(self) -> npt.NDArray[np.float64]:
        """Radians by which RoPE turns each pair in one position, (head_dim / 2,)."""
        return float(self.rope_theta) ** (-2.0 * np.arange(self.n_pairs) / self.head_dim)

    @property
    def n_fast(self) -> int:
        return int((self.frequencies * self.context > SLOW_ANGLE).sum())

    @cached_property
    def code(self) -> Code:
        """The tokens' code: as long as slow dimensions, values, channels and 64 places allow."""
        places = 2 * (self.n_pairs - self.n_fast), self.n_kv_heads * self.head_dim, (self.hidden_size - 1) // 3
        try:
            return make_code(self.vocab_size, min(MAX_LENGTH, *places), self.seed)
        except ValueError as error:
            names = "2 * slow pairs, n_kv_heads * head_dim, (hidden_size - 1) / 3"
            raise ValueError(f"{error}; the length is the least of {names} = {places}") from error

    @property
    def n_code(self) -> int:
        return int(self.code.words.shape[1])

    def rms(self, parts: int) -> float:
        """RMS of the residual stream that holds the constant and this many codes."""
        return math.sqrt((parts * self.n_code + 1) / self.hidden_size + NORM_EPS)

    @cached_property
    def match_dims(self) -> npt.NDArray[np.int64]:
        """Head dimension of each place of the code: pairs (i, i + head_dim / 2), the slowest first, (n_code,)."""
        pairs = self.n_pairs - 1 - np.arange(self.n_code) // 2
        return pairs + self.n_pairs * (np.arange(self.n_code) % 2)

    @cached_property
    def sharpness(self) -> tuple[float, float]:
        """The factors A and B of the two layers' scores that give `margin`; see the module's text."""
        fast = self.frequencies[: self.n_fast]
        gap = min(float((len(fast) - _cosines(fast, x)).min()) for x in distances(self.context))
        return self.margin / gap, self.margin / self.match_gap(self.context)

    def match_gap(self, length: int) -> float:
        """Least lead of the right key, for B = 1, in a prompt of `length` tokens: a bound over all prompts.

        A pair where both places are right scores 2 cos(angle) at the right key and at most 2 at a wrong one; of a
        pair with one place different at most 2 sin(angle) is left, with both at most -2 cos(angle): 2 (1 - sin) less
        for every place that differs, at least.
        """
        angles = np.minimum(self.frequencies[self.match_dims % self.n_pairs] * (length - 1), math.pi / 2)
        lost = np.sort(2 * (1 - np.sin(angles)))[: self.code.distance].sum()
        return float(lost - (1 - np.cos(angles)).sum())


def distances(length: int) -> Iterator[npt.NDArray[np.float64]]:
    """Distances from the position before: -1 (the position itself), then 1 ... length - 2, in parts."""
    yield np.array([-1.0])
    for start in range(1, length - 1, 1 << 16):
        yield np.arange(start, min(length - 1, start + (1 << 16)), dtype=np.float64)


def _cosines(frequencies: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sums: npt.NDArray[np.float64] = np.cos(x[:, None] * frequencies).sum(1)
    return sums


def tensors(model: CopyModel) -> Iterator[tuple[str, Array]]:
    """Give every tensor under its Hugging Face name, rounded to bf16 values, one after the other."""
    rng = np.random.default_rng([model.seed, 1])
    n, width = model.n_code, model.hidden_size
    embedding = np.zeros((model.vocab_size, width), np.float32)
    embedding[:, :n] = model.code.words
    embedding[:, 3 * n] = 1.0
    yield "model.embed_tokens.weight", embedding
    for layer in range(model.n_layers):
        prefix = f"model.layers.{layer}."
        make = {model.copy_layers[0]: _previous, model.copy_layers[1]: _match}.get(layer)
        weights = _filler(model, rng) if make is None else make(model)
        for name, weight in weights.items():
            yield prefix + name, to_bf16_values(weight)
        yield prefix + "post_attention_layernorm.weight", np.ones(width, np.float32)
        yield prefix + "mlp.gate_proj.weight", to_bf16_values(_noise(rng, model.ffn_size, width))
        yield prefix + "mlp.up_proj.weight", to_bf16_values(_noise(rng, model.ffn_size, width))
        yield prefix + "mlp.down_proj.weight", np.zeros((width, model.ffn_size), np.float32)
    yield "model.norm.weight", to_bf16_values(np.full(width, model.rms(3)))
    head = np.zeros((model.vocab_size, width))
    head[:, 2 * n : 3 * n] = model.code.words * (model.logit_gap / (2 * model.code.distance))
    yield "lm_head.weight", to_bf16_values(head)


def to_bf16_values(weight: npt.NDArray[np.floating]) -> Array:
    """Round to the nearest values that bf16 holds (ties to even), as F32."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    values: Array = (rounded & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def _noise(rng: np.random.Generator, rows: int, columns: int) -> Array:
    weight: Array = rng.standard_normal((rows, columns), np.float32) / np.float32(math.sqrt(columns))
    return weight


def _empty(model: CopyModel, norm: float) -> dict[str, Array]:
    width, keys = model.hidden_size, model.n_kv_heads * model.head_dim
    return {
        "input_layernorm.weight": np.full(width, norm, np.float32),
        "self_attn.q_proj.weight": np.zeros((model.n_heads * model.head_dim, width), np.float32),
        "self_attn.k_proj.weight": np.zeros((keys, width), np.float32),
        "self_attn.v_proj.weight": np.zeros((keys, width), np.float32),
        "self_attn.o_proj.weight": np.zeros((width, model.n_heads * model.head_dim), np.float32),
    }


def _heads(model: CopyModel, weight: Array, n_heads: int) -> Array:
    """The rows of q, k or v by head: a view, (heads, head_dim, hidden)."""
    return weight.reshape(n_heads, model.head_dim, model.hidden_size)


def _previous(model: CopyModel) -> dict[str, Array]:
    weights = _empty(model, model.rms(1))
    fast, half, const = np.arange(model.n_fast), model.n_pairs, 3 * model.n_code
    # attention divides by sqrt(head_dim); the rest is shared evenly by query and key
    size = math.sqrt(model.sharpness[0] * math.sqrt(model.head_dim))
    query = _heads(model, weights["self_attn.q_proj.weight"], model.n_heads)
    query[:, fast, const] = size * np.cos(model.frequencies[fast])
    query[:, fast + half, const] = -size * np.sin(model.frequencies[fast])
    _heads(model, weights["self_attn.k_proj.weight"], model.n_kv_heads)[:, fast, const] = size
    _copy(model, weights, to=model.n_code)
    return weights


def _match(model: CopyModel) -> dict[str, Array]:
    weights = _empty(model, model.rms(2))
    places = np.arange(model.n_code)
    size = math.sqrt(model.sharpness[1] * math.sqrt(model.head_dim))
    _heads(model, weights["self_attn.q_proj.weight"], model.n_heads)[:, model.match_dims, places] = size
    keys = _heads(model, weights["self_attn.k_proj.weight"], model.n_kv_heads)
    keys[:, model.match_dims, model.n_code + places] = size
    _copy(model, weights, to=2 * model.n_code)
    return weights


def _copy(model: CopyModel, weights: dict[str, Array], to: int) -> None:
    """Values and output projection that add `cur` of the attended position to the channels from `to` on."""
    places = np.arange(model.n_code)
    kv_head, slot = places % model.n_kv_heads, places // model.n_kv_heads
    _heads(model, weights["self_attn.v_proj.weight"], model.n_kv_heads)[kv_head, slot, places] = 1.0
    for member in range(model.group):
        column = (kv_head * model.group + member) * model.head_dim + slot
        weights["self_attn.o_proj.weight"][to + places, column] = 1.0 / model.group


def _filler(model: CopyModel, rng: np.random.Generator) -> dict[str, Array]:
    weights = _empty(model, 1.0)
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        weights[name][:] = _noise(rng, *weights[name].shape)
    if model.filler_noise:
        output = weights["self_attn.o_proj.weight"]
        spare = slice(3 * model.n_code + 1, None)
        output[spare] = model.filler_noise * _noise(rng, *output.shape)[spare]
    return weights
