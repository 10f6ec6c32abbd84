"""What a context with a budget allocates: what the formulas say, and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.kv_library import Budget, BudgetModel
from helpers.kv_models import tokens
from helpers.kv_reference import RING_SPARE, SETTLED
from helpers.tiny_models import Shape, write_model
from ziggurat.runtime.bindings.memory import measure

SHAPE = Shape(n_layer=3, n_head=4, n_head_kv=2, head_dim=32)
UNEVEN = Shape("deci", n_layer=3, n_head=(4, 4, 4), n_head_kv=(4, 1, 2), head_dim=32)
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
N_CTX = 1024


def padded(n: int) -> int:
    return -(-n // 256) * 256


@pytest.mark.parametrize("shape", [SHAPE, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("lane", [False, True])
@pytest.mark.parametrize("types", [("f32", "f16"), ("bf16", "q4_0"), ("q8_0", "bf16")], ids="-".join)
@pytest.mark.parametrize(
    "budget",
    [
        Budget((40, 300, 256), slack=8),
        Budget((40, 300, 5000), slack=1),
        Budget((248, 249, 64), slack=8, score="recent"),
        Budget((40, 300, 250), slack=8, score="h2o"),
        Budget((1024, 2000, 1500)),  # nothing can be evicted
    ],
    ids=lambda budget: str(budget.rows),
)
@pytest.mark.parametrize(("n_seq", "asked"), [(1, 1), (3, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("copies", [None, 0])
def test_bytes(
    shape: Shape,
    lane: bool,
    types: tuple[str, str],
    budget: Budget,
    n_seq: int,
    asked: int,
    copies: int | None,
    tmp_path: Path,
) -> None:
    heads = [shape.heads(layer) for layer in range(3)]
    key, value = (BYTES[name] for name in types)
    row = [kv * shape.head_dim * (key + value) for _, kv in heads]
    rows = [min(rows, N_CTX) for rows in budget.rows]
    full = min(rows) == N_CTX
    capacity = [N_CTX if full else padded(n + budget.slack) for n in rows]
    per_query = (
        shape.head_dim
        * ((SETTLED if budget.score == "h2o" else budget.window) + RING_SPARE)
        * (4 if types[0] == "f32" else 2)
    )
    scored = budget.score in ("snapkv", "h2o") and not full
    summed = budget.score == "h2o" and not full
    budget = replace(budget, prefill="lane" if lane else "exact", n_reading=asked, n_copies=copies)
    n_reading = min(asked, n_seq)
    with BudgetModel(write_model(tmp_path / "m.gguf", shape)) as model:
        with model.context(N_CTX, budget, n_seq=n_seq, types=types, ubatch=64, flash=True) as context:
            layout = context.layout()
            assert layout is not None
            assert context.capacity() == tuple(capacity)
            assert layout.rows_bytes == n_seq * sum(n * size for n, size in zip(capacity, row, strict=True))
            positions = 0 if full else sum(4 * n * kv for n, (_, kv) in zip(rows, heads, strict=True))
            assert layout.position_bytes == (n_seq + 1) * positions  # and what a selection is about to keep
            queries = sum(n * per_query for n, _ in heads) if scored else 0
            assert layout.query_bytes == n_seq * queries
            sums = sum(4 * n * kv for n, (_, kv) in zip(capacity, heads, strict=True)) if summed else 0
            assert layout.sum_bytes == (n_seq + 1) * sums  # and what they are to be
            one = layout.rows_bytes // n_seq + positions + queries + sums
            assert layout.copy_bytes == (0 if full or copies == 0 else n_reading * one)
            assert layout.stage_rows == (0 if full else N_CTX)
            staged = sum(row) if lane else max(row)
            if summed:
                staged += 4 * (sum(kv for _, kv in heads) if lane else max(kv for _, kv in heads))
            assert layout.stage_bytes == n_reading * layout.stage_rows * staged
            assert layout.hidden_bytes == (0 if full or lane else n_reading * 4 * shape.n_embd * N_CTX)
            (cpu,) = (buffer for buffer in measure(context) if buffer.context)  # type: ignore[arg-type]
            wanted = sum(getattr(layout, name) for name in ("rows_bytes", "position_bytes", "query_bytes", "sum_bytes",
                                                            "copy_bytes", "stage_bytes", "hidden_bytes"))  # fmt: skip
            assert wanted <= cpu.context <= wanted + 4096


@pytest.mark.parametrize("prefill", ["exact", "chunked"])
def test_compute_does_not_grow_with_the_context(prefill: str, tmp_path: Path) -> None:
    """No n x n mask and no n x ffn activations: at most a mask of a ubatch by the context, in F32 and F16."""
    budget = Budget((40, 40, 40), prefill=prefill)
    sizes: list[int] = []
    with BudgetModel(write_model(tmp_path / "m.gguf", SHAPE)) as model:
        for n_ctx in (4096, 16384):
            options: dict[str, Any] = {"ubatch": 64, "flash": True, "types": ("f16", "f16")}
            with model.context(n_ctx, budget, **options) as context:
                before = sum(buffer.compute for buffer in measure(context))  # type: ignore[arg-type]
                context.read(tokens(1000))
                # nothing was allocated in addition while it was read
                assert sum(buffer.compute for buffer in measure(context)) == before  # type: ignore[arg-type]
                sizes.append(before)
    # what scores take: one KV head's window by all rows, a few times
    per_row = 64 * (4 + 2) + 16 * SHAPE.n_embd
    assert sizes[1] - sizes[0] <= (16384 - 4096) * per_row


def test_chunked_mode_needs_no_room_for_a_prompt(tmp_path: Path) -> None:
    budget = Budget((40, 40, 40), prefill="chunked")
    layouts = []
    with BudgetModel(write_model(tmp_path / "m.gguf", SHAPE)) as model:
        for n_ctx in (2048, 8192):
            with model.context(n_ctx, budget, ubatch=64, batch=512) as context:
                layout = context.layout()
                assert layout is not None
                layouts.append((layout.rows_bytes, layout.stage_bytes, layout.hidden_bytes))
    assert layouts[0] == layouts[1]
