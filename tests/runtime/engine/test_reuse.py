"""Where prompts go: a table of cases, and properties."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.runtime.engine.reuse import LEAST_REUSE, Placement, common_prefix, place
from ziggurat.runtime.engine.slots import Slot

TEXT = tuple(range(100, 200))


class Work:
    """What a sequence that is busy points to."""

    def __init__(self, *, reading: bool) -> None:
        self.reading = reading


def held(index: int, tokens: int | tuple[int, ...] = 0, **values: Any) -> Slot:
    """A sequence with so many of the text's tokens, or with others."""
    slot = Slot(index, list(TEXT[:tokens] if isinstance(tokens, int) else tokens), last_used=index)
    for name, value in values.items():
        setattr(slot, name, value)
    return slot


READING, DECODING = Work(reading=True), Work(reading=False)

CASES: dict[str, tuple[list[Slot], Placement | None, dict[str, Any]]] = {
    "all are busy": ([held(0, generation=DECODING)], None, {}),
    "nothing is held": ([held(0), held(1)], Placement(0), {}),
    "an empty one before one that is used": ([held(0, (7,)), held(1)], Placement(1), {}),
    "the one used longest ago": ([held(0, (7,), last_used=9), held(1, (8,), last_used=3)], Placement(1), {}),
    "its beginning is held": ([held(0), held(1, 30)], Placement(1, 30), {}),
    "the longest beginning": ([held(0, 20), held(1, 30), held(2, 10)], Placement(1, 30), {}),
    "all of it is held: the last token is read again": ([held(0, 50), held(1)], Placement(0, 49), {}),
    "held to its end, and more was evicted": ([held(0, 50, removable_from=50), held(1)], Placement(1), {}),
    "it goes on where rows were evicted": ([held(0, 40, removable_from=40, evicted=5)], Placement(0, 40), {}),
    "rows were evicted, and it is reread": (
        [held(0, 40, removable_from=40, evicted=5), held(1)], Placement(1), {"reread": True},
    ),
    "what is being read is of no use": ([held(0, 40, generation=READING), held(1)], Placement(1), {}),
    "another one decodes with its beginning": (
        [held(0, 40, generation=DECODING), held(1)], Placement(1, 40, source=0), {},
    ),
    "that is too short to be of use": ([held(0, LEAST_REUSE - 1), held(1)], Placement(1), {}),
    "or to be copied": (
        [held(0, LEAST_REUSE - 1, generation=DECODING), held(1)], Placement(1), {},
    ),
    "a small part of what is held is copied": (
        [held(0, (*TEXT[:20], *range(60))), held(1)], Placement(1, 20, source=0), {},
    ),
    "but not when there is no other": ([held(0, (*TEXT[:20], *range(60)))], Placement(0, 20), {}),
    "nor when it is the same conversation's": (
        [held(0, (*TEXT[:20], *range(60)), conversation="a"), held(1)], Placement(0, 20), {"conversation": "a"},
    ),
    "what was copied to be copied stays": ([held(0, (5, 6)), held(1, 30, apart=True)], Placement(0, 30, source=1), {}),
    "unless it is all there is": ([held(0, 30, apart=True)], Placement(0, 30), {}),
    "a conversation's own goes before others that are empty": (
        [held(0), held(1, (5, 6), conversation="a")], Placement(1), {"conversation": "a"},
    ),
    "and takes what another one has": (
        [held(0, 40, generation=DECODING), held(1, (5, 6), conversation="a"), held(2)],
        Placement(1, 40, source=0),
        {"conversation": "a"},
    ),
    "the same tokens in two: the conversation's": (
        [held(0, 30, conversation="a"), held(1, 30)], Placement(0, 30), {"conversation": "a"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_place(name: str) -> None:
    slots, wanted, values = CASES[name]
    assert place(list(TEXT[:50]), slots, **values) == wanted


@given(st.integers(0, 700), st.lists(st.integers(0, 2), max_size=5), st.lists(st.integers(0, 2), max_size=5))
def test_common_prefix(count: int, one: list[int], other: list[int]) -> None:
    a, b = [list(range(count)) + end for end in (one, other)]
    wanted = next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b) == common_prefix(b, a) == wanted


tokens = st.lists(st.integers(0, 1), max_size=40)


@given(
    st.lists(st.tuples(tokens, st.integers(0, 40), st.sampled_from((None, READING, DECODING)), st.booleans())),
    tokens.filter(bool),
    st.booleans(),
)
def test_what_is_reused_is_there_and_can_be_cut(
    slots: list[tuple[list[int], int, Any, bool]], prompt: list[int], reread: bool
) -> None:
    made = [
        held(index, tuple(has), removable_from=min(removable, len(has)), generation=work, evicted=int(evicted))
        for index, (has, removable, work, evicted) in enumerate(slots)
    ]
    found = place(prompt, made, reread=reread)
    assert (found is None) == all(slot.busy for slot in made)
    if found is None:
        return
    assert not made[found.slot].busy
    assert found.source != found.slot
    source = made[found.slot if found.source is None else found.source]
    if found.reused:
        assert source.tokens[: found.reused] == prompt[: found.reused]
        assert found.reused < len(prompt)
        assert found.reused == len(source.tokens) or found.reused >= source.removable_from
        assert not source.reading
        assert not (reread and source.evicted)
