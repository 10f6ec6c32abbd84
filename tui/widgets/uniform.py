"""Containers that are drawn in no time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip

if TYPE_CHECKING:
    from textual.widget import Widget
else:
    Widget = object  # of a first base that is a widget, Textual would take the style sheet, and of no other


class Uniform(Widget):
    """Before a container among a class's bases: it draws a background, borders only at its sides, and nothing else.

    So all its lines are alike. Textual draws each line of a container below its children, and anew whenever its height
    changes, which with a message that grows is at every flush.
    """

    def render_line(self, y: int) -> Strip:
        """Return a line, without borders."""
        return Strip.blank(self.content_size.width, self._background)

    def render_lines(self, crop: Region) -> list[Strip]:
        """Return lines as they go to the screen."""
        return super().render_lines(Region(crop.x, crop.y, crop.width, 1)) * crop.height

    @property
    def _background(self) -> Style:
        return Style(bgcolor=self.background_colors[1].rich_color)
