"""Runs the requests of one HTTP request on the engine, and ends them when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from ziggurat.runtime.engine import Engine, Event, FinishEvent, GenerationRequest
from ziggurat.runtime.engine.stream import EventStream
from ziggurat.runtime.errors import QueueFullError
from ziggurat.runtime.server.errors import ApiError, api_error
from ziggurat.runtime.server.record import RequestRecord

Result = TypeVar("Result")


class Generations:
    """The answers to several requests, as they are made. Leaving the ``with`` block cancels what still runs.

    At most ``at_once`` run at a time: a request with many prompts leaves room for others, and only its first one can be
    refused because too many wait. ``param`` is the field that holds the prompt; ``record`` counts what is read and
    generated.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[GenerationRequest],
        *,
        at_once: int = 1,
        param: str | None = None,
        record: RequestRecord | None = None,
    ) -> None:
        self._engine, self._requests, self._param = engine, requests, param
        record = record or RequestRecord()
        self._meters = [record.meter() for _ in requests]
        self._at_once = max(1, at_once)
        self._streams: dict[int, EventStream[Event]] = {}
        self._next = 0
        self._ended: set[int] = set()

    def __enter__(self) -> Generations:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End everything; no more events are wanted."""
        for stream in self._streams.values():
            stream.cancel()
        self._streams.clear()

    def end(self, place: int) -> None:
        """Have a request's answer end where it is. Its last event still comes, with reason ``cancelled``."""
        if place not in self._ended and place in self._streams:
            self._ended.add(place)
            self._streams[place].cancel()

    async def start(self) -> None:
        """Hand the first requests to the engine. Raises ApiError when it does not take them; then none runs."""
        try:
            await self._start()
        except BaseException:
            self.cancel()
            raise

    async def _start(self) -> None:
        while self._next < len(self._requests) and len(self._streams) < self._at_once:
            request = self._requests[self._next]
            try:
                # in a thread: to read a long prompt or a grammar takes a while, and others want their tokens
                self._streams[self._next] = await asyncio.to_thread(self._engine.stream, request)
            except QueueFullError as error:
                if self._streams:  # it is tried again when one of them has ended
                    return
                raise api_error(error) from error
            except Exception as error:
                raise api_error(error, self._param) from error
            self._next += 1

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of all, with the places of their requests. Raises ApiError for what went wrong."""
        async for batch in self.batches():
            for place, event in batch:
                yield place, event

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yield the same in lists of what is there at the same time."""
        await self.start()
        try:
            async for batch in self._one() if len(self._requests) == 1 else self._together():
                for number, (place, event) in enumerate(batch):
                    self._meters[place](event)
                    cancelled = isinstance(event, FinishEvent) and event.reason == "cancelled"
                    if cancelled and place not in self._ended:
                        yield batch[:number]
                        raise ApiError(503, "the request was cancelled", code="cancelled")
                yield batch
        except Exception as error:
            raise api_error(error, self._param) from error

    async def _one(self) -> AsyncIterator[list[tuple[int, Event]]]:
        async for events in self._streams[0].batches():
            yield [(0, event) for event in events]

    async def _together(self) -> AsyncIterator[list[tuple[int, Event]]]:
        queue: asyncio.Queue[tuple[int, list[Event] | Exception]] = asyncio.Queue()
        readers: dict[int, asyncio.Task[None]] = {}

        async def read(place: int, stream: EventStream[Event]) -> None:
            try:
                async for events in stream.batches():
                    queue.put_nowait((place, events))
            except Exception as error:
                queue.put_nowait((place, error))

        left = len(self._requests)
        try:
            while left:
                for place, stream in self._streams.items():
                    if place not in readers:
                        readers[place] = asyncio.create_task(read(place, stream))
                ready = [await queue.get()]
                while not queue.empty():
                    ready.append(queue.get_nowait())
                batch: list[tuple[int, Event]] = []
                for place, events in ready:
                    if isinstance(events, Exception):
                        yield batch
                        raise events
                    batch += ((place, event) for event in events)
                yield batch
                ended = [place for place, event in batch if isinstance(event, FinishEvent)]
                left -= len(ended)
                for place in ended:
                    del self._streams[place]
                if ended:
                    await self.start()
        finally:
            for task in readers.values():
                task.cancel()


async def attended(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what ``work`` returns; when the client leaves before, cancel it and raise ClientLeft."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class ClientLeft(ApiError):
    """Nobody reads the answer any more."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection", code="client_closed_request")


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
