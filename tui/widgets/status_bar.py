"""The line of readouts: what the machine is doing now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from rich.cells import cell_len
from rich.text import Text
from textual.widget import Widget

from ziggurat.runtime.sizes import human_bytes
from ziggurat.tui.figures import Figures
from ziggurat.tui.session_events import State
from ziggurat.tui.widgets.sparkline import bar, sparkline

#: Parts of the context from which it is shown in amber, and in red.
AMBER, RED = 0.75, 0.9
_SPARK = 16

#: What the session does; or that there is nobody to do anything, nobody yet, or nobody has answered yet.
Activity = State | Literal["no model", "loading", "connecting"]
_ACTIVITIES: dict[Activity, str] = {
    "no model": "○ no model",
    "loading": "◌ loading",
    "connecting": "◌ connecting",
    "idle": "○ ready",
    "waiting": "◌ waiting",
    "reading": "◐ reading",
    "answering": "● answering",
    "retrying": "↻ trying again",
}


@dataclass(frozen=True)
class Readout:
    """A piece of the line. Those of the highest ``rank`` go first where there is no room."""

    text: str
    rank: int
    style: str = ""


def readouts(figures: Figures, state: Activity, model: str, *, error: str = "") -> list[Readout]:
    """Return what is to be read of the figures, in its order on the line; unknown ones are left out."""
    found = [Readout(f"✗ {error}", 0, "error") if error else Readout(_ACTIVITIES[state], 0, "state")]
    status = figures.status
    if figures.progress is not None or state == "reading":
        part = figures.progress or 0.0
        rate = f" {figures.prompt_rate:.0f} tok/s" if figures.prompt_rate else ""
        found.append(Readout(f"{bar(part, 10)} {part:.0%}{rate}", 1, "accent"))
    if figures.rate:
        found.append(Readout(f"{figures.rate:.1f} tok/s", 1, "value"))
        if any(figures.history):
            found.append(Readout(sparkline(figures.history, _SPARK), 5, "accent"))
    if figures.time_to_first_token_s is not None:
        found.append(Readout(f"first {figures.time_to_first_token_s:.2f} s", 6))
    found += _context(figures)
    if figures.kv_bytes:
        full = f"/{_short(figures.kv_bytes_full)}" if figures.kv_bytes_full else ""
        found.append(Readout(f"KV {_short(figures.kv_bytes)}{full}", 3))
    if figures.accepted is not None:
        found.append(Readout(f"drafts {figures.accepted:.0%}", 7))
    if status is not None and status.process_bytes:
        found.append(Readout(f"mem {_short(status.process_bytes)}", 8))
    if status is not None and status.gpu_bytes:
        found.append(Readout(f"GPU {_short(status.gpu_bytes)}", 8))
    if model:
        found.append(Readout(PurePath(model).name, 4, "model"))  # some servers name a model by its path
    return found


def fit(found: list[Readout], width: int, between: int = 3) -> list[Readout]:
    """Leave out pieces, the least important first, until the line fits."""
    kept = list(found)
    while len(kept) > 1 and sum(cell_len(each.text) for each in kept) + between * (len(kept) - 1) > width:
        kept.remove(max(kept, key=lambda each: each.rank))
    return kept


class StatusBar(Widget):
    """Shows readouts in one line."""

    DEFAULT_CSS = """
    StatusBar { height: 1; padding: 0 1; background: $panel; color: $text-muted; }
    """
    COMPONENT_CLASSES = {"status--state", "status--error", "status--accent", "status--value", "status--amber",
                         "status--red", "status--model"}  # fmt: skip

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._found: list[Readout] = []

    def show(self, figures: Figures, state: Activity, model: str, *, error: str = "") -> None:
        """Show figures."""
        found = readouts(figures, state, model, error=error)
        if found != self._found:
            self._found = found
            self.refresh()

    def render(self) -> Text:
        """Draw the line."""
        line = Text(no_wrap=True, overflow="ellipsis", end="")
        for number, each in enumerate(fit(self._found, self.content_size.width)):
            if number:
                line.append(" │ ", "dim")
            name = f"status--{each.style}"
            style = self.get_component_rich_style(name, partial=True) if name in self.COMPONENT_CLASSES else ""
            line.append(each.text, style)
        return line


def _context(figures: Figures) -> list[Readout]:
    part = figures.context_part
    if part is None:
        return [Readout(f"ctx {figures.context_used}", 2)] if figures.context_used else []
    assert figures.status is not None and figures.status.n_ctx
    style = "red" if part >= RED else "amber" if part >= AMBER else ""
    mark = "!!" if part >= RED else "!" if part >= AMBER else ""
    return [Readout(f"ctx {_tokens(figures.context_used)}/{_tokens(figures.status.n_ctx)} {part:.0%}{mark}", 2, style)]


def _tokens(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"


def _short(count: int) -> str:
    number, unit = human_bytes(count).split(" ")
    return f"{float(number):.3g}{unit[0] if unit != 'B' else ' B'}"
