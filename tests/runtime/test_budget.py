"""The budgets' arithmetic, beside the two published formulas."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.runtime.budget import PRESETS, SCHEDULES, SCORES, Budget, Pyramid, allocate, check_score, parse_budget
from ziggurat.runtime.errors import InvalidRequestError


def factory(layers: int, mean: int, prompt: int, window: int, beta: int = 20) -> list[int]:
    """Rows per layer by the formula of PyramidKV's authors, with its rounding; the window comes on top."""
    selected = mean - window
    if prompt < mean:
        return [prompt] * layers
    if prompt < 2 * selected:
        return [mean] * layers
    least = selected // beta
    most = 2 * selected - least
    if most >= prompt - window:
        most = prompt - window
        least = 2 * selected - most
    step = (most - least) // (layers - 1)
    return [window + most - layer * step for layer in range(layers)]


def kvpress(layers: int, selected: int, prompt: int, window: int, beta: int = 20) -> list[int]:
    """Rows per layer by NVIDIA's formula, where the window is among the ``selected`` rows, with its rounding."""
    least = selected / beta
    most = selected * 2 - least
    if most >= prompt - window:
        most = prompt - window
        least = selected * 2 - most
    if not prompt >= most >= least >= window:
        return [selected] * layers
    return [round(most - layer * (most - least) / (layers - 1)) for layer in range(layers)]


MEANS = (40, 64, 128, 500, 1024, 2048)
PROMPTS = (10, 39, 40, 41, 63, 64, 65, 100, 128, 192, 240, 256, 936, 1000, 2000, 4096, 10_000, 131_072)


@pytest.mark.parametrize("layers", [2, 3, 4, 28, 32, 70, 80])
@pytest.mark.parametrize("window", [8, 32])
def test_the_authors_formula(window: int, layers: int) -> None:
    for mean, prompt in itertools.product(MEANS, PROMPTS):
        rows = allocate(layers * mean, layers, window=window, sinks=0, prompt_tokens=prompt)
        theirs = factory(layers, mean, prompt, window)
        assert sum(rows) == layers * mean
        for layer, (ours, wanted) in enumerate(zip(rows, theirs, strict=True)):
            if prompt < mean:
                assert ours >= wanted == prompt  # everything is kept
            else:
                # they round down twice: the top's rows, which the base gets, and every step
                assert abs(ours - wanted) <= 2 + layer, (mean, prompt)


@pytest.mark.parametrize("layers", [2, 3, 4, 28, 32, 70, 80])
@pytest.mark.parametrize("window", [8, 32])
def test_nvidias_formula(window: int, layers: int) -> None:
    for mean, prompt in itertools.product(MEANS, PROMPTS):
        selected = mean - window
        if prompt < max(mean, 2 * selected) or selected / 20 < window:
            continue  # uniform in one of the two
        rows = allocate(layers * mean, layers, window=window, sinks=0, prompt_tokens=prompt)
        theirs = kvpress(layers, selected, prompt, window)
        assert all(abs(ours - window - wanted) <= 1 for ours, wanted in zip(rows, theirs, strict=True))


def test_the_overshoot_of_rounding_down_is_gone() -> None:
    theirs = factory(32, 64, 8192, window=8)
    assert sum(theirs) / (32 * 64) == pytest.approx(1.117, abs=0.001)
    assert sum(allocate(32 * 64, 32, window=8, sinks=0, prompt_tokens=8192)) == 32 * 64


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        # b = 96: min 4.8, max 187.2, in three steps of 60.8
        ({"total": 512, "layers": 4}, [219, 158, 98, 37]),
        # the top holds no fewer than the sinks
        ({"total": 512, "layers": 4, "sinks": 16}, [208, 155, 101, 48]),
        # one layer
        ({"total": 99, "layers": 1}, [99]),
        ({"total": 99, "layers": 1, "schedule": "uniform", "prompt_tokens": 5000}, [99]),
        # the window and the sinks, and nothing to choose
        ({"total": 72, "layers": 2}, [36, 36]),
        ({"total": 73, "layers": 2}, [37, 36]),
        # a prompt shorter than the mean, just as long, one longer, just below and at 2b
        ({"total": 400, "layers": 2, "prompt_tokens": 7}, [200, 200]),
        ({"total": 400, "layers": 2, "prompt_tokens": 200}, [200, 200]),
        ({"total": 400, "layers": 2, "prompt_tokens": 201}, [200, 200]),
        ({"total": 400, "layers": 2, "prompt_tokens": 335}, [200, 200]),
        ({"total": 400, "layers": 2, "prompt_tokens": 336}, [336, 64]),
        # max reaches the prompt, and no layer gets more than it has
        ({"total": 402, "layers": 2, "prompt_tokens": 350}, [350, 52]),
        ({"total": 401, "layers": 2, "prompt_tokens": 340}, [340, 61]),
        # without a prompt it is taken to be as long as the context
        ({"total": 400, "layers": 2, "context": 336}, [336, 64]),
        ({"total": 400, "layers": 2, "context": 300}, [200, 200]),
        # the budget is the context or more
        ({"total": 512, "layers": 2, "context": 256}, [256, 256]),
        ({"total": 9999, "layers": 2, "context": 256, "prompt_tokens": 100}, [256, 256]),
        ({"total": 511, "layers": 2, "context": 256}, [256, 255]),
        # ... even one too small for window and sinks
        ({"total": 40, "layers": 2, "context": 20}, [20, 20]),
        # more prompt than context makes no difference
        ({"total": 400, "layers": 2, "context": 300, "prompt_tokens": 4000}, [200, 200]),
        # what does not divide goes to the first layers
        ({"total": 302, "layers": 3, "schedule": "uniform"}, [101, 101, 100]),
        ({"total": 512, "layers": 4, "schedule": Pyramid(beta=1)}, [128] * 4),
        ({"total": 512, "layers": 4, "schedule": Pyramid(beta=2)}, [176, 144, 112, 80]),
    ],
)
def test_edges(arguments: dict[str, object], rows: list[int]) -> None:
    assert allocate(**arguments) == rows  # type: ignore[arg-type]


