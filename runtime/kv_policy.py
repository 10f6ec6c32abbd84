"""What a person asks of the KV cache, and what that is for a given model, context and prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ziggurat.runtime.bindings.kv_settings import KVSettings
from ziggurat.runtime.budget import (
    PRESETS,
    Budget,
    Pyramid,
    Schedule,
    Uniform,
    allocate,
    check_score,
    parse_budget,
    pool_of,
    schedule_named,
)
from ziggurat.runtime.errors import InvalidRequestError

#: The preset taken when a budget is given and none is named, and the name for no budget.
DEFAULT_PRESET, NO_BUDGET = "pyramid", "none"
#: Prompts that are read at a time, unless asked otherwise.
LANES = 2
#: The layers of a model: the sliding window of each, 0 for those that see everything; or how many there are of these.
Layers = int | Sequence[int]
_LENGTHS = 256  # of prompts that ``most_rows`` looks at
_LIBRARY_ROWS = 256  # rows of a context are allocated in such steps


@dataclass(frozen=True)
class KVPolicy:
    """A budget with its schedule (how many rows each layer keeps) and score (which); see ``KVSettings`` for the rest.

    ``reading`` and ``copies`` are ``n_reading`` (None: as many as suit) and ``n_copies`` there: prompts that may be
    read at a time, and how many of them after others. A part of the prompt that has no room for window and sinks is
    raised to them; a number of rows that has none is refused with InvalidRequestError.
    """

    budget: Budget
    schedule: Schedule = field(default_factory=Pyramid)
    score: str = KVSettings.score
    window: int = KVSettings.window
    sinks: int = KVSettings.sinks
    pool: int | None = None
    pool_type: str = KVSettings.pool_type
    slack: int = KVSettings.slack
    prefill: str = KVSettings.prefill
    seed: int = KVSettings.seed
    reading: int | None = None
    copies: int | None = KVSettings.n_copies

    def __post_init__(self) -> None:
        check_score(self.score)
        if self.pool is None:
            object.__setattr__(self, "pool", pool_of(self.score))
        if not self.pool or self.pool % 2 == 0:
            raise InvalidRequestError(f"--kv-pool {self.pool}: it has to be odd, so that it has a middle")
        least = self.window + self.sinks
        if self.budget.rows is not None and self.budget.rows < least:
            raise InvalidRequestError(
                f"--kv-budget {self.budget.rows}: has no room for the window ({self.window}) and the sinks"
                f" ({self.sinks}): give at least {least} rows, or a smaller --kv-window"
            )

    @property
    def varies(self) -> bool:
        """Whether prompts of different lengths get different rows."""
        return self.budget.percent is not None or not isinstance(self.schedule, Uniform)

    def rows(self, layers: Layers, n_ctx: int, prompt_tokens: int | None = None) -> tuple[int, ...]:
        """Return the rows that each layer keeps of a prompt, by default the longest that the context takes.

        Only layers that see everything have a budget, and are what a schedule counts; the others' rows are 0.
        """
        windows = (0,) * layers if isinstance(layers, int) else layers
        n_bounded = sum(not window for window in windows)
        context = max(-(-n_ctx // _LIBRARY_ROWS) * _LIBRARY_ROWS, self.window + self.sinks)
        tokens = min(prompt_tokens or n_ctx, n_ctx)
        total = max(self.budget.total(n_bounded, tokens), n_bounded * (self.window + self.sinks))
        bounded = iter(
            allocate(
                total,
                n_bounded,
                schedule=self.schedule,
                window=self.window,
                sinks=self.sinks,
                prompt_tokens=tokens,
                context=context,
            )
        )
        return tuple(0 if window else next(bounded) for window in windows)

    def most_rows(self, layers: Layers, n_ctx: int) -> tuple[int, ...]:
        """Return the most rows that each layer keeps of a prompt of any length up to the context.

        A falling schedule is flatter for shorter prompts: a layer above keeps more of those. (Looked at for lengths
        close to each other, not for every one: ``rows`` may ask for one more.)
        """
        step = max(1, n_ctx // _LENGTHS)
        found = [self.rows(layers, n_ctx, tokens) for tokens in (*range(step, n_ctx, step), n_ctx)]
        return tuple(map(max, zip(*found, strict=True)))

    def lanes(self, parallel: int) -> int:
        """Return how many prompts are read at a time when so many requests run together."""
        return min(self.reading or LANES, parallel)

    def settings(self, rows: tuple[int, ...]) -> KVSettings:
        """Return what a context is made with, to keep these rows."""
        return KVSettings(
            rows=rows,
            window=self.window,
            sinks=self.sinks,
            pool=self.pool,
            pool_type=self.pool_type,
            slack=self.slack,
            score=self.score,
            prefill=self.prefill,
            seed=self.seed,
            n_reading=self.reading or 1,
            n_copies=self.copies,
        )

    def as_json(self) -> dict[str, Any]:
        """Return it as reports have it."""
        names = ("score", "window", "sinks", "pool", "pool_type", "slack", "prefill", "seed")
        return {
            "budget": str(self.budget),
            "schedule": self.schedule.method.name,
            **{name: getattr(self, name) for name in names},
            "reading": self.reading or 1,
        }


def not_used(reason: str) -> str:
    """Say to a person that a model has no budget although one was asked for."""
    return f"no KV budget, every row is kept: {reason}"


def policy_of(options: Mapping[str, Any]) -> KVPolicy | None:
    """Return what the ``--kv-*`` options ask for, None for a cache that keeps every row.

    ``options`` are values by parameter name, None where not given. Raises InvalidRequestError for contradictions.
    """
    given = {name: options[name] for name in _OPTIONS if options.get(name) is not None}
    amount, preset = given.pop("kv_budget", None), given.pop("kv_policy", None)
    if amount is None or preset == NO_BUDGET:
        _check_no_budget(amount, preset, given)
        return None
    parsed = parse_budget(amount)
    chosen = PRESETS[preset or DEFAULT_PRESET]
    score = given.pop("kv_score", chosen.score)
    schedule = schedule_named(given.pop("kv_schedule", chosen.schedule))
    return KVPolicy(parsed, schedule, score, **{name.removeprefix("kv_"): value for name, value in given.items()})


_OPTIONS = (
    "kv_budget",
    "kv_policy",
    "kv_schedule",
    "kv_score",
    "kv_window",
    "kv_sinks",
    "kv_pool",
    "kv_pool_type",
    "kv_prefill",
    "kv_reading",
)


def _check_no_budget(amount: str | None, preset: str | None, others: Mapping[str, Any]) -> None:
    """Refuse options that say how to keep rows when all are kept."""
    keeps_all = preset == NO_BUDGET
    asked = {"kv_budget": amount} if keeps_all else {"kv_policy": preset}
    flags = ", ".join(
        "--" + name.replace("_", "-") for name, value in (asked | dict(others)).items() if value is not None
    )
    if flags and keeps_all:
        raise InvalidRequestError(f"{flags}: --kv-policy none keeps every row; leave out one or the other")
    if flags:
        raise InvalidRequestError(f"{flags}: says how to keep a budget, and there is none; add --kv-budget ROWS or N%")
