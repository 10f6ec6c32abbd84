"""What a KV budget takes: arithmetic over the formulas of the patched library's cache (``ziggurat-kv-cache.cpp``).

Rows are allocated per layer, with room for generated tokens, and beside them what selecting needs: positions of the
rows that were selected, per KV head, and, by the score, the queries of each sequence's last tokens and sums of
attention. A prompt is read through the stage, which holds one layer, with its hidden states between the layers; models
whose graph is not cut into layers get a lane instead, a full cache for one prompt. If its sequence is not empty it is
read into a copy of it. All of that is there for as many prompts as may be read at a time. Layers with a sliding window
have no budget: they keep the rows of the window and of a ubatch, and prompts are read where those are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ziggurat.runtime.bindings.context_settings import ContextSettings
from ziggurat.runtime.bindings.kv_settings import KVSettings
from ziggurat.runtime.plan.kv import CACHE_TYPE_BLOCKS, KVShape, bytes_per_token, kv_bytes, padded, row_bytes

_POSITION, _SUM, _HIDDEN, _SCORED = 4, 4, 4, 4
_RING_SPARE = 16  # queries kept beyond the window
_ALIGNMENT = 128  # no backend that is known aligns tensors to more


@dataclass(frozen=True)
class BudgetMemory:
    """Bytes that a context with a budget takes, of all its sequences together; see ``KVLayout`` for the parts.

    ``capacity`` are rows allocated per layer and sequence, and ``rows``, ``positions``, ``queries``, ``sums`` and
    ``copies`` (of the sequences whose prompts are read) bytes by layer;
    ``largest_row`` are those of one token in the layer with a budget where K and V take most, on their way to their
    places, and ``scored_key`` those of one token's keys while they are scored, 0 where they are taken as stored.
    ``rotation`` is one more row of each layer, which the library keeps where rows are quantized, to know how they are
    rotated. ``full`` is what the stock library takes for the same context.
    """

    kv: KVSettings
    capacity: tuple[int, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    queries: tuple[int, ...]
    sums: tuple[int, ...]
    copies: tuple[int, ...]
    stage: int
    stage_rows: int
    hidden: int
    layer_major: bool
    rotation: int
    largest_row: int
    scored_key: int
    full: int

    @property
    def kept_per_layer(self) -> tuple[int, ...]:
        """What stays after a prompt, by layer."""
        return tuple(sum(parts) for parts in zip(self.rows, self.positions, self.queries, self.sums, strict=True))

    @property
    def kept(self) -> int:
        """What stays after a prompt."""
        return sum(self.kept_per_layer)

    @property
    def reading(self) -> int:
        """What is used only while prompts are read, wherever there are layers."""
        return self.stage + self.hidden

    @property
    def total(self) -> int:
        """All of it."""
        return self.kept + sum(self.copies) + self.reading + self.rotation

    @property
    def padding(self) -> int:
        """The most that the alignment of tensors adds to it."""
        return _ALIGNMENT * (10 * len(self.capacity) + 1)


def _scored_keys(score: str, shape: KVShape) -> int:
    """Return of how many heads keys are dequantized at a time to be scored."""
    return {"snapkv": 1, "tova": 1, "h2o": max(shape.n_head_kv)}.get(score, 0)


def takes_budget(shape: KVShape) -> bool:
    """Whether a model can have a budget as far as its metadata tells: plain rows, and a layer that sees everything."""
    return shape.exact and bool(shape.full_layers)


def budget_memory(
    shape: KVShape, n_embd: int, settings: ContextSettings, n_ubatch: int, *, layer_major: bool = True
) -> BudgetMemory | None:
    """Return what the budget of ``settings`` takes; None when there is none, or the model cannot have it.

    ``n_ubatch`` as the library limits it. ``layer_major``: that the library can cut the model's graph into layers, as
    it could with every architecture that was tried. Raises UnsupportedError for cache types whose blocks do not divide
    a row.
    """
    kv = settings.kv
    if kv is None or not takes_budget(shape):
        return None
    n_seq, full = settings.n_seq_max, padded(settings.n_ctx)
    n_reading = min(kv.n_reading, n_seq)
    per_row = bytes_per_token(shape, settings.type_k, settings.type_v)
    layers = range(shape.n_layer)
    bounded = shape.full_layers
    widest_k = max(row_bytes(shape.key_width(layer), settings.type_k) for layer in bounded)
    widest_v = max(row_bytes(shape.value_width(layer), settings.type_v) for layer in bounded)
    capacity = row_capacity(kv, full, shape.window, n_ubatch)
    evicts = any(kv.rows[layer] < full for layer in bounded)
    overwrites = evicts or min(capacity) < full
    none = (0,) * shape.n_layer
    rows = tuple(count * size for count, size in zip(capacity, per_row, strict=True))
    positions = tuple(
        0 if shape.window[layer] else min(kv.rows[layer], full) * shape.n_head_kv[layer] * _POSITION for layer in layers
    )
    query_bytes = (kv.observed + _RING_SPARE) * shape.key_length * (4 if settings.type_k == "f32" else 2)
    queries = sums = none
    if kv.observed:
        queries = tuple(0 if shape.window[layer] else shape.n_head[layer] * query_bytes for layer in layers)
    summed = kv.score == "h2o"
    if summed:
        sums = tuple(0 if shape.window[layer] else capacity[layer] * shape.n_head_kv[layer] * _SUM for layer in layers)
    if not evicts:
        positions = queries = sums = none
    one = tuple(sum(parts) for parts in zip(rows, positions, queries, sums, strict=True))
    layer_major = evicts and layer_major and kv.prefill != "lane"
    stage_rows, hidden_tokens = full, full
    if kv.prefill == "chunked":
        stage_rows, hidden_tokens = padded(max(capacity[layer] for layer in bounded) + n_ubatch), n_ubatch
    staged = widest_k + widest_v if layer_major else sum(per_row[layer] for layer in bounded)
    if summed:
        heads = [shape.n_head_kv[layer] for layer in bounded]
        staged += (max(heads) if layer_major else sum(heads)) * _SUM
    quantized = any(CACHE_TYPE_BLOCKS[name][0] > 1 for name in (settings.type_k, settings.type_v))
    return BudgetMemory(
        kv=kv,
        capacity=capacity,
        rows=_times(n_seq, rows),
        positions=_times(n_seq + 1, positions),  # and what a selection is about to keep
        queries=_times(n_seq, queries),
        sums=_times(n_seq + 1, sums),  # and what they will be after a selection
        copies=_times(min(kv.copies, n_reading), one) if overwrites else none,
        stage=n_reading * stage_rows * staged if evicts else 0,
        stage_rows=stage_rows if evicts else 0,
        hidden=n_reading * n_embd * hidden_tokens * _HIDDEN if layer_major else 0,
        layer_major=layer_major,
        rotation=sum(per_row) if quantized else 0,
        largest_row=max(
            sum(
                row_bytes(width, name) * _widening(size, name)
                for width, size, name in (
                    (shape.key_width(layer), shape.key_length, settings.type_k),
                    (shape.value_width(layer), shape.value_length, settings.type_v),
                )
            )
            for layer in bounded
        ),
        scored_key=0
        if settings.type_k in ("f16", "f32")
        else _scored_keys(kv.score, shape) * shape.key_length * _SCORED,
        full=kv_bytes(
            shape,
            settings.n_ctx,
            type_k=settings.type_k,
            type_v=settings.type_v,
            n_seq=n_seq,
            n_ubatch=n_ubatch,
            swa_full=settings.swa_full,
            flash_attention=settings.flash_attention != "off",
        ),
    )


def _widening(head_length: int, cache_type: str) -> int:
    """Heads that are no whole number of 32-bit words are moved as 16-bit words, each of which takes 32 bits then."""
    block, size = CACHE_TYPE_BLOCKS[cache_type]
    return 2 if head_length // block * size % 4 else 1


def _times(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(count * size for size in sizes)


def row_capacity(kv: KVSettings, full: int, windows: Sequence[int], n_ubatch: int) -> tuple[int, ...]:
    """Rows allocated per layer and sequence of a context of ``full`` rows, as the library rounds them up.

    ``windows`` are the layers' sliding windows, 0 for those that see everything.
    """
    evicts = any(rows < full for rows, window in zip(kv.rows, windows, strict=True) if not window)
    spare = max(n_ubatch, _RING_SPARE)
    return tuple(
        (padded(window + spare) if evicts else padded(min(full, window + spare)))
        if window
        else (padded(min(rows, full) + kv.slack) if evicts else full)
        for rows, window in zip(kv.rows, windows, strict=True)
    )
