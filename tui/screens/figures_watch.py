"""Keeps the readouts up to date, and asks the server what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ziggurat.tui.backend import BackendError
from ziggurat.tui.figures import Figures
from ziggurat.tui.widgets.background import background
from ziggurat.tui.widgets.status_bar import Activity

if TYPE_CHECKING:
    from ziggurat.tui.screens.chat import ChatScreen

#: Seconds between two looks at the figures, and between two questions to the server.
FIGURES_SECONDS, STATUS_SECONDS = 0.15, 0.5


class FiguresWatch:
    """Shows the figures of a screen's session regularly."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self._lost = ""
        self._asking = False

    def start(self) -> None:
        """Begin."""
        self._screen.set_interval(FIGURES_SECONDS, self.show)
        self._screen.set_interval(STATUS_SECONDS, self.ask)
        self.show()

    def show(self) -> None:
        """Show the readouts."""
        session = self._screen.session
        error = self._lost if not session.busy else ""
        if session.backend is None and not session.busy:
            activity: Activity = "loading" if self._screen.loader.loading else "no model"
            self._screen.status_bar.show(Figures(), activity, "")
            return
        figures = session.figures()
        activity = "connecting" if figures.status is None and session.state == "idle" else session.state
        self._screen.status_bar.show(figures, activity, session.model, error=error)

    def ask(self) -> None:
        """Ask the server, unless a question is out."""
        if not self._asking and self._screen.session.backend is not None:
            self._asking = True
            background(self._screen, self._ask, group="status")

    async def _ask(self) -> None:
        try:
            await self._screen.session.refresh()
        except BackendError as error:
            own = self._screen.parts.host is not None
            lost = "the engine has ended: your next message starts it again" if own else "server lost"
            self._lost = lost if error.kind == "lost" else error.message
        else:
            self._lost = ""
        finally:
            self._asking = False
        self.show()
