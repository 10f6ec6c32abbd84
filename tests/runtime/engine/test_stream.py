from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from ziggurat.runtime.engine.stream import Channel, EventStream
from ziggurat.runtime.errors import EngineError


def test_items_arrive_in_order_and_the_end_ends() -> None:
    channel: Channel[int] = Channel()
    stream = EventStream(channel, lambda: None)
    producer = threading.Thread(target=lambda: ([channel.push(n) for n in range(1000)], channel.end()))
    producer.start()
    assert list(stream) == list(range(1000))
    assert list(stream) == []
    producer.join()


def test_an_error_comes_after_the_items_before_it() -> None:
    channel: Channel[int] = Channel()
    channel.push(1)
    channel.end(EngineError("broken"))
    channel.push(2)
    channel.end()
    stream = EventStream(channel, lambda: None)
    assert next(stream) == 1
    for _ in range(2):
        with pytest.raises(EngineError, match="broken"):
            next(stream)


def test_async_iteration_is_woken_from_the_producers_thread() -> None:
    async def consume(stream: EventStream[int]) -> list[int]:
        return [item async for item in stream]

    async def many() -> list[list[int]]:
        channels = [Channel[int]() for _ in range(20)]

        def produce() -> None:
            for number in range(50):
                for channel in channels:
                    channel.push(number)
            for channel in channels:
                channel.end()

        thread = threading.Thread(target=produce)
        tasks = [asyncio.ensure_future(consume(EventStream(channel, lambda: None))) for channel in channels]
        await asyncio.sleep(0)
        thread.start()
        results = await asyncio.gather(*tasks)
        thread.join()
        return results

    assert asyncio.run(many()) == [list(range(50))] * 20


def test_async_errors_are_raised() -> None:
    async def consume() -> None:
        channel: Channel[int] = Channel()
        channel.end(EngineError("broken"))
        async for _ in EventStream(channel, lambda: None):
            pytest.fail("an item")

    with pytest.raises(EngineError):
        asyncio.run(consume())


def test_a_closed_event_loop_does_not_break_the_producer() -> None:
    channel: Channel[int] = Channel()

    async def start() -> None:
        items = EventStream(channel, lambda: None).__aiter__()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(items.__anext__(), 0.01)

    asyncio.run(start())
    channel.push(1)
    channel.end()


def test_letting_go_cancels_once() -> None:
    calls: list[int] = []
    stream = EventStream(Channel[int](), lambda: calls.append(1))
    stream.cancel()
    stream.cancel()
    assert calls == [1]
    with EventStream(Channel[int](), lambda: calls.append(2)):
        pass
    abandoned = EventStream(Channel[int](), lambda: calls.append(3))
    del abandoned
    gc.collect()
    assert calls == [1, 2, 3]
