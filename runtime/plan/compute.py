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
weights were up to 10.4 % above. GPUs were not measured.
"""

from __future__ import annotations

from ziggurat.runtime.plan.budgets import BudgetMemory
from ziggurat.runtime.plan.kv import rows_per_layer
from ziggurat.runtime.plan.outline import Outline

_F16, _F32 = 2, 4


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
    if budget is None:
        rows = rows_per_layer(kv, n_ctx, n_ubatch=n_ubatch, swa_full=swa_full)
        # one mask for the layers that see everything, one for those with a window
        masks = sum({window > 0: count for window, count in zip(kv.window, rows, strict=True)}.values())
    else:
        # one for the prompt in the stage, or one for every number of rows
        rows = tuple(max(count, budget.stage_rows) for count in budget.capacity)
        masks = max(budget.stage_rows, sum(set(budget.capacity)))
    masks *= tokens * (_F16 if flash_attention else _F32)
    layers = range(kv.n_layer)
    query = max(kv.n_head) * kv.key_length
    key_value = max(kv.key_width(layer) + kv.value_width(layer) for layer in layers)
    attention = 3 * model.n_embd + 2 * query + key_value
    if not flash_attention:
        attention += max(heads * count for heads, count in zip(kv.n_head, rows, strict=True))
    return max(end, masks + max(feed_forward, attention * tokens * _F32))
