"""What a KV budget is set to, and what it tells: plain values, without the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ziggurat.runtime.budget import POOL_TYPE, SINKS, WINDOW, pool_of
from ziggurat.runtime.errors import InvalidRequestError

#: Which rows stay.
SCORES = {"snapkv": 0, "recent": 1, "random": 2, "tova": 3, "keydiff": 4, "h2o": 5}
#: Queries of generated tokens that the score h2o sums up together.
SETTLED = 32
#: How prompts are read; lane is for comparisons.
PREFILLS = {"exact": 0, "bounded": 1, "chunked": 2, "lane": 3}
#: How scores are pooled over neighbouring positions.
POOLS = {"avg": 0, "max": 1}
_MAX = 2**32 - 1
_BOUNDS = {
    "window": (1, _MAX), "sinks": (0, _MAX), "pool": (1, 255), "slack": (1, 2**20), "seed": (0, _MAX),
    "n_reading": (1, _MAX),
}  # fmt: skip


@dataclass(frozen=True)
class KVSettings:
    """A context's KV budget.

    ``rows`` are those per KV head that each of the model's layers keeps after a prompt, the ``window`` last tokens and
    the ``sinks`` first ones included; more than the context has mean all. 0 is for layers with a sliding window: they
    have no budget, and what the library keeps for them without one. What the other rows are chosen by is ``score``,
    see ``ziggurat-kv.h``: the attention of the window's queries (snapkv), of the last (tova) or of all so far (h2o),
    how little a key is like the others (keydiff), the latest rows (recent), chance (random). Scores are pooled over
    ``pool`` positions (odd; None: 13 for snapkv, 1 for the others) by ``pool_type``. ``slack`` is how many rows a
    layer has beyond, at least, for generated tokens. ``prefill`` exact selects once, after the whole prompt, layer by
    layer where the model's graph can be cut and else beside a full cache for one prompt; bounded is the same but
    refuses the latter, which lane takes in any case; chunked selects after every ubatch, which loses what only the
    prompt's end asks for. ``seed`` is that of the score random. ``n_reading`` prompts, no more than there are
    sequences, may be read at a time; each takes the memory of a stage. ``n_copies`` of them (None: all) may follow what
    their sequence holds already; each takes the memory of another sequence.
    """

    rows: tuple[int, ...]
    window: int = WINDOW
    sinks: int = SINKS
    pool: int | None = None
    pool_type: str = POOL_TYPE
    slack: int = 64
    score: str = "snapkv"
    prefill: str = "exact"
    seed: int = 0
    n_reading: int = 1
    n_copies: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if self.pool is None:
            object.__setattr__(self, "pool", pool_of(self.score))
        for name, (least, most) in _BOUNDS.items():
            if not least <= getattr(self, name) <= most:
                raise InvalidRequestError(
                    f"the KV budget's {name} is {getattr(self, name)}; it must be from {least} to {most}"
                )
        if not self.pool or self.pool % 2 == 0:
            raise InvalidRequestError(f"the KV budget's pool is {self.pool}; it must be odd")
        for name, known in (("pool_type", POOLS), ("score", SCORES), ("prefill", PREFILLS)):
            if getattr(self, name) not in known:
                raise InvalidRequestError(f"a KV budget has no {name} {getattr(self, name)!r}: {', '.join(known)}")
        if self.n_copies is not None and not 0 <= self.n_copies <= self.n_reading:
            raise InvalidRequestError(
                f"the KV budget's n_copies is {self.n_copies}; it must be from 0 to n_reading ({self.n_reading})"
            )
        least = self.window + self.sinks
        if not self.bounded or not least <= min(self.bounded) <= max(self.bounded) <= _MAX:
            raise InvalidRequestError(
                f"a KV budget needs at least {least} rows in every layer, for the window and the sinks; this one has"
                f" {min(self.bounded, default=0)} in one"
            )

    @property
    def observed(self) -> int:
        """Last tokens whose queries are kept to score by, 0 where it needs none."""
        return {"snapkv": self.window, "tova": 1, "h2o": SETTLED}.get(self.score, 0)

    @property
    def bounded(self) -> tuple[int, ...]:
        """The rows of the layers that have a budget."""
        return tuple(rows for rows in self.rows if rows)

    def of_bounded(self, values: Sequence[int]) -> tuple[int, ...]:
        """Return the values, one for each layer, of the layers that have a budget."""
        return tuple(value for value, rows in zip(values, self.rows, strict=True) if rows)

    @property
    def copies(self) -> int:
        """Prompts that may follow what their sequence holds."""
        return self.n_reading if self.n_copies is None else self.n_copies


@dataclass(frozen=True)
class KVLayout:
    """What a context with a budget has allocated for all its sequences, in bytes.

    ``rows_bytes`` are K and V rows, ``position_bytes`` the positions of selected rows; ``query_bytes`` are queries of
    each sequence's last tokens and ``sum_bytes`` sums of attention, where rows are selected by them. Used only while
    prompts are read: ``copy_bytes``, the copies of their sequences; ``stage_bytes``, for each of them ``stage_rows``
    rows of one layer or, when ``layer_major`` is False, of all of them; and ``hidden_bytes``, hidden states between the
    layers.
    """

    rows_bytes: int
    position_bytes: int
    query_bytes: int
    sum_bytes: int
    copy_bytes: int
    stage_bytes: int
    hidden_bytes: int
    stage_rows: int
    layer_major: bool

    @property
    def kept_bytes(self) -> int:
        """What stays after a prompt."""
        return self.rows_bytes + self.position_bytes + self.query_bytes + self.sum_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.kept_bytes + self.copy_bytes + self.stage_bytes + self.hidden_bytes


@dataclass(frozen=True)
class Progress:
    """How far a prompt of ``tokens`` tokens is read. A step is one ubatch in one layer, or in all of them."""

    steps_done: int
    steps: int
    tokens: int
    finished: bool

    @property
    def fraction(self) -> float:
        """The part of the steps that is done, 0.0 to 1.0."""
        return self.steps_done / self.steps
