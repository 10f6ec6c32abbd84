"""From the --kv-* options to the rows of a context."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from ziggurat.runtime.budget import Budget, Pyramid, Uniform, allocate
from ziggurat.runtime.errors import InvalidRequestError, ZigguratError
from ziggurat.runtime.kv_policy import KVPolicy, policy_of


def policy(**options: Any) -> KVPolicy:
    found = policy_of({f"kv_{name}": value for name, value in options.items()})
    assert found is not None
    return found


def test_without_a_budget_every_row_is_kept() -> None:
    assert policy_of({}) is None
    assert policy_of({"kv_budget": None, "kv_policy": "none", "kv_score": None}) is None


def test_the_defaults_are_pyramidkv() -> None:
    chosen = policy(budget="512")
    assert chosen == KVPolicy(Budget(rows=512), Pyramid(beta=20), "snapkv", 32, 4, 13, "max", 64, "exact", 0)
    assert policy(budget="512", policy="pyramid") == chosen


@pytest.mark.parametrize(
    ("preset", "schedule", "score"),
    [
        ("pyramid", Pyramid(), "snapkv"),
        ("snapkv", Uniform(), "snapkv"),
        ("streaming", Uniform(), "recent"),
        ("tova", Uniform(), "tova"),
        ("keydiff", Uniform(), "keydiff"),
        ("h2o", Uniform(), "h2o"),
    ],
)
def test_presets(preset: str, schedule: object, score: str) -> None:
    chosen = policy(budget="12.5%", policy=preset)
    assert chosen.pool == (13 if score == "snapkv" else 1)
    assert policy(budget="12.5%", policy=preset, pool=3).pool == 3
    assert (chosen.budget, chosen.schedule, chosen.score) == (Budget(percent=Fraction(25, 2)), schedule, score)


def test_options_override_a_preset() -> None:
    chosen = policy(
        budget="99", policy="streaming", schedule="pyramid", score="random", window=8, sinks=0, prefill="chunked"
    )
    assert (chosen.schedule, chosen.score, chosen.prefill) == (Pyramid(), "random", "chunked")
    assert (chosen.window, chosen.sinks) == (8, 0)
    chosen = policy(budget="99", pool=15, pool_type="max")
    assert (chosen.pool, chosen.pool_type) == (15, "max")
    assert policy(budget="99", policy="h2o", score="recent").score == "recent"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"policy": "pyramid"}, InvalidRequestError, "--kv-policy: says how to keep a budget, and there is none"),
        ({"window": 8, "sinks": 0}, InvalidRequestError, "--kv-window, --kv-sinks: says how"),
        ({"budget": "9", "policy": "none"}, InvalidRequestError, "--kv-budget: --kv-policy none keeps every row"),
        ({"score": "recent", "policy": "none"}, InvalidRequestError, "--kv-score: --kv-policy none keeps every row"),
        ({"pool": 7}, InvalidRequestError, "--kv-pool: says how"),
        ({"budget": "99", "pool": 6}, InvalidRequestError, "--kv-pool 6: it has to be odd"),
        ({"budget": "x"}, InvalidRequestError, "--kv-budget x: give a number of rows"),
        ({"budget": "35"}, InvalidRequestError, "--kv-budget 35: has no room for the window (32) and the sinks (4)"),
    ],
)
def test_contradictions_are_one_line(options: dict[str, Any], kind: type[ZigguratError], message: str) -> None:
    with pytest.raises(kind) as caught:
        policy(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_a_number() -> None:
    chosen = policy(budget="512")
    assert chosen.rows(16, 8192) == tuple(allocate(16 * 512, 16, prompt_tokens=8192))
    assert chosen.rows(16, 8192, 900) == (512,) * 16
    assert sum(chosen.rows(16, 8192, 2000)) == 16 * 512
    assert max(chosen.rows(16, 8192, 965)) == 965
    assert chosen.rows(16, 8192, 99_999) == chosen.rows(16, 8192)


def test_rows_of_a_part_of_the_prompt() -> None:
    chosen = policy(budget="12%")
    assert sum(chosen.rows(4, 8192, 1000)) == 480
    assert sum(chosen.rows(4, 1000)) == 480
    assert chosen.rows(4, 8192, 100) == (36,) * 4  # 12 have no room for window and sinks
    assert policy(budget="100%").rows(2, 8192, 700) == (700, 700)


def test_schedules_count_the_layers_that_see_everything() -> None:
    for amount in ("512", "12%"):
        chosen = policy(budget=amount)
        first, second, third = chosen.rows(3, 8192)
        assert chosen.rows((1024, 0, 1024, 0, 0), 8192) == (0, first, 0, second, third)
        assert chosen.most_rows((0, 1024, 0), 8192)[::2] == chosen.most_rows(2, 8192)
    settings = chosen.settings((0, 100, 0, 50, 60))
    assert settings.bounded == (100, 50, 60)
    assert settings.of_bounded((1, 2, 3, 4, 5)) == (2, 4, 5)


def test_a_budget_of_the_context_or_more_keeps_all_that_is_allocated() -> None:
    assert policy(budget="4096").rows(2, 1000) == (1024, 1024)
    assert policy(budget="40", window=36).rows(2, 1) == (40, 40)


def test_which_policies_look_at_the_prompt() -> None:
    assert policy(budget="512").varies
    assert policy(budget="5%", schedule="uniform").varies
    assert not policy(budget="512", policy="snapkv").varies


def test_settings_carry_everything() -> None:
    chosen = KVPolicy(Budget(rows=50), Uniform(), "random", 9, 3, 7, "max", 11, "bounded", 5)
    settings = chosen.settings((50, 40))
    assert settings.rows == (50, 40)
    for name in ("score", "window", "sinks", "pool", "pool_type", "slack", "prefill", "seed"):
        assert getattr(settings, name) == getattr(chosen, name)
