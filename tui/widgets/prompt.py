"""Where one types: several lines, earlier inputs, and what a slash command may go on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList, TextArea
from textual.widgets.option_list import Option

from ziggurat.tui.commands import Completion

Completer = Callable[[str], Sequence[Completion]]

#: Characters, and characters in a line, above which a pasted text is shown as a mark: wrapping it at each key would
#: make typing slow.
LARGE, LONG_LINE = 20_000, 2_000


def is_large(text: str) -> bool:
    """Whether a text is too much to be edited in the prompt."""
    return len(text) > LARGE or any(len(line) > LONG_LINE for line in text.split("\n"))


class History:
    """Earlier inputs, walked through with the text that was being typed at their end."""

    def __init__(self, inputs: Sequence[str] = ()) -> None:
        self._inputs = list(inputs)
        self._place: int | None = None
        self._typed = ""

    def add(self, text: str) -> None:
        """Take an input as the latest; the same one twice is kept once."""
        if text and (not self._inputs or self._inputs[-1] != text):
            self._inputs.append(text)
        self._place = None

    def earlier(self, current: str) -> str | None:
        """Return the input before, None at the first one."""
        if self._place is None:
            self._typed = current
            place = len(self._inputs)
        else:
            place = self._place
        if place == 0:
            return None
        self._place = place - 1
        return self._inputs[self._place]

    def later(self) -> str | None:
        """Return the input after, at last what was being typed; None if it is that."""
        if self._place is None:
            return None
        self._place += 1
        if self._place == len(self._inputs):
            self._place = None
            return self._typed
        return self._inputs[self._place]


class PromptArea(TextArea):
    """The text itself. Enter sends; Ctrl+J, or a newline that is pasted, makes a line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send"),
        Binding("ctrl+j", "newline", "New line"),
        Binding("shift+enter,alt+enter", "newline", "New line", show=False),
        Binding("tab", "complete", "Complete", show=False),
        Binding("pageup", "screen.page(-1)", "Scroll", show=False),
        Binding("pagedown", "screen.page(1)", "Scroll", show=False),
    ]

    class Sent(Message):
        """The text is to be sent."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self, inputs: History) -> None:
        super().__init__(
            soft_wrap=True,
            compact=True,
            highlight_cursor_line=False,
            tab_behavior="focus",
            placeholder="Say something, or / for commands",
        )
        self.inputs = inputs
        self._pasted: dict[str, str] = {}
        self.box: PromptInput | None = None

    async def _on_key(self, event: events.Key) -> None:
        """Leave the keys that send and complete to the bindings; TextArea would insert them."""
        if event.key in ("enter", "tab", "ctrl+j"):
            event.prevent_default()

    async def _on_paste(self, event: events.Paste) -> None:
        """Put a mark in the place of a text that is too much to be edited here; it is sent as it was pasted."""
        text = event.text.replace("\r\n", "\n").replace("\r", "\n")
        if not is_large(text):
            return
        event.prevent_default()
        self.insert_large(text)

    @property
    def whole_text(self) -> str:
        """The text, with what was pasted in the place of its marks."""
        text = self.text
        for mark, pasted in self._pasted.items():
            text = text.replace(mark, pasted)
        return text

    def insert_large(self, text: str) -> None:
        """Insert a text at the cursor, or its mark."""
        if is_large(text):
            lines = text.count("\n") + 1
            mark = f"[pasted {len(self._pasted) + 1}: {lines} line{'s' if lines > 1 else ''}, {len(text)} characters]"
            self._pasted[mark] = text
            text = mark
        if result := self._replace_via_keyboard(text, *self.selection):
            self.move_cursor(result.end_location)

    def forget_pasted(self) -> None:
        """Forget what marks stand for."""
        self._pasted.clear()

    def action_send(self) -> None:
        """Send the text if there is any; it stays until it is taken."""
        if self.text.strip():
            self.post_message(self.Sent(self.whole_text))

    def action_newline(self) -> None:
        """Begin a line."""
        if result := self._replace_via_keyboard("\n", *self.selection):
            self.move_cursor(result.end_location)

    def action_complete(self) -> None:
        """Take the completion that is marked, or go on to the next widget."""
        if self.box is not None and self.box.completing:
            self.box.complete()
        else:
            self.screen.focus_next()

    def action_cursor_up(self, select: bool = False) -> None:
        """Move up; in the first line to the completion above or the input before."""
        if self.box is not None and self.box.completing:
            self.box.mark(-1)
        elif self.cursor_at_first_line and not select and not self.wrapped_above:
            self._recall(self.inputs.earlier(self.whole_text))
        else:
            super().action_cursor_up(select)

    def action_cursor_down(self, select: bool = False) -> None:
        """Move down; in the last line to the completion below or the input after."""
        if self.box is not None and self.box.completing:
            self.box.mark(1)
        elif self.cursor_at_last_line and not select and not self.wrapped_below:
            self._recall(self.inputs.later())
        else:
            super().action_cursor_down(select)

    @property
    def wrapped_above(self) -> bool:
        """Whether the cursor's line has rows above it on the screen."""
        return self.get_cursor_up_location()[0] == self.cursor_location[0] and self.get_cursor_up_location()[1] > 0

    @property
    def wrapped_below(self) -> bool:
        """Whether the cursor's line has rows below it on the screen."""
        row, column = self.get_cursor_down_location()
        return row == self.cursor_location[0] and column < len(self.document[row])

    def _recall(self, text: str | None) -> None:
        if text is not None and self.box is not None:
            self.box.text = text


