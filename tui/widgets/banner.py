"""A line or two above the prompt: an error with its remedy, what is loading, what is being edited."""

from __future__ import annotations

from typing import Literal

from rich.text import Text
from textual.widgets import Static

Kind = Literal["error", "notice", "progress"]
_MARKS = {"error": "✗ ", "notice": "· ", "progress": "◐ "}


class Banner(Static):
    """Says something until it is cleared. Whoever says it gives a ``topic``, so that others do not clear it."""

    DEFAULT_CSS = """
    Banner { height: auto; max-height: 5; display: none; padding: 0 1; background: $panel; }
    Banner.-error { border-left: outer $error; color: $text-error; }
    Banner.-notice { border-left: outer $secondary; color: $text; }
    Banner.-progress { border-left: outer $accent; color: $text; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__("", id=id, markup=False)
        self.topic = ""
        self.text = ""

    def say(self, text: str, kind: Kind, topic: str) -> None:
        """Say something."""
        self.topic, self.text = topic, text
        self.set_classes(f"-{kind}")
        self.update(Text(_MARKS[kind] + text))
        self.display = True

    def clear(self, *topics: str) -> bool:
        """Say nothing more, if it is of one of these topics or none is named; tell whether something was said."""
        if not self.display or (topics and self.topic not in topics):
            return False
        self.topic = self.text = ""
        self.display = False
        return True
