"""Separates what a model thinks from what it answers, where the server leaves both in one text."""

from __future__ import annotations

from collections.abc import Iterator

from ziggurat.tui.backend import Delta

_BEGIN, _END = "<think>", "</think>"


class ThoughtSplitter:
    """Takes the text of one answer in pieces. Thoughts are what stands between the marks, if it begins with one.

    What may be the beginning of a mark is held back until it is known.
    """

    def __init__(self) -> None:
        self._held = ""
        self._state = "begin"
        self._thought_begun = False

    def take(self, text: str) -> Iterator[Delta]:
        """Return what is certain of the text so far."""
        if self._state == "answer":
            yield Delta(text)
            return
        self._held += text
        if self._state == "begin":
            begun = self._held.lstrip()
            if not begun or (len(begun) < len(_BEGIN) and _BEGIN.startswith(begun)):
                return
            self._state = "thought" if begun.startswith(_BEGIN) else "answer"
            if self._state == "thought":
                self._held = begun.removeprefix(_BEGIN)
        if self._state == "thought":
            yield from self._thought()
        if self._state == "gap":
            self._held = self._held.lstrip("\n")
            self._state = "answer" if self._held else "gap"
        if self._state == "answer" and self._held:
            yield Delta(self._held)
            self._held = ""

    def rest(self) -> Iterator[Delta]:
        """Return what was held back, when nothing follows any more."""
        if self._held:
            yield Delta(self._held, thought=self._state == "thought")
        self._held = ""

    def _thought(self) -> Iterator[Delta]:
        if not self._thought_begun:
            self._held = self._held.lstrip("\n")
            self._thought_begun = bool(self._held)
        before, mark, after = self._held.partition(_END)
        if mark:
            self._state, self._held = "gap", after
        else:
            keep = next((n for n in range(len(_END) - 1, 0, -1) if before.endswith(_END[:n])), 0)
            before, self._held = before[: len(before) - keep], before[len(before) - keep :]
        if before:
            yield Delta(before, thought=True)
