"""How events travel from the engine's thread to a consumer, blocking or asynchronous."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
_logger = logging.getLogger(__name__)


class Channel(Generic[Item]):
    """The producer's end. Events are pushed from one thread; the consumer waits in another, or in an event loop."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._ready = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None
        self._wake: Callable[[], None] | None = None

    def push(self, item: Item) -> None:
        """Hand one item to the consumer; ignored after the end."""
        with self._ready:
            if not self._ended:
                self._items.append(item)
                if len(self._items) == 1:  # with more there it is awake
                    self._notify()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing follows; ``error`` is raised at the consumer after the items before it. The first end counts."""
        with self._ready:
            if not self._ended:
                self._ended, self._error = True, error
                self._notify()

    def _notify(self) -> None:
        self._ready.notify_all()
        if self._wake is not None:
            try:
                self._wake()
            except Exception as error:  # the consumer's fault, such as a closed event loop, is not the producer's
                _logger.debug("a consumer cannot be woken: %s", error)

    def take(self, *, wait: bool) -> Item | None:
        """Return the next item, or None if there is none yet and ``wait`` is off. Raises StopIteration or the error."""
        with self._ready:
            while not self._items:
                if self._error is not None:
                    raise self._error
                if self._ended:
                    raise StopIteration
                if not wait:
                    return None
                self._ready.wait()
            return self._items.popleft()

    def on_ready(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` at every item and at the end, from the producer's thread."""
        with self._ready:
            self._wake = wake


class EventStream(Generic[Item]):
    """The consumer's end: iterate it with ``for`` or ``async for``.

    Leaving the ``with`` block, or letting go of the stream, cancels what produces it.
    """

    def __init__(self, channel: Channel[Item], cancel: Callable[[], object]) -> None:
        self._channel = channel
        # at exit the engine closes itself; nobody is left to cancel for
        self._cancel = weakref.finalize(self, cancel)
        self._cancel.atexit = False

    def cancel(self) -> None:
        """Ask the producer to end; the events already made and the last one still arrive."""
        self._cancel()

    def __enter__(self) -> EventStream[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item = self._channel.take(wait=True)
        assert item is not None
        return item

    def __aiter__(self) -> AsyncIterator[Item]:
        return self._items()

    async def _items(self) -> AsyncIterator[Item]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(ready.set)

        self._channel.on_ready(wake)
        while True:
            ready.clear()
            try:
                item = self._channel.take(wait=False)
            except StopIteration:
                return
            if item is None:
                await ready.wait()
            else:
                yield item