class PromptInput(Vertical):
    """The text with its completions above."""

    DEFAULT_CSS = """
    PromptInput { height: auto; }
    PromptInput > PromptArea { height: auto; max-height: 10; min-height: 1; padding: 0 1; border: none;
        border-left: outer $primary; background: $surface; }
    PromptInput > PromptArea:focus { border: none; border-left: outer $accent; }
    PromptInput > OptionList { height: auto; max-height: 8; display: none; border: none; background: $panel;
        padding: 0 1; }
    PromptInput.-completing > OptionList { display: block; }
    """

    def __init__(
        self, completer: Completer = lambda _: (), *, history: Sequence[str] = (), id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self._completer = completer
        self._found: list[Completion] = []
        self._taken = ""
        self._options = OptionList()
        self._options.can_focus = False
        self.inputs = History(history)
        self.area = PromptArea(self.inputs)
        self.area.box = self

    def compose(self) -> ComposeResult:
        """Compose the box."""
        yield self._options
        yield self.area

    @property
    def text(self) -> str:
        """What is typed."""
        return self.area.text

    @text.setter
    def text(self, text: str) -> None:
        self.area.forget_pasted()
        self.area.load_text("")
        self.area.insert_large(text)

    @property
    def completing(self) -> bool:
        """Whether completions are shown."""
        return self.has_class("-completing")

    def taken(self) -> None:
        """Empty the box: what was typed is on its way, and among the earlier inputs."""
        self.inputs.add(self.area.whole_text)
        self.area.forget_pasted()
        self.area.load_text("")

    def focus(self, scroll_visible: bool = True) -> PromptInput:
        """Focus the text."""
        self.area.focus(scroll_visible)
        return self

    def on_text_area_changed(self) -> None:
        """Look for completions of a command in its first line."""
        text = self.area.text
        found = list(self._completer(text)) if text.startswith("/") and "\n" not in text and text != self._taken else []
        if len(found) == 1 and found[0].text.rstrip() == text.rstrip():
            found = []
        if found != self._found:
            self._found = found
            self._options.clear_options()
            self._options.add_options(Option(_line(each)) for each in found)
            self._options.highlighted = 0 if found else None
        self.set_class(bool(found), "-completing")

    def mark(self, step: int) -> None:
        """Mark the completion after or before."""
        self._options.highlighted = ((self._options.highlighted or 0) + step) % len(self._found)

    def complete(self) -> None:
        """Take the marked completion."""
        self._taken = self._found[self._options.highlighted or 0].text
        self.text = self._taken
        self.close_completions()
        if self._taken.endswith((" ", "/")):
            self._taken = ""

    def close_completions(self) -> bool:
        """Hide the completions; False if there were none."""
        was = self.completing
        self._found = []
        self.set_class(False, "-completing")
        return was

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take a completion that was clicked."""
        event.stop()
        self._options.highlighted = event.option_index
        self.complete()
        self.area.focus()


def _line(each: Completion) -> Content:
    return Content.assemble((each.shown, "bold"), "  ", (each.hint, "dim"))
