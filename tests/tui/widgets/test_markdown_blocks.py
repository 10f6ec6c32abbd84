"""Markdown is cut into the same blocks however it arrives, and nothing of it is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ziggurat.tui.widgets.markdown_blocks import CODE_LINES, LIST_LINES, Block, BlockSplitter


def split(text: str, size: int = 10**9) -> list[Block]:
    splitter = BlockSplitter()
    found = [block for at in range(0, len(text), size) for block in splitter.feed(text[at : at + size])]
    return [*found, *splitter.finish()]


def test_paragraphs_headings_fences_and_lists_are_blocks_of_their_own() -> None:
    text = "# Title\ntext\nmore\n\n- a\n\n  still a\n- b\n\nafter\n```py\nx = 1\n\ny\n```\nend"
    assert split(text) == [
        Block("# Title"),
        Block("text\nmore"),
        Block("- a\n\n  still a\n- b"),
        Block("after"),
        Block("x = 1\n\ny", "py"),
        Block("end"),
    ]


def test_a_fence_closes_only_with_its_own_mark() -> None:
    assert split("````\n```\n~~~\n````\nx") == [Block("```\n~~~", "text"), Block("x")]


def test_a_fence_in_an_item_stays_in_it() -> None:
    text = "1. do\n   ```sh\n   ls\n\n   ```\n2. done"
    assert split(text) == [Block(text)]


def test_a_long_list_is_cut_between_items_and_numbered_on() -> None:
    text = "\n".join("1. item" for _ in range(LIST_LINES * 2 + 3))
    blocks = split(text)
    assert [block.joined for block in blocks] == [False, True, True]
    assert [block.last for block in blocks] == [False, False, True]
    assert blocks[1].source.startswith(f"{LIST_LINES + 1}. item")


def test_long_code_is_cut_between_lines() -> None:
    lines = [f"line {n}" for n in range(CODE_LINES * 2 + 1)]
    blocks = split("```\n" + "\n".join(lines) + "\n```\nafter")
    assert "\n".join(block.source for block in blocks[:-1]).split("\n") == lines
    assert [block.joined for block in blocks] == [False, True, True, False]


def test_code_that_ends_at_a_cut_is_not_followed_by_an_empty_block() -> None:
    lines = "\n".join("x" for _ in range(CODE_LINES))
    assert [block.source for block in split(f"```\n{lines}\n```\nafter")] == [lines, "after"]


_PIECES = st.sampled_from(
    ["- a\n", "1. b\n", "\n", "text\n", "  more\n", "```\n", "~~~\n", "# h\n", "|a|b|\n", "x", " "]
)


@given(st.lists(_PIECES, max_size=60).map("".join), st.integers(1, 9))
def test_the_blocks_do_not_depend_on_how_the_text_arrives(text: str, size: int) -> None:
    assert split(text, size) == split(text)


@given(st.lists(_PIECES, max_size=60).map("".join))
def test_no_word_is_lost(text: str) -> None:
    whole = "".join(block.source for block in split(text))
    assert all(whole.count(letter) == text.count(letter) for letter in "abhx|")
