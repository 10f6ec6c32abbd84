"""One message of a conversation: who says it, its text, and what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.geometry import Size
from textual.message import Message as Event
from textual.reactive import Reactive
from textual.widgets import Static

from ziggurat.tui.widgets.message_body import MessageBody
from ziggurat.tui.widgets.uniform import Uniform

_NAMES = {"user": "You", "assistant": "Answer", "system": "System", "error": "Error", "note": "Note"}


@dataclass(frozen=True)
class Shown:
    """What is shown of a message. ``branch`` of ``branches`` versions is this one, counted from 1."""

    id: str
    role: str
    text: str = ""
    branch: int = 1
    branches: int = 1
    note: str = ""
    author: str = ""
    thought: str = ""


class MessageView(Uniform, Vertical):
    """A message. Focused, it takes keys; what they ask for goes up as ``Asked``."""

    DEFAULT_CSS = """
    MessageView { height: auto; padding: 0 1 0 1; margin: 0 0 1 0; border-left: outer transparent; }
    MessageView.-user { border-left: outer $primary; }
    MessageView.-error { border-left: outer $error; }
    MessageView:focus { border-left: outer $accent; background: $boost; }
    MessageView > .message--head { height: 1; color: $text-muted; text-style: bold; }
    MessageView:focus > .message--head { color: $text-accent; }
    MessageView > .message--note { height: auto; color: $text-muted; }
    MessageView > .message--note.-empty { display: none; }
    MessageView > .message--thought { color: $text-muted; text-style: italic; margin: 0 0 1 2; max-height: 5; }
    MessageView > .message--thought.-hidden { display: none; }
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "ask('edit')", "Edit"),
        Binding("r", "ask('regenerate')", "Regenerate"),
        Binding("c", "ask('copy')", "Copy"),
        Binding("y", "ask('copy_code')", "Copy code"),
        Binding("t", "thought", "Thoughts", show=False),
        Binding("left", "ask('previous_branch')", "‹ Version"),
        Binding("right", "ask('next_branch')", "Version ›"),
        Binding("up,k", "ask('up')", "Earlier", show=False),
        Binding("down,j", "ask('down')", "Later", show=False),
        Binding("escape,i", "ask('leave')", "Back"),
    ]

    can_focus = True
    # see MessageBody
    virtual_size = Reactive(Size(0, 0), repaint=False)

    class Asked(Event):
        """The user wants something done with a message; ``what`` is the action's name."""

        def __init__(self, view: MessageView, what: str) -> None:
            super().__init__()
            self.view = view
            self.what = what

    def __init__(self, shown: Shown, *, growing: bool = False) -> None:
        super().__init__(classes=f"-{shown.role}")
        self.shown = shown
        self.growing = growing
        self.body = MessageBody(shown.text, plain=shown.role in ("user", "system", "error", "note"))
        self._head = Static(self._title(), classes="message--head")
        self._note = Static(shown.note, classes="message--note", markup=False)
        self._note.set_class(not shown.note, "-empty")
        self._thought = MessageBody(shown.thought, plain=True)
        self._thought.set_classes("message--thought -hidden")
        if not growing:
            self.body.finish()
            self._thought.finish()

    def compose(self) -> ComposeResult:
        """Compose the message."""
        yield self._head
        yield self._thought
        yield self.body
        yield self._note

    def _title(self) -> Text:
        shown = self.shown
        title = shown.author or _NAMES.get(shown.role, shown.role)
        branches = f"  ‹ {shown.branch}/{shown.branches} ›" if shown.branches > 1 else ""
        return Text(title + branches, no_wrap=True, overflow="ellipsis")

    def append(self, text: str) -> None:
        """Add text to an answer that is being written."""
        if self.body.empty:
            self._thought.add_class("-hidden")
        self.body.append(text)

    def append_thought(self, text: str) -> None:
        """Add to what the model thinks before its answer; it is shown until that comes."""
        self._thought.append(text)
        self._thought.set_class(not self.body.empty, "-hidden")

    @property
    def thought(self) -> str:
        """What the model thought."""
        return self._thought.text

    def action_thought(self) -> None:
        """Show or hide what the model thought."""
        if self._thought.text:
            self._thought.toggle_class("-hidden")

    def finish(self, note: str = "") -> None:
        """End an answer that was being written; ``note`` tells its figures."""
        self.growing = False
        self.body.finish()
        self._thought.finish()
        self._note.update(note)
        self._note.set_class(not note, "-empty")

    def shows(self, shown: Shown) -> bool:
        """Whether this is what it shows, whole."""
        seen = replace(self.shown, text=self.body.text, thought=self.thought, note=shown.note, author=shown.author)
        return seen == shown and not self.growing

    def set_branches(self, branch: int, branches: int) -> None:
        """Tell which of how many versions this one is."""
        self.shown = replace(self.shown, branch=branch, branches=branches)
        self._head.update(self._title())

    def action_ask(self, what: str) -> None:
        """Ask for an action."""
        self.post_message(self.Asked(self, what))


def code_blocks(text: str) -> list[str]:
    """Return the contents of a text's code fences, in order."""
    from ziggurat.tui.widgets.markdown_blocks import BlockSplitter

    splitter = BlockSplitter()
    found: list[str] = []
    for block in [*splitter.feed(text), *splitter.finish()]:
        if block.code is not None:
            if block.joined and found:
                found[-1] += "\n" + block.source
            else:
                found.append(block.source)
    return found
