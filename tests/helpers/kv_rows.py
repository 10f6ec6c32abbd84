"""The bytes of a sequence's rows, out of a saved state, and what the reference makes of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt

from helpers.kv_library import Budget, BudgetContext
from helpers.kv_reference import RING_SPARE, Array, ReferenceSequence, Rows, Weights

Bytes = npt.NDArray[np.uint8]
_PLAIN: dict[str, type[np.floating]] = {"f16": np.float16, "f32": np.float32}


@dataclass(frozen=True)
class LayerBytes:
    """One layer of a sequence: bytes of K and V, (KV heads, rows, bytes), and the last queries, (heads, n, d)."""

    keys: Bytes
    values: Bytes
    queries: Array


class _Reader:
    def __init__(self, state: bytes) -> None:
        self._state, self.at = state, 0

    def take(self, size: int) -> bytes:
        self.at += size
        return self._state[self.at - size : self.at]

    def numbers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.take(4 * count))

    def floats(self, name: str, *extents: int) -> Array:
        dtype = np.dtype(_PLAIN[name])
        return np.frombuffer(self.take(dtype.itemsize * int(np.prod(extents))), dtype).reshape(extents).astype(float)


def head_bytes(name: str, head_dim: int) -> int:
    """Bytes of one head of a row of this type."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    return int(head_dim // block * size)


def values_of(rows: Bytes, name: str) -> Array:
    """The values of rows, (KV heads, rows, head_dim)."""
    flat = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
    kind = gguf.GGMLQuantizationType[name.upper()]
    found = flat.view(_PLAIN[name]) if name in _PLAIN else gguf.quants.dequantize(flat, kind)
    return found.reshape(*rows.shape[:2], -1).astype(np.float64)


#: Before the sequence's numbers in a state of three layers or two: headers, what identifies the context, a count.
def numbers_at(n_layer: int) -> int:
    return 8 + 4 * (2 + 10 + 8 * n_layer + 1)


def layers_of(state: bytes, weights: Weights, budget: Budget, types: tuple[str, str]) -> Iterator[LayerBytes]:
    """What a state of one sequence holds, as ``ziggurat-kv-state.cpp`` writes it."""
    reader = _Reader(state)
    reader.take(numbers_at(weights.n_layer))
    n_tokens, queries_from = reader.numbers(2)
    counts = [reader.numbers(3) for _ in range(weights.n_layer)]
    n_ring = budget.window + RING_SPARE
    n = n_tokens - queries_from if budget.score == "snapkv" else 0
    ends = min(n, n_ring - queries_from % n_ring)  # then the ring begins anew
    d = weights.head_dim
    for (used, fixed, _), heads, kv_heads in zip(counts, weights.heads, weights.kv_heads, strict=True):
        both = []
        for name in types:
            size = head_bytes(name, d)
            raw = np.frombuffer(reader.take(used * kv_heads * size), np.uint8)
            both.append(raw.reshape(used, kv_heads, size).swapaxes(0, 1))
        reader.take(4 * fixed * kv_heads)  # positions
        kind = "f32" if types[0] == "f32" else "f16"
        queries = np.concatenate([reader.floats(kind, part, heads, d) for part in (ends, n - ends)])
        yield LayerBytes(both[0], both[1], queries.swapaxes(0, 1))
    assert reader.at == len(state)


def layers_in(
    context: BudgetContext, weights: Weights, budget: Budget, types: tuple[str, str], sequence: int = 0
) -> list[LayerBytes]:
    """What a context holds of a sequence."""
    return list(layers_of(context.saved(sequence), weights, budget, types))


def reference_of(
    weights: Weights, budget: Budget, types: tuple[str, str], rows: list[LayerBytes], queries: list[LayerBytes]
) -> ReferenceSequence:
    """The reference as if its cache were this one: whole, of the values that were stored."""
    sequence = ReferenceSequence(weights, budget)
    sequence.n = rows[0].keys.shape[1]
    sequence.layers = [
        Rows(
            values_of(layer.keys, types[0]),
            values_of(layer.values, types[1]),
            np.tile(np.arange(sequence.n, dtype=np.int32), (len(layer.keys), 1)),
            observed.queries,
            np.zeros((len(layer.keys), sequence.n)),
        )
        for layer, observed in zip(rows, queries, strict=True)
    ]
    return sequence
