"""What a device allows at most: every step reads the weights and the KV rows once, and computes no faster than it can.

The roofline model (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785) with two limits, bandwidth and f16
arithmetic. Activations, and what attention reads beside K and V, are left out, so no run is faster than this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ziggurat.runtime.plan.kv import KVShape, bytes_per_token

#: The part of the roof at which llama.cpp decodes on an A40: 12.08 tokens/s of a 70B Q4_K_M (42.5 GB) at 696 GB/s.
LLAMA_CPP_SHARE = 0.73
#: Memory that is not for weights and rows, in bytes: compute buffers, logits, and what the driver takes. Assumed.
RESERVE = 3 * 2**29
_F32 = 4


@dataclass(frozen=True)
class Device:
    """Where a model runs: bytes per second, bytes for a model, and dense f16 operations per second.

    ``flops`` is None where it is not known; computing then takes no time. ``source`` says where the figures are from.
    """

    name: str
    title: str
    bandwidth: float
    memory: int
    flops: float | None
    source: str


#: Peak figures of their makers. A40: with ECC on, as it is delivered, 45 GiB are usable.
DEVICES = {
    device.name: device
    for device in (
        Device("a40", "NVIDIA A40", 696e9, 45 * 2**30, 149.7e12, "NVIDIA A40 datasheet (2022)"),
        Device("h200", "NVIDIA H200 SXM", 4.8e12, 141 * 10**9, 989.5e12, "NVIDIA H200 datasheet (2024)"),
        Device(
            "4090",
            "NVIDIA GeForce RTX 4090",
            1008e9,
            24 * 2**30,
            165.2e12,
            "NVIDIA Ada GPU architecture whitepaper, appendix A (f16 with f32 accumulation)",
        ),
    )
}


@dataclass(frozen=True)
class Demand:
    """What a model asks of a device.

    ``resident`` are bytes of all weights, ``step`` of those that every step reads, whatever its tokens (not the token
    embedding, of which it needs a row each), ``experts`` of the ``n_expert`` experts, of which a token passes
    ``n_expert_used``. ``layers`` and ``output`` are the weights that a token is multiplied with, in numbers. ``kv`` is
    None for models without attention.
    """

    name: str
    resident: int
    step: int
    layers: int
    output: int
    n_embd: int
    kv: KVShape | None
    experts: int = 0
    n_expert: int = 0
    n_expert_used: int = 0

    def weights_read(self, tokens: int) -> float:
        """Bytes of weights that a step of so many tokens reads; experts as if tokens chose among them by chance."""
        if not self.n_expert:
            return self.step
        untouched = (1 - self.n_expert_used / self.n_expert) ** tokens
        return self.step + self.experts * (1 - untouched)

    def rows(self, depth: int, kept: Sequence[int] | None = None) -> tuple[int, ...]:
        """Rows that each layer attends to behind ``depth`` tokens, of which it keeps at most ``kept``."""
        if self.kv is None:
            return ()
        bounds = kept or (depth,) * self.kv.n_layer
        return tuple(min(depth, bound, window or depth) for bound, window in zip(bounds, self.kv.window, strict=True))

    def row_bytes(self, rows: Sequence[int], type_k: str = "f16", type_v: str = "f16") -> int:
        """Bytes of so many K and V rows per layer."""
        if self.kv is None:
            return 0
        return sum(count * size for count, size in zip(rows, bytes_per_token(self.kv, type_k, type_v), strict=True))

    def attention(self, rows: Sequence[float]) -> float:
        """Operations of one token that attends to so many rows per layer."""
        if self.kv is None:
            return 0.0
        size = self.kv.key_length + self.kv.value_length
        return sum(2 * heads * size * count for heads, count in zip(self.kv.n_head, rows, strict=True))


@dataclass(frozen=True)
class Roof:
    """A decoding step at the roof: bytes and operations, and seconds for each; ``streams`` tokens come out of it."""

    streams: int
    weights: float
    kv: float
    flops: float
    read_s: float
    compute_s: float

    @property
    def bound(self) -> str:
        """What limits it."""
        return "compute" if self.compute_s > self.read_s else "memory"

    @property
    def seconds(self) -> float:
        """For a step."""
        return max(self.read_s, self.compute_s)

    @property
    def tokens_per_second(self) -> float:
        """Of all streams together."""
        return self.streams / self.seconds


def decode_roof(
    demand: Demand, device: Device, rows: Sequence[int], streams: int = 1, type_k: str = "f16", type_v: str = "f16"
) -> Roof:
    """Return the roof of decoding one token for each of ``streams`` that attend to ``rows`` rows per layer.

    Raises UnsupportedError for cache types whose blocks do not divide a row.
    """
    weights = demand.weights_read(streams)
    kv = float(streams * demand.row_bytes(rows, type_k, type_v))
    flops = streams * (2.0 * (demand.layers + demand.output) + demand.attention(rows))
    compute = flops / device.flops if device.flops else 0.0
    return Roof(streams, weights, kv, flops, (weights + kv) / device.bandwidth, compute)


def prompt_flops(demand: Demand, n_tokens: int, depth: int = 0) -> float:
    """Operations of reading ``n_tokens`` behind ``depth`` others; logits after the last one only.

    A sliding window bounds what is attended to. Exact prompts attend to everything before them, whatever is kept later.
    """
    flops = 2.0 * demand.layers * n_tokens + 2.0 * demand.output
    if demand.kv is None:
        return flops
    pairs = [_pairs(depth, n_tokens, window) for window in demand.kv.window]
    return flops + demand.attention(pairs)


def _pairs(depth: int, n_tokens: int, window: int) -> float:
    """Query-key pairs of a layer: the i-th token sees depth + i rows, at most the window."""
    if not window:
        return n_tokens * depth + n_tokens * (n_tokens + 1) / 2
    growing = min(max(window - depth, 0), n_tokens)
    return growing * depth + growing * (growing + 1) / 2 + (n_tokens - growing) * window


def prompt_seconds(demand: Demand, device: Device, n_tokens: int, depth: int = 0, n_ubatch: int = 512) -> float:
    """Return the least time that reading a prompt takes; the weights are read once for every ubatch."""
    reading = math.ceil(n_tokens / n_ubatch) * demand.weights_read(min(n_tokens, n_ubatch)) / device.bandwidth
    return max(reading, prompt_flops(demand, n_tokens, depth) / device.flops if device.flops else 0.0)


def stage_bytes(demand: Demand, n_tokens: int, type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes that the patched library needs while it reads a prompt exactly: one layer's rows and hidden states."""
    if demand.kv is None:
        return 0
    return n_tokens * (max(bytes_per_token(demand.kv, type_k, type_v)) + demand.n_embd * _F32)


def most_streams(
    demand: Demand,
    device: Device,
    rows: Sequence[int],
    type_k: str = "f16",
    type_v: str = "f16",
    *,
    staged: int = 0,
    reserve: int = RESERVE,
) -> int | None:
    """Return how many streams of ``rows`` rows per layer fit beside the weights, ``staged`` and ``reserve`` bytes.

    0 when not even one does, None where rows take nothing.
    """
    each = demand.row_bytes(rows, type_k, type_v)
    left = device.memory - demand.resident - reserve - staged
    if left < 0:
        return 0
    return left // each if each else None
