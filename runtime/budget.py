"""How many KV rows each layer keeps, in whole numbers, and the methods' names.

"How many" is a schedule, "which" a score; a preset is one of each. This module is arithmetic: it knows no library. Row
counts are per layer and KV head, window and sinks included; ``total`` is their sum over the layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from ziggurat.runtime.errors import InvalidRequestError

#: Last tokens whose queries observe, and first tokens that always stay.
WINDOW, SINKS = 32, 4
#: Pooling of the score snapkv; the others are not pooled unless asked. Wider than the papers' 5 (average) or 7
#: (maximum): an answer of several tokens stands beside what the question attends to, see
#: ``tests/benchmarks/kv_retrieval.py``.
POOL, POOL_TYPE = 13, "max"
#: What the pyramid's base is divided by to give its top.
BETA = 20


@dataclass(frozen=True)
class Method:
    """A published method."""

    name: str
    paper: str
    link: str


class Schedule(Protocol):
    """Says how many rows each layer keeps."""

    @property
    def method(self) -> Method:
        """Where it is from."""
        ...

    def shares(self, mean: Fraction, layers: int, *, window: int, sinks: int, tokens: int | None) -> list[Fraction]:
        """Return rows per layer, not yet whole: they sum to ``mean * layers`` and each is at least window + sinks.

        ``tokens`` is how long the prompt is, None where that is not known; no layer gets more if it is at least
        ``mean``.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """The same number in every layer."""

    method = Method("uniform", "SnapKV (Li et al. 2024)", "https://arxiv.org/abs/2404.14469")

    def shares(self, mean: Fraction, layers: int, *, window: int, sinks: int, tokens: int | None) -> list[Fraction]:
        """See ``Schedule``."""
        return [mean] * layers


@dataclass(frozen=True)
class Pyramid:
    """Falls linearly from the first layer to the last, around the mean.

    With C rows on average, a window of w tokens, b = C - w and a prompt of q tokens, the last layer selects
    min = b / beta rows beside the window and the first max = 2b - min; where max reaches q - w it is set to that and
    min to 2b - max. For C <= q < 2b all layers get C, and a prompt of q < C is kept whole. Source: the authors' code
    (``pyramidkv_utils.py`` of KVCache-Factory). Deviations: it rounds min and the step between layers down, so that
    its sums miss what was asked by some per cent, here they are exact; min is never below the sinks, which the authors
    do not keep; one layer is allowed.
    """

    beta: int = BETA
    method = Method("pyramid", "PyramidKV (Cai et al. 2024)", "https://arxiv.org/abs/2406.02069")

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise InvalidRequestError(f"the pyramid's beta is {self.beta}; it must be at least 1")

    def shares(self, mean: Fraction, layers: int, *, window: int, sinks: int, tokens: int | None) -> list[Fraction]:
        """See ``Schedule``."""
        selected = mean - window
        if layers == 1 or (tokens is not None and tokens < max(mean, 2 * selected)):
            return [mean] * layers
        least = max(selected / self.beta, Fraction(sinks))
        most = 2 * selected - least
        if tokens is not None and most >= tokens - window:
            most = Fraction(tokens - window)
            least = 2 * selected - most
        step = (most - least) / (layers - 1)
        return [window + most - layer * step for layer in range(layers)]


SCHEDULES: dict[str, Schedule] = {schedule.method.name: schedule for schedule in (Uniform(), Pyramid())}

_H2O = ("H2O (Zhang et al. 2023)", "https://arxiv.org/abs/2306.14048")
_TOVA = ("TOVA (Oren et al. 2024)", "https://arxiv.org/abs/2401.06104")
_KEYDIFF = ("KeyDiff (Park et al. 2025)", "https://arxiv.org/abs/2504.15364")

#: Which rows stay.
SCORES = {
    method.name: method
    for method in (
        Method("snapkv", "SnapKV (Li et al. 2024)", "https://arxiv.org/abs/2404.14469"),
        Method("recent", "StreamingLLM (Xiao et al. 2023)", "https://arxiv.org/abs/2309.17453"),
        Method("random", "rows drawn at random: the control", ""),
        Method("h2o", *_H2O),
        Method("tova", *_TOVA),
        Method("keydiff", *_KEYDIFF),
    )
}


@dataclass(frozen=True)
class Preset:
    """A schedule and a score, by name, that were published together."""

    schedule: str
    score: str
    method: Method


#: ``none``, the library's own cache that keeps every row, is no preset of a budget.
PRESETS = {
    preset.method.name: preset
    for preset in (
        Preset("pyramid", "snapkv", Pyramid.method),
        Preset("uniform", "snapkv", SCORES["snapkv"]),
        Preset("uniform", "recent", Method("streaming", SCORES["recent"].paper, SCORES["recent"].link)),
        Preset("uniform", "h2o", SCORES["h2o"]),
        Preset("uniform", "tova", SCORES["tova"]),
        Preset("uniform", "keydiff", SCORES["keydiff"]),
    )
}


