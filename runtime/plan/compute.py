"""How much llama.cpp's graph needs besides weights and rows: an estimate, for when the library cannot be asked.

The library reserves the graph of one full ubatch whose tokens are all outputs. Which tensors are alive together at its
peak was read off ``ggml_backend_sched`` by measuring; there are three candidates, and the peak is the largest:

- the end: logits of every token beside two hidden states;
- a feed-forward part: three tensors of its width and four hidden states, beside the attention masks;
- attention: masks, queries and their copy, K and V, three hidden states; without flash attention also the scores of
  every head against every row.

Against the library on the CPU, over 12 shapes (0.1B to 70B; Llama, Qwen2, Qwen3, Gemma 2 and 3, two mixtures of
experts) and 11 settings each (contexts 2k to 128k, 1 to 16 sequences, ubatches 64 to 2048, flash attention on and off,
f16 and q8_0): mean error 0.4 %, extremes -5.4 % and +8.2 %, both with q8_0 rows; models of a few million
weights were up to 10.4 % above. GPUs were not measured. With a KV budget, over 6 shapes (0.3B to 8B and a mixture) and
18 settings each: mean error 1.4 %, extremes -8.9 % and 0, the former without flash attention; with rows of q8_0, bf16
and q4_0, over 4 of them and 12 settings each: mean error 1.3 %, extremes -6.4 % and 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from ziggurat.runtime.plan.budgets import BudgetMemory
from ziggurat.runtime.plan.kv import KVShape, padded, rows_per_layer
from ziggurat.runtime.plan.outline import Outline

_F16, _F32, _I64 = 2, 4, 8
_SUMMED_VALUES, _SUMMED_TOKENS = 2**20, 8


def ubatch(n_ctx: int, n_seq: int, n_batch: int, n_ubatch: int) -> int:
    """Tokens the library computes at once: no more than a batch, nor than all contexts together."""
    return min(n_ubatch, n_batch, n_ctx * n_seq)


def compute_bytes(
    model: Outline,
    n_ctx: int,
    n_seq: int,
    n_ubatch: int,
    *,
    flash_attention: bool,
    swa_full: bool = False,
    budget: BudgetMemory | None = None,
) -> int:
    """Estimate the bytes of the compute buffers; ``n_ctx`` as padded by the library, ``n_ubatch`` as it limits it."""
    tokens = -(-n_ubatch // n_seq) * n_seq
    end = (model.n_vocab + 2 * model.n_embd) * tokens * _F32
    feed_forward = (3 * model.n_ff + 4 * model.n_embd) * tokens * _F32
    if model.kv is None:
        return max(end, feed_forward)
    kv = model.kv
    if budget is not None:
        return _with_budget(model, kv, budget, tokens, n_seq, n_ubatch, flash_attention=flash_attention)
    rows = rows_per_layer(kv, n_ctx, n_ubatch=n_ubatch, swa_full=swa_full)
    # one mask for the layers that see everything, one for those with a window
    masks = sum({window > 0: count for window, count in zip(kv.window, rows, strict=True)}.values())
    masks *= tokens * (_F16 if flash_attention else _F32)
    attention = _attention(model, kv, tokens, rows, flash_attention=flash_attention)
    return max(end, masks + max(feed_forward, attention))


def _attention(model: Outline, kv: KVShape, tokens: int, rows: Sequence[int], *, flash_attention: bool) -> int:
    """Bytes that are alive in a layer's attention, but for the mask."""
    query = max(kv.n_head) * kv.key_length
    key_value = max(kv.key_width(layer) + kv.value_width(layer) for layer in range(kv.n_layer))
    values = 3 * model.n_embd + 2 * query + key_value
    if not flash_attention:
        values += max(heads * count for heads, count in zip(kv.n_head, rows, strict=True))
    return values * tokens * _F32


def _with_budget(
    model: Outline,
    kv: KVShape,
    budget: BudgetMemory,
    tokens: int,
    n_seq: int,
    n_ubatch: int,
    *,
    flash_attention: bool,
) -> int:
    """Estimate the larger of two graphs: of prompts that fit every layer's budget, and of one that has to be selected.

    The first writes its rows in place and is the library's own, of fewer rows. The second computes one layer (or all,
    in the lane) over the stage. Selecting comes before attention in it, so that the mask is alive as well: the scores
    of one KV head, its keys in F32, if they are stored otherwise, and what came of the other heads, or the rows that
    were selected, lie beside it unless they fit where it was.
    """
    mask_value = _F16 if flash_attention else _F32
    hidden = model.n_embd * n_ubatch * _F32
    end = (model.n_vocab + 2 * model.n_embd) * tokens * _F32
    feed_forward = (3 * model.n_ff + 4 * model.n_embd) * tokens * _F32
    least = min(budget.capacity[layer] for layer in kv.full_layers)
    few = min(least, padded(max(min(budget.kv.bounded), tokens // n_seq)))
    ring = max((rows for rows, window in zip(budget.capacity, kv.window, strict=True) if window), default=0)
    rows = [ring if window else few for window in kv.window]
    in_place = (few + ring) * tokens * mask_value + kv.n_layer * tokens * _I64
    in_place += max(feed_forward, _attention(model, kv, tokens, rows, flash_attention=flash_attention))
    if not budget.stage_rows:
        return max(end, in_place)
    staged = [ring if window else budget.stage_rows for window in kv.window]
    mask = (budget.stage_rows + ring) * n_ubatch * mask_value
    observed = 0 if budget.kv.score == "h2o" else budget.stage_rows * budget.kv.observed
    group = max(heads // max(1, of) for heads, of in zip(kv.n_head, kv.n_head_kv, strict=True))
    # K as well as V; rarely of different sizes
    selected = min(max(budget.kv.rows), budget.stage_rows) * budget.largest_row // 2
    # in the lane masks stay, and there is one of the window for every layer
    hole, layers = (mask, 1) if budget.layer_major else (0, kv.n_layer)
    masks = mask + layers * observed * _F16
    scores = observed * group * _F32
    keys = budget.stage_rows * budget.scored_key
    others = budget.stage_rows * max(kv.n_head_kv) * _F32 if observed else 0
    selecting = 3 * hidden + max(_beside(hole, keys, scores, others), _beside(hole, selected, selected))
    if budget.kv.score == "h2o":
        selecting += max(kv.n_head) * kv.key_length * n_ubatch * _F32 + _summed(
            max(kv.n_head), budget.stage_rows, n_ubatch
        )
    attention = _attention(model, kv, n_ubatch, staged, flash_attention=flash_attention)
    if not budget.layer_major:
        return max(end, in_place, masks + max(attention, selecting, feed_forward))
    # the hidden states it begins with have a place of their own
    reading = masks + max(attention - hidden, selecting)
    return max(end, in_place, reading, feed_forward + (mask if mask < hidden else 0))


def _summed(heads: int, rows: int, tokens: int) -> int:
    """Return the bytes of the attention that is computed at a time to sum it up: ``ziggurat-kv-sums.cpp``."""
    per_token = heads * rows
    return min(max(_SUMMED_VALUES // per_token, _SUMMED_TOKENS), tokens) * per_token * _F32


def _beside(hole: int, *tensors: int) -> int:
    """Return the bytes of tensors that find no room one after the other in a place of ``hole`` bytes."""
    left = 0
    for size in tensors:
        left, hole = (left, hole - size) if size < hole else (left + size, hole)
    return left
