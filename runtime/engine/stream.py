"""How events travel from the engine's thread to a consumer, blocking or asynchronous."""

from __future__ import annotations

import asyncio
import functools
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
        self._wake: Callable[[], object] | None = None
        self._n_waiting = 0

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
        if self._n_waiting:
            self._ready.notify_all()
        wake, self._wake = self._wake, None
        if wake is not None:
            try:
                wake()
            except Exception as error:  # the consumer's fault, such as a closed event loop, is not the producer's
                _logger.debug("a consumer cannot be woken: %s", error)

    def take(self) -> Item:
        """Return the next item, as soon as there is one. Raises StopIteration or the error."""
        with self._ready:
            self._n_waiting += 1
            try:
                while not self._items and not self._at_end():
                    self._ready.wait()
            finally:
                self._n_waiting -= 1
            return self._items.popleft()

    def take_ready(self, wake: Callable[[], object]) -> list[Item]:
        """Return all items that are there. Raises StopIteration or the error.

        If there are none, ``wake`` is called once, from the producer's thread, when there are or nothing follows.
        """
        with self._ready:
            if not self._items and not self._at_end():
                self._wake = wake
            items = list(self._items)
            self._items.clear()
            return items

    def _at_end(self) -> bool:
        if self._error is not None:
            raise self._error
        if self._ended:
            raise StopIteration
        return False


class EventStream(Generic[Item]):
    """The consumer's end: iterate it with ``for`` or ``async for``, or its ``batches``.

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
        return self._channel.take()

    async def __aiter__(self) -> AsyncIterator[Item]:
        async for items in self.batches():
            for item in items:
                yield item

    async def batches(self) -> AsyncIterator[list[Item]]:
        """Yield the items in lists of those that are there at the same time."""
        ready = asyncio.Event()
        wake = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, ready.set)
        while True:
            try:
                items = self._channel.take_ready(wake)
            except StopIteration:
                return
            if items:
                yield items
            else:
                await ready.wait()
                ready.clear()
