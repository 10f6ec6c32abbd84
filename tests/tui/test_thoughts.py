"""Thoughts in an answer's text, however it is cut."""

from __future__ import annotations

import pytest

from ziggurat.tui.api.thoughts import ThoughtSplitter


def split(text: str, size: int) -> tuple[str, str]:
    splitter = ThoughtSplitter()
    deltas = [delta for start in range(0, len(text), size) for delta in splitter.take(text[start : start + size])]
    deltas += splitter.rest()
    return (
        "".join(delta.text for delta in deltas if delta.thought),
        "".join(delta.text for delta in deltas if not delta.thought),
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("plain", "", "plain"),
        ("", "", ""),
        ("<think>\nhm < 3 </thin> \n</think>\n\nyes </think>", "hm < 3 </thin> \n", "yes </think>"),
        ("\n<think>a</think>b", "a", "b"),
        ("<thin", "", "<thin"),
        ("<table>", "", "<table>"),
        ("say <think> twice", "", "say <think> twice"),
        ("<think>cut off </thi", "cut off </thi", ""),
        ("  indented", "", "  indented"),
    ],
)
def test_split(text: str, thought: str, answer: str, size: int) -> None:
    assert split(text, size) == (thought, answer)
