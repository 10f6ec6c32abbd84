"""Copying heads by construction: where the training of the reference model starts from.

Four blocks are enough to continue a passage that occurred before ("induction", Olsson et al. 2022, here with a window
of ten tokens instead of one, so that the key of a fact is still in view at the last digit of its code):

    block 0  four heads look 1, 2, 3 and 4 tokens back and write what they see, each through its own rotation, into
             the signature; the embedding holds the rotation for the token itself
    block 1  a head looks 5 tokens back at the signature and adds it, rotated once more: ten tokens are covered
    block 2  a head looks 1 token back and stores that token's signature apart, as the address of the token here
    block 3  two heads compare their signature with all addresses and copy the code of the token found to the output

Looking back uses the fast pairs of the rotary embedding on a constant channel; comparing uses the slow pairs, which
hardly turn within the context. All of it is only a start: every weight is trained afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from model import Attention, Llama
from torch import Tensor

CODE = 64  # channels of a token's code, its signature and its address
CONSTANT = 127  # the channel that is the same for every token
CODE_AT, SIGNATURE_AT, ADDRESS_AT = 0, 128, 192
KEY_SCALE, OTHER_SCALE = 1.5, 0.6  # words that tell facts apart get longer codes


@dataclass(frozen=True)
class Sharpness:
    """How sure the heads are to begin with; the values were tried on notebooks of 128 to 2048 tokens."""

    position: float = 12.0  # nats per fast pair when looking back
    fast_pairs: int = 8
    match: float = 2.0  # nats per matching token of scale 1
    copy: float = 3.0  # length of the copied code against the embedding's
    logit: float = 0.12


def install(
    model: Llama,
    sample: Tensor,
    keys: Sequence[int],
    generator: torch.Generator,
    sharpness: Sharpness | None = None,
) -> None:
    """Overwrite the embedding, the output matrix and attention weights of blocks 0 to 3 with copying heads.

    Args:
        model: initialised; hidden 256, head_dim 64, at least 4 heads on 2 key heads.
        sample: token ids [batch, length], on which the scale of the residual stream is measured.
        keys: ids of the tokens that tell facts apart.
        generator: where the random codes come from.
        sharpness: see there.

    Raises:
        ValueError: the model has another shape.
    """
    shape = model.shape
    if (shape.hidden, shape.head_dim, shape.kv_heads) != (256, CODE, 2) or shape.heads < 4 or shape.layers < 4:
        raise ValueError(f"copying heads are laid out for hidden 256, head_dim 64, 4 heads on 2: not for {shape}")
    builder = _Builder(model, sample, generator, sharpness or Sharpness())
    with torch.no_grad():
        builder.embed(keys)
        builder.look_back(0, {0: 1, 1: 2, 2: 3, 3: 4}, CODE_AT, SIGNATURE_AT, builder.turns[1:])
        builder.look_back(1, {0: 5}, SIGNATURE_AT, SIGNATURE_AT, [builder.step])
        builder.look_back(2, {0: 1}, SIGNATURE_AT, ADDRESS_AT, [torch.eye(CODE)])
        builder.match(3)


class _Builder:
    """The pieces of the construction on one model."""

    def __init__(self, model: Llama, sample: Tensor, generator: torch.Generator, sharpness: Sharpness) -> None:
        self.model, self.sample, self.generator, self.sharpness = model, sample, generator, sharpness
        self.turns = [self.rotation() for _ in range(5)]
        self.step = self.rotation()
        dim = model.shape.head_dim
        self.frequencies = model.shape.rope_base ** (-torch.arange(0, dim, 2).float() / dim)

    def rotation(self) -> Tensor:
        """A random orthogonal matrix [CODE, CODE]."""
        q: Tensor = torch.linalg.qr(torch.randn(CODE, CODE, generator=self.generator)).Q
        return q

    def scale(self, block: int) -> float:
        """Root mean square of the residual stream that `block` reads: what its norm divides by."""
        return float(self.model.states(self.sample, block).square().mean(-1).sqrt().mean())

    def embed(self, keys: Sequence[int]) -> None:
        """Codes, signatures and the constant; all rows equally long, since the norm would undo the codes' scales."""
        table, out = self.model.model.embed_tokens.weight, self.model.lm_head.weight
        unit = torch.randn(table.shape[0], CODE, generator=self.generator)
        unit = unit / unit.square().mean(1, keepdim=True).sqrt()
        scale = torch.full((table.shape[0], 1), OTHER_SCALE)
        scale[list(keys)] = KEY_SCALE
        rest = torch.randn(table.shape[0], CODE - 1, generator=self.generator)
        length = (2 * CODE * (KEY_SCALE**2 - scale**2) + 0.5 * CODE).sqrt()
        table.zero_()
        table[:, CODE_AT : CODE_AT + CODE] = unit * scale
        table[:, CODE:CONSTANT] = rest / rest.norm(dim=1, keepdim=True) * length
        table[:, CONSTANT] = 4.0
        table[:, SIGNATURE_AT : SIGNATURE_AT + CODE] = unit * scale @ self.turns[0].T
        out[:, ADDRESS_AT : ADDRESS_AT + CODE] += unit * self.sharpness.logit

    def attention(self, block: int, heads: Sequence[int]) -> Attention:
        """The attention of a block, with the queries, keys and values of the used heads' groups cleared."""
        attention = self.model.attention(block)
        group = self.model.shape.heads // self.model.shape.kv_heads
        for head in heads:
            attention.q_proj.weight[self.rows(head)] = 0
            attention.k_proj.weight[self.rows(head // group)] = 0
            attention.v_proj.weight[self.rows(head // group)] = 0
        return attention

    def rows(self, head: int) -> slice:
        """The rows of a projection that belong to a head."""
        return slice(head * CODE, (head + 1) * CODE)

    def look_back(self, block: int, offsets: dict[int, int], read: int, write: int, turns: Sequence[Tensor]) -> None:
        """Head h attends to the token offsets[h] back, reads channels at `read`, and writes turns[i] of them."""
        attention, scale = self.attention(block, list(offsets)), self.scale(block)
        group = self.model.shape.heads // self.model.shape.kv_heads
        pairs = self.sharpness.fast_pairs
        # A score is q.k / sqrt(head_dim); the constant channel holds 4 / scale after the norm.
        size = (self.sharpness.position * CODE**0.5) ** 0.5 * scale / 4.0
        for (head, offset), turn in zip(offsets.items(), turns, strict=True):
            query, key = self.rows(head).start, self.rows(head // group).start
            angle = self.frequencies[:pairs] * offset
            attention.q_proj.weight[query : query + pairs, CONSTANT] = size * angle.cos()
            attention.q_proj.weight[query + CODE // 2 : query + CODE // 2 + pairs, CONSTANT] = -size * angle.sin()
            attention.k_proj.weight[key : key + pairs, CONSTANT] = size
            attention.v_proj.weight[self.rows(head // group), read : read + CODE] = scale * torch.eye(CODE)
            attention.o_proj.weight[write : write + CODE, self.rows(head)] = turn

    def match(self, block: int) -> None:
        """One head per group finds the address most like the own signature and copies the code found there."""
        attention, scale = self.attention(block, [0, 2]), self.scale(block)
        slow = torch.nonzero(self.frequencies * self.model.shape.context < 0.6).flatten()
        dims = torch.cat([slow, slow + CODE // 2])
        # A code of scale 1 has the squared length CODE, of which len(dims) / CODE survives the projection.
        size = (self.sharpness.match * CODE**0.5 / len(dims)) ** 0.5 * scale
        for head, kv in ((0, 0), (2, 1)):
            look = self.rotation()[: len(dims)] * size
            attention.q_proj.weight[self.rows(head).start + dims, SIGNATURE_AT : SIGNATURE_AT + CODE] = look
            attention.k_proj.weight[self.rows(kv).start + dims, ADDRESS_AT : ADDRESS_AT + CODE] = look
            attention.v_proj.weight[self.rows(kv), CODE_AT : CODE_AT + CODE] = scale * torch.eye(CODE)
            found = self.sharpness.copy * torch.eye(CODE)
            attention.o_proj.weight[ADDRESS_AT : ADDRESS_AT + CODE, self.rows(head)] = found
