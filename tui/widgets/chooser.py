"""A list that narrows down as one types: sessions, models, anything with a name and a line about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option


@dataclass(frozen=True)
class Choice:
    """A line of the list. ``detail`` stands under the name where there is one; ``trouble`` instead of it."""

    id: str
    name: str
    detail: str = ""
    mark: str = ""
    trouble: str = ""


def matching(choices: Iterable[Choice], query: str) -> list[Choice]:
    """Return the choices that have all words of a query in their name or detail."""
    words = query.casefold().split()
    return [each for each in choices if all(word in f"{each.name} {each.detail}".casefold() for word in words)]


class Chooser(Vertical):
    """Choices under a field that narrows them down: ``search`` does it, by default by their words."""

    DEFAULT_CSS = """
    Chooser { height: 1fr; }
    Chooser > Input { border: none; height: 1; margin: 0 0 1 0; padding: 0 1; }
    Chooser > Input:focus { border: none; }
    Chooser > OptionList { height: 1fr; border: none; background: transparent; padding: 0; }
    Chooser > OptionList:focus { border: none; }
    Chooser > .chooser--empty { height: 1fr; color: $text-muted; display: none; padding: 0 1; }
    Chooser.-empty > .chooser--empty { display: block; }
    Chooser.-empty > OptionList { display: none; }
    """

    class Chosen(Message):
        """A choice was made."""

        def __init__(self, chooser: Chooser, choice: Choice) -> None:
            super().__init__()
            self.chooser, self.choice = chooser, choice

    def __init__(
        self,
        choices: Sequence[Choice] = (),
        *,
        search: Callable[[str], Sequence[Choice]] | None = None,
        placeholder: str = "Search",
        empty: str = "Nothing here.",
        id: str | None = None,
    ) -> None:
        super().__init__(id=id)
        self._all = list(choices)
        self._search = search
        self._shown: list[Choice] = []
        self.field = Input(placeholder=placeholder)
        self.options = OptionList()
        self._empty = Static(empty, classes="chooser--empty", markup=False)

    def compose(self) -> ComposeResult:
        """Compose the list."""
        yield self.field
        yield self.options
        yield self._empty

    def on_mount(self) -> None:
        """Show all of them."""
        self._narrow()
        self.field.focus()

    @property
    def marked(self) -> Choice | None:
        """The choice under the cursor."""
        place = self.options.highlighted
        return self._shown[place] if place is not None and place < len(self._shown) else None

    def set(self, choices: Sequence[Choice]) -> None:
        """Show other choices, with the same search; the cursor stays at the same one if it is still there."""
        self._all = list(choices)
        self._narrow()

    def refresh_choices(self) -> None:
        """Search again."""
        self._narrow()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Narrow down."""
        event.stop()
        self._narrow()

    def _narrow(self) -> None:
        marked = self.marked
        query = self.field.value
        self._shown = list(self._search(query)) if self._search is not None else matching(self._all, query)
        self.options.clear_options()
        self.options.add_options(Option(_lines(each)) for each in self._shown)
        ids = [each.id for each in self._shown]
        place = ids.index(marked.id) if marked is not None and marked.id in ids else 0
        self.options.highlighted = place if self._shown else None
        self.set_class(not self._shown, "-empty")

    def on_key(self, event: events.Key) -> None:
        """Walk through the list from the field."""
        if self.field.has_focus and event.key in ("up", "down", "pageup", "pagedown") and self._shown:
            event.stop()
            event.prevent_default()
            step = {"up": -1, "down": 1, "pageup": -8, "pagedown": 8}[event.key]
            self.options.highlighted = min(max((self.options.highlighted or 0) + step, 0), len(self._shown) - 1)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Choose what is under the cursor."""
        event.stop()
        if self.marked is not None:
            self.post_message(self.Chosen(self, self.marked))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Choose."""
        event.stop()
        self.post_message(self.Chosen(self, self._shown[event.option_index]))


def _lines(each: Choice) -> Content:
    mark = (f"{each.mark} ", "bold") if each.mark else ""
    detail = (
        ("\n  " + each.trouble, "$text-error") if each.trouble else ("\n  " + each.detail, "dim") if each.detail else ""
    )
    return Content.assemble(mark, (each.name, "bold"), detail)
