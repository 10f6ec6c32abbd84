"""The binding of KV budgets: its settings, and what a library without budgets says."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from ziggurat.runtime.bindings import Context, ContextSettings, KVSettings, Model, kv, library
from ziggurat.runtime.errors import InvalidRequestError, LibraryError

ROWS = (100, 90)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": ()}, "at least 36 rows in every layer"),
        ({"rows": (100, 35)}, "has 35 in one"),
        ({"rows": (100, 2**32)}, "at least 36 rows"),
        ({"window": 0}, "window is 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"slack": 0}, "slack is 0"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"pool": 4}, "pool is 4; it must be odd"),
        ({"pool_type": "median"}, "no pool_type 'median': avg, max"),
        ({"score": "tova"}, "no score 'tova': snapkv, recent, random"),
        ({"prefill": "lazy"}, "no prefill 'lazy': exact, bounded, chunked"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        KVSettings(**{"rows": ROWS, **values})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_has_to_fit_a_batch() -> None:
    def n_batch(prefill: str) -> int:
        budget = KVSettings(ROWS, prefill=prefill)
        return ContextSettings(n_ctx=4000, n_batch=512, kv=budget).n_batch

    assert (n_batch("exact"), n_batch("bounded"), n_batch("chunked")) == (4000, 4000, 512)
    assert ContextSettings(n_ctx=100, n_batch=512, kv=KVSettings(ROWS)).n_batch == 512
    assert ContextSettings(n_ctx=4000, n_batch=512).n_batch == 512


def test_the_struct_is_what_was_asked() -> None:
    if not kv.available():
        pytest.skip("a library without KV budgets")
    params = SimpleNamespace()
    budget = KVSettings(ROWS, 16, 5, 7, "max", 99, "random", "chunked", 8)
    alive = kv.fill(params, budget)
    native = ctypes.cast(params.kv_budget, ctypes.POINTER(kv._Params)).contents
    values = {name: getattr(native, name) for name, *_ in kv._Params._fields_ if name != "rows"}
    assert values == {
        "n_layer": 2,
        "window": 16,
        "sinks": 5,
        "pool": 7,
        "pool_type": 1,
        "slack": 99,
        "score": 2,
        "prefill": 2,
        "seed": 8,
    }
    assert native.rows[:2] == list(ROWS)
    assert alive is not None


def test_a_stock_library_names_the_remedy(spm_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    kv._functions.cache_clear()
    monkeypatch.setattr(kv, "_has_budgets", lambda _lib: False)
    try:
        assert not kv.available()
        for call in (
            lambda: kv.unsupported(spm_model),
            lambda: Context(spm_model, ContextSettings(n_ctx=256, n_threads=1, kv=KVSettings(ROWS))),
        ):
            with pytest.raises(LibraryError, match=r"keeps every KV row: .*install the patched library: pip install"):
                call()
    finally:
        kv._functions.cache_clear()


def test_a_missing_library_has_no_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise LibraryError("gone")

    monkeypatch.setattr(library, "api", missing)
    assert not kv.available()


def test_a_context_without_a_budget_says_so(spm_model: Model) -> None:
    with Context(spm_model, ContextSettings(n_ctx=256, n_threads=1)) as context:
        assert not context.kv_active
        assert context.kv_layout() is None
        assert context.kv_capacity() == context.kv_rows(0) == ()
        for call in (
            lambda: context.kv_positions(0, 0),
            lambda: context.set_kv_budget(0, ROWS),
            lambda: context.kv_select(0),
        ):
            with pytest.raises(InvalidRequestError, match="no KV budget"):
                call()
