"""The lines of a message's finished blocks, and where each block stands."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from textual.strip import Strip

from ziggurat.tui.widgets.markdown_blocks import Block
from ziggurat.tui.widgets.markdown_lines import LineRenderer


@dataclass
class _Item:
    block: Block
    strips: list[Strip]


@dataclass
class _Work:
    """An item that is rendered again, and what of it is done."""

    item: _Item
    lines: Iterator[Strip]
    done: list[Strip] = field(default_factory=list)


class FinishedBlocks:
    """Renders blocks once for each renderer, in the order of their adding.

    The parts of a long fence or list are rendered as they come, each for itself. When the last one is there they are
    rendered as the whole that they are, whose colours and indentation may differ: in pieces, by ``settle``.
    """

    def __init__(self) -> None:
        self.renderer: LineRenderer | None = None
        #: Lines of all blocks, with the empty ones between them.
        self.height = 0
        self._items: list[_Item] = []
        self._starts: list[int] = []
        self._work: deque[_Work] = deque()

    def add(self, block: Block) -> None:
        """Take a block; without a renderer it is rendered later."""
        self._put(_Item(block, self.renderer.render(block) if self.renderer is not None else []))
        if block.last and block.joined:
            self._join(block)

    def refer(self, references: Sequence[str]) -> None:
        """Let all blocks so far refer to definitions of links, wherever in the text those stand."""
        definitions = "\n".join(references)
        for item in self._items if references else ():
            if item.block.code is None and "[" in item.block.source:
                item.block = replace(item.block, source=f"{item.block.source}\n\n{definitions}")
                self._again(item)

    def render(self, renderer: LineRenderer) -> None:
        """Render everything anew."""
        self.renderer = renderer
        self._work.clear()
        items, self._items = self._items, []
        self._starts, self.height = [], 0
        for item in items:
            self._put(_Item(item.block, renderer.render(item.block)))

    @property
    def settled(self) -> bool:
        """Whether everything is rendered as it will stay."""
        return not self._work

    def settle(self, seconds: float) -> bool:
        """Go on rendering for about so long, for one line at least; tell whether any line changed."""
        changed, late = False, False
        until = time.perf_counter() + seconds
        while self._work and not late:
            work = self._work[0]
            for strip in work.lines:
                work.done.append(strip)
                late = time.perf_counter() >= until
                if late:
                    break
            else:
                self._work.popleft()
                work.item.strips = work.done
                changed = True
        if changed:
            items, self._items = self._items, []
            self._starts, self.height = [], 0
            for item in items:
                self._put(item)
        return changed

    def line(self, y: int) -> Strip:
        """Return a line."""
        place = bisect_right(self._starts, y) - 1
        strips = self._items[place].strips if place >= 0 else []
        row = y - self._starts[place]
        return strips[row] if row < len(strips) else Strip.blank(0)

    def _put(self, item: _Item) -> None:
        gap = bool(self.height) and bool(item.strips) and not item.block.joined
        start = self.height + gap
        self._items.append(item)
        self._starts.append(start)
        self.height = start + len(item.strips)

    def _join(self, last: Block) -> None:
        first = len(self._items) - 1
        while first and self._items[first].block.joined:
            first -= 1
        parts = self._items[first:]
        if last.code is None:
            if last.list_end:
                for part in parts[:-1]:
                    part.block = replace(part.block, list_end=last.list_end)
                    self._again(part)
            return
        whole = _Item(
            Block("\n".join(part.block.source for part in parts), last.code),
            [strip for part in parts for strip in part.strips],
        )
        self._items[first:], self._starts[first:] = [whole], [self._starts[first]]
        self._again(whole)

    def _again(self, item: _Item) -> None:
        if self.renderer is not None:
            self._work.append(_Work(item, self.renderer.lines(item.block)))
