"""What the model still remembers: per layer its budget, what is held, and which stretches of the text survived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Static

from ziggurat.tui.kept import Kept
from ziggurat.tui.widgets.sparkline import bar

_SHADES = " ░▒▓█"
_STEP = 8  # columns of the budget's bar


class KvMap(ScrollView):
    """One row for each layer; a cursor chooses a stretch in one of them."""

    DEFAULT_CSS = """
    KvMap { height: 1fr; min-height: 3; background: $surface; scrollbar-size-vertical: 1;
        overflow-x: hidden; }
    KvMap > .kv--budget { color: $primary; }
    KvMap > .kv--heat { color: $accent; }
    KvMap > .kv--label { color: $foreground; }
    """
    COMPONENT_CLASSES = {"kv--budget", "kv--heat", "kv--label"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(0,-1)", "Stretch", show=False),
        Binding("right,l", "move(0,1)", "Stretch", show=False),
        Binding("up,k", "move(-1,0)", "Layer", show=False),
        Binding("down,j", "move(1,0)", "Layer", show=False),
        Binding("home", "move(0,-100000)", "First", show=False),
        Binding("end", "move(0,100000)", "Last", show=False),
    ]
    can_focus = True

    class Chosen(Message):
        """A stretch is under the cursor: its layer's place, its column of how many, and its part that is held."""

        def __init__(self, layer: int, column: int, columns: int, part: float) -> None:
            super().__init__()
            self.layer, self.column, self.columns, self.part = layer, column, columns, part

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.kept: Kept | None = None
        self._rows: Sequence[int] = ()
        self._strips: dict[int, tuple[float, ...]] = {}
        self.cursor = (0, 0)

    @property
    def _left(self) -> int:
        return 4 + _STEP + 1 + 11 + 1

    @property
    def columns(self) -> int:
        """How many stretches the text is shown in."""
        room = max(self.size.width - self._left - 1, 4)
        return min(room, len(self.kept.tokens)) if self.kept is not None and self.kept.tokens else room

    def show(self, kept: Kept | None, rows: Sequence[int] = ()) -> None:
        """Show what is kept; ``rows`` are the budgets of a plan, where nothing is known of a prompt yet."""
        self.kept, self._rows = kept, rows
        self._strips.clear()
        layers = len(kept.layers) if kept is not None and kept.layers else len(rows)
        self.virtual_size = Size(self.size.width, layers)
        self.cursor = (min(self.cursor[0], max(layers - 1, 0)), min(self.cursor[1], max(self.columns - 1, 0)))
        self.refresh()
        if kept is not None and kept.layers:
            self._tell()

    def on_resize(self) -> None:
        """The stretches are others."""
        self.cursor = (self.cursor[0], min(self.cursor[1], max(self.columns - 1, 0)))
        if self.kept is not None and self.kept.layers:
            self._tell()

    def render_line(self, y: int) -> Strip:
        """Draw a layer."""
        place = y + self.scroll_offset.y
        style = self.rich_style
        segments = self._layer(place)
        return Strip(segments).apply_style(style).crop_extend(0, self.size.width, style)

    def _layer(self, place: int) -> list[Segment]:
        budgets, fills, layer = self._figures(place)
        if budgets is None:
            return []
        label, steps, heat = (
            self.get_component_rich_style(f"kv--{name}", partial=True) for name in ("label", "budget", "heat")
        )
        top = max(budgets, default=1) or 1
        budget = budgets[place]
        if budget:
            held = f"{fills:>5.0f}/{budget:<5}" if fills is not None else f"{budget:>11}"
        else:  # a layer with a sliding window
            held = f"{fills:>5.0f} slide" if fills is not None else f"{'sliding':>11}"
        segments = [
            Segment(f"{layer:>3} ", label),
            Segment(bar(budget / top, _STEP), steps),
            Segment(f" {held} ", label),
        ]
        if self.kept is None or not self.kept.layers:
            return segments
        return segments + self._heat(place, heat)

    def _figures(self, place: int) -> tuple[list[int] | None, float | None, int]:
        kept = self.kept
        if kept is not None and kept.layers:
            if place >= len(kept.layers):
                return None, None, 0
            layer = kept.layers[place]
            return (
                [int(each.rows if each.budget is None else each.budget) for each in kept.layers],
                layer.rows,
                layer.layer,
            )
        return (list(self._rows), None, place) if place < len(self._rows) else (None, None, 0)

    def strip_of(self, place: int) -> tuple[float, ...]:
        """Return which part of each stretch a layer holds."""
        assert self.kept is not None
        found = self._strips.get(place)
        if found is None or len(found) != self.columns:
            found = self._strips[place] = self.kept.strip(place, self.columns)
        return found

    def _heat(self, place: int, heat: Style) -> list[Segment]:
        parts = self.strip_of(place)
        cells = [_SHADES[0 if part <= 0 else min(1 + int(part * 3.999), 4)] for part in parts]
        row, column = self.cursor
        if row != place or not self.has_focus:
            return [Segment("".join(cells), heat)]
        return [
            Segment("".join(cells[:column]), heat),
            Segment("◆", heat + Style(reverse=True)),  # a mark of its own: a full cell in reverse looks empty
            Segment("".join(cells[column + 1 :]), heat),
        ]

    def action_move(self, layers: int, columns: int) -> None:
        """Move the cursor."""
        if self.kept is None or not self.kept.layers:
            return
        row = min(max(self.cursor[0] + layers, 0), len(self.kept.layers) - 1)
        self.cursor = (row, min(max(self.cursor[1] + columns, 0), self.columns - 1))
        self.scroll_to_region(Region(0, row, 1, 1), animate=False)
        self._tell()
        self.refresh()

    def on_focus(self) -> None:
        """Show the cursor."""
        self.refresh()

    def on_blur(self) -> None:
        """Hide the cursor."""
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        """Choose the stretch that was clicked."""
        if self.kept is None or not self.kept.layers:
            return
        row, column = event.y + self.scroll_offset.y, event.x - self._left
        if row < len(self.kept.layers) and 0 <= column < self.columns:
            self.cursor = (row, column)
            self._tell()
            self.refresh()

    def _tell(self) -> None:
        row, column = self.cursor
        self.post_message(self.Chosen(row, column, self.columns, self.strip_of(row)[column]))