@given(
    layers=st.integers(1, 130),
    window=st.integers(1, 64),
    sinks=st.integers(0, 16),
    spare=st.integers(0, 200_000),
    schedule=st.sampled_from(list(SCHEDULES)),
    prompt=st.none() | st.integers(1, 5000),
    context=st.none() | st.integers(1, 8000),
)
def test_sums_minima_and_falling(
    layers: int, window: int, sinks: int, spare: int, schedule: str, prompt: int | None, context: int | None
) -> None:
    total = layers * (window + sinks) + spare
    rows = allocate(
        total,
        layers,
        schedule=schedule,
        window=window,
        sinks=sinks,
        prompt_tokens=prompt,
        context=context,
    )
    assert len(rows) == layers
    assert all(before >= after for before, after in itertools.pairwise(rows))
    if context is not None and total >= layers * context:
        assert rows == [context] * layers
        return
    assert sum(rows) == total
    assert min(rows) >= window + sinks
    assert context is None or max(rows) <= context
    if prompt is not None and total <= layers * prompt:
        assert max(rows) <= prompt
    elif prompt is not None:
        assert min(rows) >= min(prompt, total // layers)  # a short prompt is kept whole
    if schedule == "uniform":
        assert max(rows) - min(rows) <= 1


@given(layers=st.integers(2, 90), mean=st.integers(36, 5000), prompt=st.integers(36, 20_000))
def test_a_larger_budget_is_nowhere_more_than_a_row_smaller_in_the_mean(layers: int, mean: int, prompt: int) -> None:
    """The schedule of a long prompt is linear: each layer is within a row of its place on the line."""
    rows = allocate(layers * mean, layers, prompt_tokens=prompt)
    line = [rows[0] + (rows[-1] - rows[0]) * Fraction(layer, layers - 1) for layer in range(layers)]
    assert all(abs(count - place) <= 1 for count, place in zip(rows, line, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 71, "layers": 2}, "71 rows over 2 layers has no room for the window (32) and the sinks (4)"),
        ({"total": 71, "layers": 2}, "at least 72"),
        ({"total": 100, "layers": 0}, "over 0 layers"),
        ({"total": 0, "layers": 2}, "0 rows"),
        ({"total": 100, "layers": 2, "window": 0}, "a window of 0"),
        ({"total": 100, "layers": 2, "sinks": -1}, "-1 sinks"),
        ({"total": 100, "layers": 2, "prompt_tokens": 0}, "a prompt of 0"),
        ({"total": 100, "layers": 2, "context": -5}, "a context of -5"),
        ({"total": 100, "layers": 2, "schedule": "sphinx"}, "take one of uniform, pyramid"),
    ],
)
def test_what_makes_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        allocate(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_beta_below_one_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="beta is 0"):
        Pyramid(beta=0)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("512", Budget(rows=512)),
        (" 7 ", Budget(rows=7)),
        ("12%", Budget(percent=Fraction(12))),
        ("12.5%", Budget(percent=Fraction(25, 2))),
        ("0.1 %", Budget(percent=Fraction(1, 10))),
        ("100%", Budget(percent=Fraction(100))),
    ],
)
def test_budgets_are_read(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "+5", "101%", "0%", "many", "1.5", "%", "nan%", "inf", "1e3", "٣", "5%%", "5 6", "9" * 13]
)
def test_bad_budgets_are_one_line(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_budget(text)
    assert f"--kv-budget {text}: give" in str(caught.value)


def test_totals() -> None:
    assert Budget(rows=100).total(7, 5) == 700
    assert Budget(percent=Fraction(12)).total(4, 1000) == 480
    assert Budget(percent=Fraction(25, 2)).total(3, 100) == 38  # 37.5 rows; halves go to the even neighbour
    assert Budget(percent=Fraction(1, 10)).total(1, 1) == 1
    assert (str(Budget(rows=9)), str(Budget(percent=Fraction(25, 2)))) == ("9 rows", "12.5%")


@pytest.mark.parametrize("values", [{}, {"rows": 1, "percent": Fraction(1)}, {"rows": 0}, {"percent": Fraction(101)}])
def test_budgets_that_are_none(values: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        Budget(**values)  # type: ignore[arg-type]


def test_every_method_names_its_paper() -> None:
    methods = [*SCORES.values(), *(s.method for s in SCHEDULES.values()), *(p.method for p in PRESETS.values())]
    for method in methods:
        assert method.paper
        assert method.link.startswith("https://arxiv.org/abs/") or method.name == "random"
    for name, preset in PRESETS.items():
        assert name == preset.method.name
        assert preset.schedule in SCHEDULES
        assert preset.score in SCORES
    assert {name: (preset.schedule, preset.score) for name, preset in PRESETS.items()} == {
        "pyramid": ("pyramid", "snapkv"),
        "snapkv": ("uniform", "snapkv"),
        "streaming": ("uniform", "recent"),
        "h2o": ("uniform", "h2o"),
        "tova": ("uniform", "tova"),
        "keydiff": ("uniform", "keydiff"),
    }


def test_names_of_scores() -> None:
    for name in SCORES:
        check_score(name)
    with pytest.raises(InvalidRequestError, match="no score 'psychic'"):
        check_score("psychic")