def schedule_named(name: str) -> Schedule:
    """Return a schedule. Raises InvalidRequestError when there is none of this name."""
    if name not in SCHEDULES:
        raise InvalidRequestError(f"there is no schedule {name!r}; take one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def pool_of(score: str) -> int:
    """Return over how many positions a score is pooled unless asked otherwise."""
    return POOL if score == "snapkv" else 1


def check_score(name: str) -> None:
    """Raise InvalidRequestError for a score that there is not."""
    if name not in SCORES:
        raise InvalidRequestError(f"there is no score {name!r}; take one of {', '.join(SCORES)}")


def allocate(
    total: int,
    layers: int,
    *,
    schedule: Schedule | str = "pyramid",
    window: int = WINDOW,
    sinks: int = SINKS,
    prompt_tokens: int | None = None,
    context: int | None = None,
) -> list[int]:
    """Return how many rows each layer keeps after a prompt; they sum to ``total`` exactly, the first layer's largest.

    ``layers`` are those that the model has (after pruning). Each gets at least ``window + sinks``, and no more than a
    prompt of ``prompt_tokens`` has, if that is not shorter than the mean (a shorter one is kept whole, and the counts
    are uniform); without it prompts are taken to be as long as ``context``, the most rows a layer can hold. A total
    that is enough for all of them gives each layer ``context``: the one case where the sum is smaller.

    Raises InvalidRequestError for numbers that make no sense and a total without room for window and sinks.
    """
    if layers < 1 or window < 1 or sinks < 0 or total < 1:
        raise InvalidRequestError(
            f"a budget of {total} rows over {layers} layers with a window of {window} and {sinks} sinks makes no sense"
        )
    for what, value in (("prompt", prompt_tokens), ("context", context)):
        if value is not None and value < 1:
            raise InvalidRequestError(f"a {what} of {value} tokens makes no sense")
    if context is not None and total >= layers * context:
        return [context] * layers
    least = layers * (window + sinks)
    if total < least:
        raise InvalidRequestError(
            f"a budget of {total} rows over {layers} layers has no room for the window ({window}) and the sinks"
            f" ({sinks}) of each: give at least {least}"
        )
    chosen = schedule_named(schedule) if isinstance(schedule, str) else schedule
    known = [tokens for tokens in (prompt_tokens, context) if tokens is not None]
    tokens = min(known) if known else None
    shares = chosen.shares(Fraction(total, layers), layers, window=window, sinks=sinks, tokens=tokens)
    return _whole(shares, total)


def _whole(shares: Sequence[Fraction], total: int) -> list[int]:
    """Round down, and add one to the largest remainders, the first of equals.

    So a falling sequence keeps falling, and none leaves whole bounds.
    """
    rows = [math.floor(share) for share in shares]
    missing = total - sum(rows)
    assert 0 <= missing < len(rows), "a schedule has to sum to what it was asked for"
    by_remainder = sorted(range(len(rows)), key=lambda layer: (rows[layer] - shares[layer], layer))
    for layer in by_remainder[:missing]:
        rows[layer] += 1
    return rows


@dataclass(frozen=True)
class Budget:
    """What ``--kv-budget`` asks for: a mean number of rows, or a part of the prompt's tokens. Exactly one is given."""

    rows: int | None = None
    percent: Fraction | None = None

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.percent is None):
            raise InvalidRequestError("a budget is either a number of rows or a part of the prompt")
        if (self.rows is not None and self.rows < 1) or (self.percent is not None and not 0 < self.percent <= 100):
            raise InvalidRequestError(f"a budget of {self} makes no sense")

    def __str__(self) -> str:
        return f"{self.rows} rows" if self.percent is None else f"{float(self.percent):g}%"

    def total(self, layers: int, prompt_tokens: int) -> int:
        """Return the rows over all layers for a prompt, at least one."""
        if self.percent is None:
            assert self.rows is not None
            return self.rows * layers
        return max(1, round(self.percent * prompt_tokens * layers / 100))


def parse_budget(text: str) -> Budget:
    """Read ``512`` or ``12.5%``. Raises InvalidRequestError for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,12})(\.[0-9]{1,12})?\s*(%?)\s*", text)
    number = Fraction(f"{match[1]}{match[2] or ''}") if match else Fraction(0)
    if match is None or number <= 0 or (number > 100 if match[3] else match[2] is not None):
        raise InvalidRequestError(
            f"--kv-budget {text}: give a number of rows above 0, or a part of the prompt such as 12%"
        )
    return Budget(percent=number) if match[3] else Budget(rows=int(number))
