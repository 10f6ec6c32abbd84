from __future__ import annotations

from typing import Any

import pytest

from ziggurat.runtime.bench.axes import Place, axes_of, numbers
from ziggurat.runtime.bench.runner import Spread
from ziggurat.runtime.errors import InvalidRequestError, ZigguratError

DEFAULTS: dict[str, Any] = {
    "depth": "0",
    "streams": "1",
    "threads": "1",
    "cache_type_k": "f16",
    "cache_type_v": "f16",
    "kv_budget": None,
    "kv_policy": None,
    "kv_prefill": None,
    "n_prompt": 512,
    "n_gen": 128,
    "repetitions": 5,
    "batch": 2048,
    "ubatch": 512,
    "read_depth": False,
}


def test_every_combination_is_compared() -> None:
    axes, work = axes_of(
        DEFAULTS
        | {
            "depth": "4k,0",
            "streams": "8,1",
            "threads": "2,1",
            "kv_budget": "none,64,12%",
            "kv_policy": "pyramid,streaming",
            "cache_type_k": "f16,q8_0",
        }
    )
    assert axes.places == (Place(0, 1), Place(0, 8), Place(4096, 1), Place(4096, 8))
    assert work.threads == (1, 2)
    kept = ["none", "64 pyramid", "64 streaming", "12% pyramid", "12% streaming"]
    assert [setting.kept for setting in axes.settings] == kept * 2
    assert [setting.type_k for setting in axes.settings] == ["f16"] * 5 + ["q8_0"] * 5
    assert axes.budgeted and not axes_of(DEFAULTS)[0].budgeted


def test_a_setting_s_context() -> None:
    axes, work = axes_of(DEFAULTS | {"depth": "1000", "streams": "2", "kv_budget": "none,10%", "kv_policy": "snapkv"})
    full, kept = (setting.context(3, axes.places[0], work) for setting in axes.settings)
    assert (full.n_ctx, full.n_seq_max, full.kv) == (1000 + 512 + 16, 2, None)
    assert kept.kv is not None
    assert kept.kv.rows == (100, 100, 100)  # of the depth, not of the context
    assert kept.kv.copies == 1
    empty = axes.settings[1].context(3, Place(0, 1), work)
    assert empty.kv is not None
    assert sum(empty.kv.rows) == 154  # of the prompt that is measured
    assert empty.kv.copies == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"depth": "-1"}, "--depth -1"),
        ({"depth": "1,,2"}, "--depth 1,,2"),
        ({"depth": "x"}, "such as 512,4k"),
        ({"streams": "0"}, "numbers from 1 to 256"),
        ({"streams": "257"}, "numbers from 1 to 256"),
        ({"threads": "1.5"}, "--threads 1.5"),
        ({"cache_type_k": "q5_0"}, "no such type; take f16, bf16, q8_0, q4_0"),
        ({"cache_type_v": ""}, "values with commas"),
        ({"kv_budget": "some"}, "--kv-budget some"),
        ({"kv_budget": "64", "kv_policy": "best"}, "--kv-policy best"),
        ({"kv_policy": "snapkv"}, "add --kv-budget"),
        ({"kv_budget": "none", "kv_prefill": "exact"}, "--kv-prefill: says how to keep a budget"),
        ({"kv_budget": "20"}, "no room for the window"),
        ({"n_prompt": 0, "n_gen": 0}, "nothing to measure"),
    ],
)
def test_what_makes_no_sense(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ZigguratError, match=said):
        axes_of(DEFAULTS | changed)


def test_numbers_are_sorted_and_different() -> None:
    assert numbers("4K, 2,2", "--x") == [2, 4096]
    with pytest.raises(InvalidRequestError):
        numbers("0", "--x")


def test_quartiles() -> None:
    assert Spread.of([3.0]) == Spread(3, 3, 3)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3, 2, 4)
