"""Text that grows is wrapped as if it had come at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from ziggurat.tui.widgets.tail import TailLines, wrap


def rows(tail: TailLines) -> list[str]:
    return [tail.row(number) for number in range(tail.rows)]


def test_words_stay_whole_where_they_fit() -> None:
    assert wrap("the quick brown fox", 10) == ["the quick ", "brown fox"]
    assert wrap("abcdefghijkl", 5) == ["abcde", "fghij", "kl"]


def test_wide_characters_count_twice() -> None:
    assert wrap("日本語日本語", 4) == ["日本", "語日", "本語"]


@given(st.text("ab \n日", max_size=200), st.integers(2, 12), st.integers(1, 7))
def test_pieces_give_rows_that_fit_and_lose_nothing(text: str, width: int, size: int) -> None:
    grown = TailLines(width)
    for at in range(0, len(text), size):
        grown.feed(text[at : at + size])
    assert "".join(rows(grown)) == text.replace("\n", "")
    assert all(cell_len(row.rstrip(" ")) <= width for row in rows(grown))
