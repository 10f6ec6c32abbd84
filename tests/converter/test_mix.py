"""The choice of types under a size: the best there is, never above, the same every time."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.converter import mix
from ziggurat.converter.errors import ConvertError
from ziggurat.converter.mix import Candidate, Target, choose, target

LOSSES = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.1, 0.5])
CANDIDATE = st.builds(Candidate, st.integers(0, 9), st.integers(1, 30), LOSSES)
GROUPS = st.lists(st.lists(CANDIDATE, min_size=1, max_size=4), min_size=1, max_size=5)


def total(chosen: list[Candidate]) -> tuple[float, int]:
    return sum(c.loss for c in chosen), sum(c.bytes for c in chosen)


@given(GROUPS, st.integers(0, 60))
def test_as_good_as_trying_all(groups: list[list[Candidate]], room: int) -> None:
    capacity = sum(min(c.bytes for c in group) for group in groups) + room
    chosen = choose(groups, capacity)
    best = min(sum(c.loss for c in every) for every in itertools.product(*groups) if total(list(every))[1] <= capacity)
    assert all(candidate in group for candidate, group in zip(chosen, groups, strict=True))
    assert total(chosen)[1] <= capacity
    assert total(chosen)[0] <= best + 1e-12


def model_like(groups: int, seed: int = 0) -> list[list[Candidate]]:
    """Tensors of three sizes, whose losses fall by about a factor of four with every bit."""
    rng = random.Random(seed)
    bits = (2.06, 2.31, 2.56, 2.625, 3.06, 3.44, 4.25, 4.5, 5.5, 6.56, 8.5)
    made = []
    for _ in range(groups):
        weights, sensitivity = rng.choice([1 << 24, 1 << 22, 7 << 23]), rng.random() ** 3
        made.append(
            [
                Candidate(i, int(weights * b / 8), sensitivity * 4**-b * rng.uniform(0.8, 1.2))
                for i, b in enumerate(bits)
            ]
        )
    return made


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_large_models_fill_the_size(share: float) -> None:
    groups = model_like(200)
    least, most = (sum(f(c.bytes for c in group) for group in groups) for f in (min, max))
    capacity = int(least + share * (most - least))
    assert 0.99 * capacity < total(choose(groups, capacity))[1] <= capacity


def test_with_few_sums_kept_it_is_no_worse_than_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = model_like(60)
    capacity = 2 * sum(min(c.bytes for c in group) for group in groups)
    exact = total(choose(groups, capacity))
    monkeypatch.setattr(mix, "MOST_SUMS", 1)
    thinned = total(choose(groups, capacity))
    greedy = total(mix._greedy([mix._undominated(group) for group in groups], capacity)[0])
    assert exact[0] <= thinned[0] <= greedy[0]
    assert thinned[1] <= capacity


def test_the_order_of_candidates_does_not_matter() -> None:
    groups = model_like(30)
    capacity = 2 * sum(min(c.bytes for c in group) for group in groups)
    assert choose(groups, capacity) == choose([group[::-1] for group in groups], capacity)


def test_of_equal_losses_the_smaller_wins() -> None:
    assert choose([[Candidate(1, 9, 0.5), Candidate(2, 3, 0.5)]], 10) == [Candidate(2, 3, 0.5)]


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("33GB", 33 * 10**9), ("33GiB", 33 << 30), ("1.5 mib", 3 << 19), ("700kB", 700_000), ("123456", 123456)],
)
def test_sizes(text: str, bytes_: int) -> None:
    assert target(None, text) == Target(bytes=bytes_)


def test_capacity() -> None:
    assert Target(bytes=1000).capacity(100, 7) == 900
    assert Target(bits_per_weight=4.5).capacity(100, 1000) == 562
    assert target(None, None) is None


@pytest.mark.parametrize("text", ["33XB", "GB", "", "-1GB", "0GB", "1e3", "33 G B"])
def test_no_size(text: str) -> None:
    with pytest.raises(ConvertError, match="--size"):
        target(None, text)


@pytest.mark.parametrize("bits", [0.0, -1.0, float("nan"), float("inf")])
def test_no_bits(bits: float) -> None:
    with pytest.raises(ConvertError, match="--bpw"):
        target(bits, None)


def test_one_of_both() -> None:
    with pytest.raises(ConvertError, match="exclude"):
        target(4.5, "33GB")
