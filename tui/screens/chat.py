"""The screen where one talks: transcript, KV view, prompt, readouts."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Footer, Static

from ziggurat.tui.conversation import Attachment
from ziggurat.tui.parts import ChatParts
from ziggurat.tui.screens.commands import Commands
from ziggurat.tui.screens.figures_watch import FiguresWatch
from ziggurat.tui.screens.kv_panel import KvPanel
from ziggurat.tui.screens.loader import Loader
from ziggurat.tui.screens.message_actions import MessageActions
from ziggurat.tui.screens.open_chats import OpenChats
from ziggurat.tui.screens.presented import note_of, shown_of
from ziggurat.tui.session_events import (
    Added,
    Discarded,
    Failed,
    Finished,
    Grew,
    NotSaved,
    PathChanged,
    SessionEvent,
    StateChanged,
    Titled,
)
from ziggurat.tui.widgets.background import background
from ziggurat.tui.widgets.banner import Banner
from ziggurat.tui.widgets.message import MessageView
from ziggurat.tui.widgets.prompt import PromptArea, PromptInput
from ziggurat.tui.widgets.status_bar import StatusBar
from ziggurat.tui.widgets.transcript import Transcript

_WELCOME = """\
There is no model yet. Three ways to one:
  convert MODEL OUT.gguf        makes a GGUF of a Hugging Face model
  ziggurat chat OUT.gguf        talks to it; F3 lists those you have
  ziggurat chat --connect URL   talks to a server that runs already"""


class ChatScreen(Screen[None]):
    """Shows a session and hands what the user does to it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop"),
        Binding("f1", "app.help", "Help"),
        Binding("f2,ctrl+o", "app.sessions", "Chats"),
        Binding("f3,ctrl+g", "app.models", "Models"),
        Binding("f4,ctrl+b", "kv", "KV"),
        Binding("ctrl+n", "new", "New"),
        Binding("ctrl+r", "again", "Again", show=False),
        Binding("ctrl+up", "browse", "Messages", show=False),
    ]

    def __init__(self, parts: ChatParts) -> None:
        super().__init__()
        self.parts = parts
        self.session = parts.session
        if parts.backend is not None:
            self.session.backend = parts.backend
        self.attachments: list[Attachment] = []
        self.title_line = Static("", id="title", markup=False)
        self.welcome = Static(_WELCOME, id="welcome", markup=False)
        self.transcript = Transcript()
        self.banner = Banner()
        self.chips = Static("", id="chips", markup=False)
        self.status_bar = StatusBar()
        self.loader = Loader(parts.host, self.session, self.banner, self._loaded)
        self.kv_panel = KvPanel(self.session, self.loader)
        self.commands = Commands(self)
        self.chats = OpenChats(self)
        self.figures = FiguresWatch(self)
        self.prompt = PromptInput(self.commands.complete, history=self.chats.inputs())
        self.actions = MessageActions(self)

    def compose(self) -> ComposeResult:
        """Compose the screen."""
        yield self.title_line
        with Horizontal(id="middle"):
            with Vertical(id="talk"):
                yield self.welcome
                yield self.transcript
            yield self.kv_panel
        yield self.banner
        yield self.chips
        yield self.prompt
        yield self.status_bar
        yield Footer()

    def on_mount(self) -> None:
        """Show the conversation, and load what is to be loaded."""
        self._silence = self.session.listen(self.take)
        self.kv_panel.display = self.chips.display = False
        self.prompt.focus()
        self.show_path()
        self.figures.start()
        if self.parts.setup is not None and self.session.backend is None:
            self.loader.start(self.parts.setup)

    def on_unmount(self) -> None:
        """Listen no more."""
        self._silence()

    # what the session tells

    def take(self, event: SessionEvent) -> None:
        """Show what happened."""
        conversation = self.session.conversation
        if isinstance(event, Grew):
            view = self.transcript.view(event.message_id)
            if view is not None:
                (view.append_thought if event.thought else view.append)(event.text)
        elif isinstance(event, PathChanged):
            self.show_path()
        elif isinstance(event, Added):
            answers = event.message.role == "assistant"
            self.transcript.add(shown_of(conversation, event.message), growing=answers)
            self._show_empty()
        elif isinstance(event, Finished):
            view = self.transcript.view(event.message.id)
            if view is not None:
                view.finish(note_of(event.message))
            self.kv_panel.refresh_kept()
        elif isinstance(event, Discarded):
            self.transcript.discard(event.message_id)
        elif isinstance(event, Failed):
            self._failed(event)
        elif isinstance(event, StateChanged):
            if event.state in ("reading", "answering"):
                self.banner.clear("error")
            self.figures.show()
        elif isinstance(event, Titled):
            self.show_title()
        elif isinstance(event, NotSaved):
            self.notify(str(event.error), severity="error", title="Not saved")

    def _failed(self, event: Failed) -> None:
        if event.retry_in is not None:
            self.banner.say(f"{event.error}\ntrying again in {event.retry_in:.1f} s, Esc gives up", "error", "error")
            return
        error, log = event.error, ""
        own = self.parts.host is not None  # a server that others started has its log elsewhere
        if self.parts.log_file is not None and (error.kind == "failed" or (own and error.kind in ("lost", "nonsense"))):
            log = f"; the log is {self.parts.log_file}"
        again = "Ctrl+Up e edits the message" if error.kind == "too_long" else "Ctrl+R tries again"
        self.banner.say(f"{error}\n{again}{log}", "error", "error")

    def show_path(self) -> None:
        """Show the conversation anew."""
        conversation = self.session.conversation
        self.transcript.show([shown_of(conversation, message) for message in conversation.path()])
        self.show_title()
        self._show_empty()
        self.kv_panel.refresh_kept()

    def show_title(self) -> None:
        """Show the title of the conversation."""
        conversation = self.session.conversation
        system = "  [system prompt]" if conversation.system else ""
        self.title_line.update(f"{conversation.title or 'New chat'}{system}")

    def _show_empty(self) -> None:
        no_model = self.session.backend is None and not self.loader.loading and self.parts.setup is None
        empty = no_model and not self.transcript.messages
        self.welcome.display = empty
        self.transcript.display = not empty

    def _loaded(self) -> None:
        self._show_empty()
        self.figures.ask()
        self.chats.change_rows()
        self.kv_panel.refresh_plan()

    # what the user does

    def on_prompt_area_sent(self, event: PromptArea.Sent) -> None:
        """Run a command, or send."""
        event.stop()
        text = event.text
        done = self.commands.run(text)
        if done is not None:
            if done:
                self.prompt.taken()
        elif self.session.busy:
            self.notify("An answer runs: Esc stops it. What you typed stays.")
        elif self.session.backend is None:
            self._no_model()
        else:
            self.send(text)

    def _no_model(self) -> None:
        if not self.loader.loading:
            self.banner.say("there is no model: F3 chooses one. What you typed stays.", "error", "error")

    def send(self, text: str) -> None:
        """Send a message, or the edited version of one."""
        attachments = tuple(self.attachments)
        self.prompt.taken()
        self.banner.clear("error", "edit", "file")
        self.set_attachments([])
        if not self.actions.resend(text, attachments):
            self.session.send(text, attachments)

    def set_attachments(self, attachments: list[Attachment]) -> None:
        """Show what goes with the next message."""
        self.attachments = attachments
        self.chips.update("  ".join(f"+ {each.name} ({each.tokens or '?'} tokens)" for each in attachments))
        self.chips.display = bool(attachments)

    def on_message_view_asked(self, event: MessageView.Asked) -> None:
        """Do something with a message."""
        event.stop()
        self.actions.do(event.view, event.what)

    def action_stop(self) -> None:
        """Stop what runs; else leave what was begun, and at last go back to the prompt."""
        if self.prompt.close_completions():
            return
        if self.loader.cancel():
            return
        if self.session.busy:
            background(self, self.session.stop)
        elif not self.actions.leave() and not self.banner.clear():
            if self.kv_panel.display and self.prompt.area.has_focus:
                self.action_kv()
        self.prompt.focus()

    def action_kv(self) -> None:
        """Show or hide the KV view."""
        self.kv_panel.display = not self.kv_panel.display
        self.set_class(self.kv_panel.display, "-kv")
        if self.kv_panel.display:
            self.kv_panel.refresh_kept()
            self.kv_panel.refresh_plan()
            self.kv_panel.view.map.focus()
        else:
            self.prompt.focus()

    def action_new(self) -> None:
        """Begin another conversation."""
        self.commands.run("/new")

    def action_again(self) -> None:
        """Answer again: after a failure the last message, else the last answer anew; or load again what failed."""
        if self.session.busy or self.loader.loading:
            return
        if self.session.backend is None:
            if not self.loader.again():
                self._no_model()
        elif self.session.conversation.head is not None:
            self.banner.clear("error")
            self.session.regenerate()

    def action_browse(self) -> None:
        """Go to the last message."""
        if self.transcript.messages:
            self.transcript.messages[-1].focus()

    def action_page(self, pages: int) -> None:
        """Scroll the transcript."""
        self.transcript.scroll_relative(y=pages * max(self.transcript.size.height - 2, 1), animate=False)
