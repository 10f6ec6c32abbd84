"""Keys and commands."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from ziggurat.tui.commands import COMMANDS

_KEYS = """\
Enter           send                 Ctrl+J          new line
Esc             stop, cancel, leave  Ctrl+Q          quit
Up / Down       earlier inputs       Tab             complete a command
PgUp / PgDn     scroll               Ctrl+Up         go to the messages
Ctrl+N          new chat             Ctrl+R          answer again, retry
F2  Ctrl+O      chats, search        F3  Ctrl+G      models
F4  Ctrl+B      KV view and budget   Ctrl+P          palette, themes

On a message    e edit  r regenerate  c copy  y copy code  t thoughts
                Left / Right versions  Up / Down others  Esc back
In the KV view  arrows choose a stretch, its words are shown below
In the chats    Ctrl+E rename  Ctrl+T pin  Ctrl+D delete  Ctrl+Z undo
With the mouse  drag selects text, Ctrl+C copies it
"""


def help_text() -> str:
    """Return keys and commands as text."""
    width = max(len(f"/{each.name} {each.arguments}") for each in COMMANDS)
    lines = (f"{f'/{each.name} {each.arguments}':<{width}}  {each.help}" for each in COMMANDS)
    return f"{_KEYS}\n" + "\n".join(lines)


class HelpScreen(ModalScreen[None]):
    """Shows them until a key leaves it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,f1,enter", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        """Compose the screen."""
        with VerticalScroll(classes="dialog") as box:
            box.border_title = "Keys and commands"
            yield Static(help_text(), markup=False)
