"""The exact-copy model finds its needle under a KV budget, whatever the batches; and does not where it cannot.

Its second layer attends to one known row, with certainty, so SnapKV's score of that row is 1 / window. Filler tokens of
the window that stood once before in the text have the same score, so that with a wide window and a short text (few
repetitions) there can be more such rows than the budget has; a window of 8 with pools of 5 fits 64 rows in any text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.kv_library import Budget
from models.exact_copy import CopyModel, needle, write_gguf
from models.needle_grid import Cache, Copier

MODEL = CopyModel(head_dim=32, n_heads=2, n_kv_heads=1, n_layers=2, copy_layers=(0, 1), hidden_size=128, ffn_size=32)
LAYERS = MODEL.n_layers


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copier]:
    path: Path = tmp_path_factory.mktemp("copy") / "copy.gguf"
    write_gguf(MODEL, path)
    with Copier(path) as loaded:
        yield loaded


def budget(rows: int, score: str = "snapkv", prefill: str = "exact", window: int = 32) -> Budget:
    return Budget((rows,) * LAYERS, window=window, sinks=4, pool=5, slack=64, score=score, prefill=prefill)


def finds(copier: Copier, length: int, depth: float, budget: Budget, cache: Cache) -> bool:
    made = needle(length, depth, 7, n_pairs=4, value_tokens=2)
    return copier.greedy(made.tokens, 2, cache, budget=budget) == made.answer


# Flash attention is slow for fewer than 64 tokens at a time, with a budget and without; so is one token at a time.
@pytest.mark.parametrize(
    ("rows", "ubatch"), [(64, 1), (512, 1), *itertools.product((64, 128, 256, 512, 1024), (32, 512, 4352))]
)
def test_needle_at_4096(copier: Copier, rows: int, ubatch: int) -> None:
    cache = Cache("f16", ubatch >= 512, ubatch)
    depth = {64: 0.02, 128: 0.25, 256: 0.5, 512: 0.75, 1024: 0.1}[rows]
    assert finds(copier, 4096, depth, budget(rows), cache)


@pytest.mark.parametrize(
    "cache", [Cache("f32", False, 256), Cache("q8_0", True, 256), Cache("f16", False, 96)], ids=str
)
@pytest.mark.parametrize("depth", [0.02, 0.4, 1.0])
def test_needle_in_every_cache(copier: Copier, depth: float, cache: Cache) -> None:
    assert finds(copier, 1500, depth, budget(64, window=8), cache)


def test_needle_is_lost_without_its_rows(copier: Copier) -> None:
    """What does not look at attention does not find it: so the tests above say something."""
    cache = Cache("f16", True, 512)
    for score in ("recent", "random"):
        assert not any(finds(copier, 2048, depth, budget(64, score), cache) for depth in (0.2, 0.5))
    assert finds(copier, 2048, 1.0, budget(64, "recent"), cache)


def test_chunked_eviction_loses_it(copier: Copier) -> None:
    """The mode that evicts after every ubatch: at the end of a chunk nothing has asked for the needle yet."""
    cache = Cache("f16", True, 512)
    found = [finds(copier, 4096, depth, budget(128, prefill="chunked"), cache) for depth in (0.02, 0.3, 0.6)]
    assert not any(found)
    assert finds(copier, 4096, 0.99, budget(128, prefill="chunked"), cache)
    assert finds(copier, 4096, 0.3, budget(128, prefill="chunked"), Cache("f16", True, 4352))
