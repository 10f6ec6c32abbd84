from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.runtime.engine.pace import Costs, Pace, Price, shares


def costs_of(step: dict[int, float]) -> Costs:
    costs = Costs()
    for size, seconds in sorted(step.items(), reverse=True):
        costs.record(size, seconds)
    return costs


def pace_of(rate: float, decided: int = 400) -> Pace:
    """A pace that has seen drafts of one token, of which so many were accepted, evenly."""
    pace = Pace()
    for index in range(decided):
        pace.record(1, int((index + 1) * rate) - int(index * rate))
    return pace


def test_costs_are_averaged_and_interpolated() -> None:
    costs = Costs()
    assert costs.step(1) == 1.0
    costs.record(4, 2.0)
    assert costs.step(1) == costs.step(4) == 2.0
    assert costs.step(5) == pytest.approx(2.2)  # cheap enough to try
    costs.record(8, 4.0)
    assert [costs.step(n) for n in (4, 6, 8, 10)] == [2.0, 3.0, 4.0, 5.0]
    costs.record(6, 1.0)  # a kernel for six
    assert [costs.step(n) for n in (5, 6, 7)] == [1.5, 1.0, 2.5]
    for _ in range(60):
        costs.record(6, 2.0)
    assert costs.step(6) == pytest.approx(2.0, abs=0.01)


def test_what_was_measured_long_ago_weighs_little() -> None:
    new, old = costs_of({4: 1.0}), costs_of({4: 1.0})
    for _ in range(50):
        old.record(1, 1.0)
    new.record(4, 2.0)
    old.record(4, 2.0)
    assert new.step(4) < 1.2
    assert old.step(4) > 1.9


def test_a_price_is_of_all_calls() -> None:
    price = Price()
    assert price.seconds == 0.0
    for _ in range(50):
        price.record(4, 1.0)
        price.record(0, 1.0)
    assert price.seconds == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
def test_the_rate_follows_what_is_accepted(rate: float) -> None:
    assert pace_of(rate).rate == pytest.approx(rate, abs=0.05)


def test_tokens_after_a_rejected_one_decide_nothing() -> None:
    one, many = Pace(), Pace()
    one.record(2, 1)
    many.record(9, 1)
    assert one.rate == many.rate


def best(rates: list[float], limits: list[int], costs: Costs, price: float, others: int) -> float:
    """Tokens per second of the best of all choices."""
    return max(
        speed(rates, list(lengths), costs, price, others)
        for lengths in itertools.product(*(range(limit + 1) for limit in limits))
    )


def speed(rates: list[float], lengths: list[int], costs: Costs, price: float, others: int) -> float:
    tokens = others + sum(sum(rate**j for j in range(n + 1)) for rate, n in zip(rates, lengths, strict=True))
    return tokens / (costs.step(others + len(rates) + sum(lengths)) + price * max(lengths))


@given(
    st.lists(st.tuples(st.sampled_from((0.1, 0.5, 0.8, 0.95)), st.integers(1, 4)), min_size=1, max_size=3),
    st.sampled_from((0.05, 0.3, 0.7, 1.5)),
    st.integers(0, 3),
)
def test_the_shares_are_the_best_there_are(sequences: list[tuple[float, int]], slope: float, others: int) -> None:
    costs = Costs()
    for size in range(20, 0, -1):
        costs.record(size, 1 + slope * (-(-size // 4)))  # rows of four
    paces, limits = [pace_of(rate) for rate, _ in sequences], [limit for _, limit in sequences]
    rates = [pace.rate for pace in paces]
    costs.allowance = 0.0  # no trials
    lengths = shares(paces, limits, costs, others=others)
    assert all(0 <= length <= limit for length, limit in zip(lengths, limits, strict=True))
    reached = speed(rates, lengths, costs, 0.0, others)
    assert reached >= best(rates, limits, costs, 0.0, others) / 1.0201


def test_what_drafting_costs_counts() -> None:
    costs = costs_of({1: 1.0, 4: 1.2, 16: 2.0})
    pace = pace_of(0.8)
    free = shares([pace], [15], costs)[0]
    dear = shares([pace], [15], costs, price=0.2)[0]
    assert free > dear > 0
    assert shares([pace], [15], costs, price=2.0) == [0]
    assert shares([pace], [15], costs_of({1: 1.0, 2: 2.0, 16: 16.0})) == [0]


def test_a_sequence_that_is_not_predicted_leaves_its_part_to_others() -> None:
    costs = costs_of({2: 1.0, 8: 1.4, 32: 4.0})
    good, bad = shares([pace_of(0.95), pace_of(0.05)], [15, 15], costs)
    assert good > 3
    assert bad == 0


def test_steps_without_drafts_are_measured_again() -> None:
    costs = costs_of({1: 1.0, 16: 1.1})
    pace = pace_of(0.9)
    assert shares([pace], [4], costs) == [4]
    for _ in range(64):
        costs.record(5, 1.05)
    assert shares([pace], [4], costs) == [0]
    costs.record(1, 1.0)
    assert shares([pace], [4], costs) == [4]


def simulate(steps: int, cost: float, accepts: bool, costs: Costs) -> tuple[int, float]:
    """Trials of one sequence, and seconds that they took more than steps without drafts."""
    pace, trials, extra = pace_of(0.0), 0, 0.0
    for _ in range(steps):
        length = shares([pace], [15], costs)[0]
        seconds = 1 + cost * length
        trials += length > 0
        extra += seconds - 1
        if length:
            costs.allowance -= seconds - 1
        pace.record(length, length if accepts else 0)
        costs.record(1 + length, seconds)
    return trials, extra


def test_trials_in_vain_cost_a_bounded_part() -> None:
    for cost in (0.05, 1.0, 30.0):
        costs = costs_of({1: 1.0, 16: 1.0 + 15 * cost})
        trials, extra = simulate(4000, cost, False, costs)
        assert trials >= 1
        assert extra <= 0.021 * (4000 + extra) + Pace.TRIAL * cost
    assert trials < 4
    assert simulate(4000, 0.05, False, costs_of({1: 1.0, 16: 2.0}))[0] < 25  # rarer with time


def test_a_text_that_becomes_predictable_is_noticed() -> None:
    trials, _ = simulate(200, 0.05, True, costs_of({1: 1.0, 16: 1.7}))
    assert trials > 100
