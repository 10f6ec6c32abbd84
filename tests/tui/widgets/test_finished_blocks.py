"""What came in pieces ends as one rendering of the whole Markdown, words and colours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.strip import Strip

from ziggurat.tui.widgets.finished_blocks import FinishedBlocks
from ziggurat.tui.widgets.markdown_blocks import CODE_LINES, LIST_LINES, Block, BlockSplitter
from ziggurat.tui.widgets.markdown_code import CodeRenderer
from ziggurat.tui.widgets.markdown_lines import LineRenderer, Palette

RENDERER = LineRenderer(48, Palette(code_theme="monokai"))

DOCSTRING = "\n".join(["x = 1", *["y = 2"] * (CODE_LINES - 3), '"""begins', *["for all in text:"] * 30, '"""', "z = 3"])
TEXTS = {
    "mixed": "# T\nsome *words* and `code`\n\n| a | b |\n|--|--|\n| 1 | 2 |\n\n> quoted\n\n```python\nx = 1\n```\nend",
    "a string over the cut of a fence": f"```python\n{DOCSTRING}\n```\nafter\n",
    "a numbered list": "\n".join(f"{n + 1}. item **{n}** with words" for n in range(12 * LIST_LINES)) + "\n\nafter\n",
    "a loose list": "\n\n".join(f"- item {n}" for n in range(3 * LIST_LINES)),
    "lists in a list": "".join(f"- item {n}\n  1. a\n  2. b\n" for n in range(2 * LIST_LINES)),
    "links defined at the end": "see [it][x], or [that][y]\n\nmore\n\n[x]: http://x\n[y]: http://y\n",
    "long lines of code": "1. in an item\n\n   ```sh\n   " + "echo one two; " * 9 + "\n   ```\n\n```c\nint a[] = {"
    + "1, 2, " * 40 + "};\n```\n",
}  # fmt: skip


def in_pieces(text: str, size: int = 7, *, settle: bool = True) -> FinishedBlocks:
    blocks, splitter = FinishedBlocks(), BlockSplitter()
    blocks.render(RENDERER)
    for at in range(0, len(text), size):
        for block in splitter.feed(text[at : at + size]):
            blocks.add(block)
    for block in splitter.finish():
        blocks.add(block)
    blocks.refer(splitter.references)
    while settle and not blocks.settled:
        blocks.settle(1)
    return blocks


def looks(lines: list[Strip]) -> list[list[tuple[str, str]]]:
    """Return the letters of lines that are not empty, with their styles."""
    return [
        [(letter, str(style or "none")) for text, style, _ in line for letter in text][: len(line.text.rstrip())]
        for line in lines
        if line.text.strip()
    ]


def lines_of(blocks: FinishedBlocks) -> list[Strip]:
    return [blocks.line(y) for y in range(blocks.height)]


@pytest.mark.parametrize("name", TEXTS)
def test_the_end_looks_like_one_markdown_of_the_whole_but_for_surplus_empty_lines(name: str) -> None:
    text = TEXTS[name]
    assert looks(lines_of(in_pieces(text))) == looks(RENDERER.render(Block(text)))


def test_before_it_settles_the_words_are_there() -> None:
    text = TEXTS["a string over the cut of a fence"]
    early, late = in_pieces(text, settle=False), in_pieces(text)
    assert not early.settled
    assert [line.text for line in lines_of(early)] == [line.text for line in lines_of(late)]
    assert looks(lines_of(early)) != looks(lines_of(late))


def test_settling_goes_on_where_it_stopped() -> None:
    blocks = in_pieces(TEXTS["a string over the cut of a fence"], settle=False)
    looked = 0
    while not blocks.settled:
        blocks.settle(1e-9)
        looked += 1
    assert looked > 1
    assert looks(lines_of(blocks)) == looks(lines_of(in_pieces(TEXTS["a string over the cut of a fence"])))


@given(st.text("ab\t\n \"'#日", max_size=300), st.integers(6, 30))
def test_rows_of_code_lose_nothing_and_are_as_wide_as_asked(source: str, width: int) -> None:
    rows = list(CodeRenderer(width, "monokai", RENDERER.code_style).rows(source, "python"))
    texts = ["".join(segment.text for segment in row) for row in rows]
    assert "".join("".join(texts).split()) == "".join(source.split())
    assert all(Strip(row).cell_length >= width for row in rows)
    assert len(rows) >= source.count("\n") + 1


def test_an_unknown_language_has_no_colours() -> None:
    renderer = CodeRenderer(20, "monokai", RENDERER.code_style)
    assert len({str(segment.style) for row in renderer.rows("x = 1", "no such thing") for segment in row}) <= 2