class KvView(Vertical):
    """The map with what it says in words: a headline, and the text of the stretch under the cursor."""

    DEFAULT_CSS = """
    KvView { height: 1fr; background: $surface; padding: 0 1; }
    KvView > .kv--head { height: auto; color: $text; text-style: bold; }
    KvView > .kv--legend { height: 1; color: $text-muted; }
    KvView > .kv--words { height: 6; border-top: solid $primary; overflow-y: auto; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.map = KvMap()
        self._head = Static("", classes="kv--head", markup=False)
        self._legend = Static("layer  budget   held/rows  start of the text → end", classes="kv--legend", markup=False)
        self._words = Static("", classes="kv--words", markup=False)

    def compose(self) -> ComposeResult:
        """Compose the view."""
        yield self._head
        yield self._legend
        yield self.map
        yield self._words

    def show(self, kept: Kept | None, rows: Sequence[int] = (), *, head: str = "") -> None:
        """Show what is kept of the last prompt, or the budgets of a plan."""
        self._head.update(head or _headline(kept, rows))
        self._words.update("" if kept is not None and kept.layers else "Tab to the map, arrows choose a stretch.")
        self.map.show(kept, rows)

    def show_words(self, chosen: KvMap.Chosen, text: str | None) -> None:
        """Show the text of a stretch."""
        layer = self.map.kept.layers[chosen.layer].layer if self.map.kept is not None else chosen.layer
        words = "the server does not tell its text" if text is None else text
        self._words.update(
            f"layer {layer}, stretch {chosen.column + 1} of {chosen.columns}: {chosen.part:.0%} held\n{words}"
        )


def _headline(kept: Kept | None, rows: Sequence[int]) -> str:
    if kept is None:
        return (
            f"Budget of {sum(rows)} rows over {sum(map(bool, rows))} layers"
            if rows
            else "Nothing is known of the KV cache yet."
        )
    if kept.whole:
        return f"{len(kept.tokens)} tokens, every row kept: no budget is set (/budget ROWS or N%)."
    seen = len(kept.tokens) * len(kept.layers)
    held = sum(layer.rows for layer in kept.layers)
    return f"{len(kept.tokens)} tokens seen, {held / seen:.1%} of the rows held" if seen else "No tokens yet."
