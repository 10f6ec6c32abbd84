"""The text of a message, drawn by one widget from lines: finished Markdown, and the tail that still grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.segment import Segment
from textual.geometry import Region, Size
from textual.reactive import Reactive
from textual.strip import Strip
from textual.widget import Widget

from ziggurat.tui.widgets.finished_blocks import FinishedBlocks
from ziggurat.tui.widgets.markdown_blocks import BlockSplitter
from ziggurat.tui.widgets.markdown_lines import LineRenderer, Palette, printable
from ziggurat.tui.widgets.tail import TailLines

if TYPE_CHECKING:
    from rich.style import Style
    from textual.selection import Selection
    from textual.timer import Timer

#: Seconds between two looks of a growing message at what has come, and what each may take to render blocks again.
FLUSH_SECONDS, SETTLE_SECONDS = 0.05, 0.004
#: Finished lines that are kept as they go to the screen, beside those that are on it.
_KEPT_LINES = 200


class MessageBody(Widget):
    """Shows Markdown, or plain text, that may still grow.

    ``append`` takes text as it comes and shows it at the next flush; ``finish`` shows all there is, the tail as
    Markdown as well.
    """

    DEFAULT_CSS = """
    MessageBody { height: auto; width: 1fr; }
    """

    # Textual would lay out and draw everything once more whenever this changes, which every flush does: only for
    # scrollbars that appear, so what holds a body keeps their place free (scrollbar-gutter: stable)
    virtual_size = Reactive(Size(0, 0), repaint=False)

    def __init__(self, text: str = "", *, plain: bool = False, id: str | None = None) -> None:
        super().__init__(id=id)
        self.plain = plain
        self._text: list[str] = []
        self._pending: list[str] = []
        self._splitter = BlockSplitter()
        self._blocks = FinishedBlocks()
        self._height = 0
        self._tail_start = 0
        self._tail = TailLines(80)
        self._drawn: dict[int, Strip] = {}  # finished lines as they go to the screen
        self._style: Style | None = None
        self._finished = False
        self._timer: Timer | None = None
        self.flushes = 0
        if text:
            self._text.append(text)
            self._add(printable(text))
            self._end()

    @property
    def allow_select(self) -> bool:
        """The text can be selected with the mouse."""
        return True

    @property
    def text(self) -> str:
        """All text so far, as it came."""
        return "".join(self._text)

    def on_mount(self) -> None:
        """Look for new text regularly while it may grow."""
        if not self.settled:
            self._timer = self.set_interval(FLUSH_SECONDS, self.flush)

    def append(self, text: str) -> None:
        """Add text; it is seen at the next flush."""
        self._text.append(text)
        self._pending.append(text)

    @property
    def empty(self) -> bool:
        """Whether there is no text."""
        return not self._text

    @property
    def settled(self) -> bool:
        """Whether everything that came is shown as it will stay."""
        return self._finished and self._blocks.settled

    def flush(self) -> None:
        """Show what has come since the last flush."""
        settled = self._blocks.settle(SETTLE_SECONDS)
        if settled:
            self._drawn.clear()
        if self._pending:
            text = printable("".join(self._pending))
            self._pending.clear()
            self._add(text)
            self.flushes += 1
            self._changed()
        elif settled:
            self._changed()
        elif self.settled and self._timer is not None:
            self._timer.stop()

    def finish(self) -> None:
        """Show all text as it will stay; what takes long of that comes with the next looks."""
        self.flush()
        if not self._finished:
            self._end()
            self._changed()

    def notify_style_update(self) -> None:
        """Render anew in the colours of another theme."""
        super().notify_style_update()
        renderer = self._blocks.renderer
        if renderer is not None and renderer.palette != Palette.of(self.app):
            self._blocks.renderer = None
            self.refresh(layout=True)

    def _changed(self) -> None:
        before = self._height
        self._place()
        self.refresh(layout=self._height != before)

    def _add(self, text: str) -> None:
        if self.plain:
            self._tail.feed(text)
            return
        was_code = self._splitter.in_code
        finished = self._splitter.feed(text)
        for block in finished:
            self._blocks.add(block)
        if finished or self._splitter.in_code != was_code or self._splitter.empty:
            self._new_tail()
        else:
            self._tail.feed(text)

    def _end(self) -> None:
        self._finished = True
        if not self.plain:
            for block in self._splitter.finish():
                self._blocks.add(block)
            self._blocks.refer(self._splitter.references)
            self._tail = TailLines(self._width)

    @property
    def _width(self) -> int:
        return self._blocks.renderer.width if self._blocks.renderer is not None else 80

    def _tail_width(self) -> int:
        return self._width - 2 if self._splitter.in_code else self._width

    def _new_tail(self) -> None:
        self._tail = TailLines(self._tail_width())
        self._tail.feed(self._splitter.tail())

    def _prepare(self, width: int) -> None:
        """Render everything for a width, if that is not the one it is rendered for."""
        renderer = self._blocks.renderer
        if renderer is not None and renderer.width == max(width, 4):
            return
        self._drawn.clear()
        self._blocks.render(LineRenderer(width, Palette.of(self.app)))
        if self.plain:
            self._tail = TailLines(self._width)
            self._tail.feed(printable("".join(self._text)))
        elif not self._finished:
            self._new_tail()
        self._place()

    def _place(self) -> None:
        height = self._blocks.height
        self._tail_start = height + (bool(height) and not self._splitter.joined)
        self._height = self._tail_start + self._tail.rows if not self._tail.empty else height

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the number of lines."""
        self._prepare(width)
        return max(self._height, 1)

    def render_lines(self, crop: Region) -> list[Strip]:
        """Return lines as they go to the screen.

        What Textual does for any widget (borders, padding, its own cache, emptied whenever the height changes) is left
        out: a message that grows moves all that is seen of it, with every flush.
        """
        width = self.size.width
        self._prepare(width)
        style = self.rich_style
        if style != self._style:
            self._style = style
            self._drawn.clear()
        selection = self.text_selection
        if selection is None:
            strips = [self._drawn.get(y) or self._draw(y, width, style) for y in crop.line_range]
        else:
            strips = [self._styled(self._selected(y, selection), y, width, style) for y in crop.line_range]
        if len(self._drawn) > _KEPT_LINES + crop.height:
            self._drawn = {y: self._drawn[y] for y in crop.line_range if y in self._drawn}
        background = self.background_colors[1]
        for each in self.get_line_filters():
            strips = [strip.apply_filter(each, background) for strip in strips]
        if crop.column_span != (0, width):
            strips = [strip.crop(*crop.column_span) for strip in strips]
        return strips

    def render_line(self, y: int) -> Strip:
        """Return one line."""
        return self.render_lines(Region(0, y, self.size.width, 1))[0]

    def _draw(self, y: int, width: int, style: Style) -> Strip:
        strip = self._styled(self._line(y), y, width, style)
        if y < self._blocks.height:
            self._drawn[y] = strip
        return strip

    @staticmethod
    def _styled(strip: Strip, y: int, width: int, style: Style) -> Strip:
        return strip.apply_style(style).crop_extend(0, width, style).apply_offsets(0, y)

    def _line(self, y: int) -> Strip:
        if y < self._blocks.height:
            return self._blocks.line(y)
        row = y - self._tail_start
        return self._tail_strip(row) if 0 <= row < self._tail.rows else Strip.blank(0)

    def _tail_strip(self, row: int) -> Strip:
        text = self._tail.row(row)
        renderer = self._blocks.renderer
        if self._splitter.in_code and renderer is not None:
            return Strip([Segment(f" {text}", renderer.code_style)]).extend_cell_length(
                self._width, renderer.code_style
            )
        return Strip([Segment(text)])

    def _selected(self, y: int, selection: Selection) -> Strip:
        strip = self._line(y)
        start, end = selection.get_span(y) or (0, 0)
        length = strip.cell_length
        end = length if end < 0 else min(end, length)
        if start >= end:
            return strip
        before, inside, after = strip.crop(0, start), strip.crop(start, end), strip.crop(end, length)
        style = self.screen.get_component_rich_style("screen--selection")
        return Strip.join(
            [before, Strip([Segment(text, (old + style) if old else style) for text, old, _ in inside]), after]
        )

    def selection_updated(self, selection: Selection | None) -> None:
        """Draw the selection."""
        self.refresh()

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """Return the selected lines as they are seen."""
        text = "\n".join(self._line(y).text.rstrip() for y in range(self._height))
        return selection.extract(text), "\n"
