"""Apps without a terminal that nevertheless make what one would be sent."""

from __future__ import annotations

import time
from typing import Any

from textual._compositor import CompositorUpdate
from textual.app import App


class Drawing(App[None]):
    """Mixed into an app: Textual makes escape sequences only for a terminal; here they are made and thrown away."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.frames: list[float] = []  # when each update was drawn, in seconds of the performance counter
        self.drawn_bytes = 0

    def _display(self, screen: Any, renderable: Any) -> None:
        super()._display(screen, renderable)
        if isinstance(renderable, CompositorUpdate):
            self.drawn_bytes += len(renderable.render_segments(self.console))
            self.frames.append(time.perf_counter())
