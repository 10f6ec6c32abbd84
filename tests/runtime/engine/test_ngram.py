from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.runtime.engine import ngram
from ziggurat.runtime.engine.ngram import NgramDrafter
from ziggurat.runtime.engine.speculation import Wanted


def drafted(drafter: NgramDrafter, tokens: list[int], limit: int = 4, slot: int = 0) -> list[int]:
    return drafter.draft([Wanted(slot, tokens, limit)])[0]


def searched(tokens: list[int], limit: int, lengths: tuple[int, ...]) -> list[int]:
    """The definition: of the longest end that occurred before, what followed its last occurrence."""
    for length in lengths:
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(tokens) > length and tokens[end - length : end] == tokens[-length:]:
                longer = list(tokens)
                for _ in range(limit):
                    longer.append(longer[end + len(longer) - len(tokens)])
                return longer[len(tokens) :]
    return []


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([1], []),
        ([1, 2, 3, 4, 5], []),
        ([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3], [4, 5, 6, 7]),
        ([1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 9, 1, 2, 3], [5, 9, 9, 1]),  # the most recent
        ([7, 1, 2, 3, 4, 9, 8, 1, 2, 3, 5, 9, 7, 1, 2, 3], [4, 9, 8, 1]),  # but a longer match first
        ([9, 1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),  # a repetition goes on
        ([5, 5, 5, 5], [5, 5, 5, 5]),
    ],
)
def test_what_followed_is_proposed(tokens: list[int], expected: list[int]) -> None:
    if tokens:
        assert drafted(NgramDrafter(), tokens) == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 60), st.integers(1, 15))
def test_a_growing_list_and_a_search_agree(tokens: list[int], start: int, limit: int) -> None:
    lengths = (3, 2)
    drafter = NgramDrafter(lengths=lengths)
    growing = tokens[:start]
    for count in range(start, len(tokens) + 1):
        growing[count - 1 : count] = [tokens[count - 1]]
        assert drafted(drafter, growing, limit) == searched(growing, limit, lengths)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=2, max_size=6))
def test_a_replaced_list_leaves_nothing(lists: list[list[int]]) -> None:
    drafter = NgramDrafter(lengths=(2,))
    for tokens in lists:
        assert drafted(drafter, tokens, 5) == searched(tokens, 5, (2,))


def test_slots_know_nothing_of_each_other() -> None:
    drafter = NgramDrafter()
    text = [1, 2, 3, 4, 5, 1, 2, 3]
    assert drafter.draft([Wanted(0, text, 2), Wanted(3, [1, 2, 3], 2)]) == [[4, 5], []]
    drafter.forget(0)
    assert drafted(drafter, [9, 1, 2, 3]) == []
    drafter.close()
    assert drafted(drafter, text, 2) == [4, 5]


def test_ends_are_not_proposed() -> None:
    text = [1, 2, 3, 4, 0, 6, 1, 2, 3]
    assert drafted(NgramDrafter(ends=(0,)), text, 6) == [4]


def test_token_ids_of_large_vocabularies_are_told_apart() -> None:
    high = 2**20 + 5
    assert drafted(NgramDrafter(), [high, 1, 2, 7, 8, 5, 1, 2]) == []
    assert drafted(NgramDrafter(), [high, 1, 2, 7, 8, high, 1, 2], 2) == [7, 8]


def test_a_long_prompt_is_indexed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_PIECE", 100)
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 50, 450)] + [60, 61, 62, 63, 5, 60, 61, 62]
    drafter = NgramDrafter()
    assert drafter.reader(0, tokens[:90]) is None
    reader = drafter.reader(0, tokens)
    assert reader is not None
    seen = [reader.progress]
    while not reader.step():
        seen.append(reader.progress)
        assert drafter.reader(0, tokens) is None or len(seen) < 5
    assert (len(seen), seen[0], reader.progress) == (5, 0.0, 1.0)
    assert seen == sorted(seen)
    assert drafter.reader(0, tokens) is None
    assert drafted(drafter, tokens, 2) == [63, 5]
    # whoever does not read gets nothing at first, and a piece is indexed with every call
    other = NgramDrafter()
    assert [drafted(other, tokens, 2) for _ in range(5)] == [[], [], [], [], [63, 5]]


def test_a_cancelled_reading_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_PIECE", 10)
    tokens = list(range(100, 130)) + [100, 101, 102]
    drafter = NgramDrafter()
    reader = drafter.reader(0, tokens)
    assert reader is not None
    assert not reader.step()
    reader.cancel()
    again = drafter.reader(0, tokens)
    assert again is not None
    while not again.step():
        pass
    assert drafted(drafter, tokens, 2) == [103, 104]
