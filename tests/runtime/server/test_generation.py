from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from helpers.api import Api, events
from helpers.asgi import Exchange, scope_of
from helpers.fake_engine import INFO, FakeEngine
from ziggurat.runtime.engine import GenerationRequest
from ziggurat.runtime.errors import EngineError, QueueFullError
from ziggurat.runtime.server.app import create_app
from ziggurat.runtime.server.settings import ServerSettings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES = {CHAT: {"messages": [{"role": "user", "content": "a"}]}, TEXT: {"prompt": "a"}}
WAYS = pytest.mark.parametrize(("path", "stream"), [(path, stream) for path in BODIES for stream in (False, True)])


def endless(_request: GenerationRequest) -> Iterable[str]:
    while True:
        yield "x"


def exchange(path: str, **fields: Any) -> Exchange:
    body = json.dumps({**BODIES[path], **fields}).encode()
    return Exchange(scope_of("POST", path, [("content-type", "application/json")]), [body])


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def idle(engine: FakeEngine) -> bool:
    return engine.stats().running == 0


# Clients that leave


@WAYS
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_cancels_everything(path: str, stream: bool, n: int) -> None:
    engine = FakeEngine(endless, delay=0.005, info=replace(INFO, parallel=4))
    app = create_app(engine)

    async def run() -> None:
        request = exchange(path, stream=stream, n=n)
        task = asyncio.ensure_future(request.run(app))
        await until(lambda: len(engine.requests) == n)
        if stream:
            await until(lambda: len(request.sent) > 3)
        assert not task.done()
        request.leave()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 10)
        await until(lambda: idle(engine))

    asyncio.run(run())


def test_a_client_that_leaves_ends_its_embeddings() -> None:
    engine = FakeEngine(delay=0.01, info=replace(INFO, embedding_size=3))
    app = create_app(engine)
    scope = scope_of("POST", "/v1/embeddings", [("content-type", "application/json")])

    async def run() -> None:
        request = Exchange(scope, [json.dumps({"input": ["a"] * 2000}).encode()])
        task = asyncio.ensure_future(request.run(app))
        await until(lambda: engine.embedded)
        request.leave()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 20)
        await until(lambda: engine.unwanted)

    asyncio.run(run())
    assert engine.embedded < 2000


@WAYS
def test_a_client_that_leaves_before_the_first_token(path: str, stream: bool) -> None:
    wait = threading.Event()

    def waits(_request: GenerationRequest) -> Iterable[str]:
        wait.wait(10)
        yield from endless(_request)

    engine = FakeEngine(waits)
    app = create_app(engine)

    async def run() -> None:
        request = exchange(path, stream=stream)
        task = asyncio.ensure_future(request.run(app))
        await until(lambda: engine.requests)
        request.leave()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 10)
        wait.set()
        await until(lambda: idle(engine))

    asyncio.run(run())


@WAYS
def test_a_client_that_leaves_while_its_prompt_is_tokenized(path: str, stream: bool) -> None:
    entered, left = threading.Event(), threading.Event()

    class Slow(FakeEngine):
        def stream(self, request: GenerationRequest) -> Any:
            entered.set()
            left.wait(10)
            return super().stream(request)

    engine = Slow(endless, delay=0.001)
    app = create_app(engine)

    async def run() -> None:
        request = exchange(path, stream=stream)
        task = asyncio.ensure_future(request.run(app))
        await until(entered.is_set)
        request.leave()
        await asyncio.sleep(0.05)
        left.set()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 10)
        await until(lambda: engine.requests and idle(engine))

    asyncio.run(run())


@WAYS
def test_a_request_that_is_cancelled_by_the_server(path: str, stream: bool) -> None:
    """As a server does that closes."""
    engine = FakeEngine(endless, delay=0.005)
    app = create_app(engine)

    async def run() -> None:
        task = asyncio.ensure_future(exchange(path, stream=stream).run(app))
        await until(lambda: engine.requests)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        await until(lambda: idle(engine))

    asyncio.run(run())


@WAYS
def test_one_choice_that_fails_ends_the_others(path: str, stream: bool) -> None:
    def script(request: GenerationRequest) -> Iterable[str]:
        if request.sampling.seed == 1:
            raise EngineError("broken")
        return endless(request)

    engine = FakeEngine(script, delay=0.001, info=replace(INFO, parallel=2))
    response = Api(engine).post(path, {**BODIES[path], "stream": stream, "n": 2, "seed": 0})
    told = json.loads(events(response.content)[-1]) if stream else response.json()
    assert told["error"]["message"] == "broken"
    asyncio.run(until(lambda: idle(engine)))


@WAYS
def test_what_somebody_else_cancels_is_an_error(path: str, stream: bool) -> None:
    engine = FakeEngine(lambda request: [engine.cancel(request.id) and "a" or "b"] * 2)
    response = Api(engine).post(path, {**BODIES[path], "stream": stream})
    told = json.loads(events(response.content)[-1]) if stream else response.json()
    assert told["error"]["code"] == "cancelled"


# Many requests in one


class Counting(FakeEngine):
    """Remembers how many requests ran at a time; takes ``room``, and refuses others."""

    def __init__(self, *, parallel: int, room: int = 100) -> None:
        super().__init__(self._count, delay=0.002, info=replace(INFO, parallel=parallel))
        self.now = self.most = 0
        self._room = room

    def _count(self, _request: GenerationRequest) -> Iterable[str]:
        yield "a"
        self.now -= 1

    def stream(self, request: GenerationRequest) -> Any:
        if self.now >= self._room:
            raise QueueFullError(0, 1.0)
        self.now += 1
        self.most = max(self.most, self.now)
        return super().stream(request)


def test_many_prompts_take_turns() -> None:
    engine = Counting(parallel=3)
    answer = Api(engine).complete(["a"] * 10)
    assert len(answer["choices"]) == 10
    assert 1 < engine.most <= 3


def test_only_the_first_of_many_can_be_refused() -> None:
    """The others wait for those before them."""
    engine = Counting(parallel=4, room=1)
    assert len(Api(engine).complete(["a"] * 5)["choices"]) == 5
    assert len([c for c in Api(engine).stream_completion(["a"] * 5) if c["choices"][0]["finish_reason"]]) == 5
    assert Api(Counting(parallel=4, room=0)).refused(TEXT, {"prompt": ["a"] * 5}, 429)["code"] == "queue_full"


def test_what_is_wrong_with_a_later_prompt_ends_all() -> None:
    class Refuses(FakeEngine):
        def stream(self, request: GenerationRequest) -> Any:
            if request.prompt == "bad":
                raise EngineError("broken")
            return super().stream(request)

    engine = Refuses(endless, delay=0.001, info=replace(INFO, parallel=4))
    Api(engine).refused(TEXT, {"prompt": ["a", "b", "bad"], "stream": True}, 500)
    asyncio.run(until(lambda: idle(engine)))


# The stream itself


def test_while_nothing_comes_a_comment_keeps_the_connection() -> None:
    engine = FakeEngine(["a", "b"], delay=0.2)
    api = Api(engine, ping=0.05)
    response = api.post(CHAT, {**BODIES[CHAT], "stream": True})
    assert response.content.count(b": still here\n\n") >= 2
    assert events(response.content)[-1] == "[DONE]"
    assert response.headers["cache-control"] == "no-cache"


def test_a_connection_that_breaks_ends_the_request() -> None:
    engine = FakeEngine(endless, delay=0.002)
    app = create_app(engine, ServerSettings())

    class Broken(Exchange):
        async def send(self, message: dict[str, Any]) -> None:
            await super().send(message)
            if len(self.sent) > 3:
                raise OSError("broken pipe")

    async def run() -> None:
        whole = exchange(CHAT, stream=True)
        request = Broken(whole.scope, [json.dumps({**BODIES[CHAT], "stream": True}).encode()])
        await asyncio.wait_for(asyncio.gather(request.run(app), return_exceptions=True), 10)
        await until(lambda: idle(engine))

    asyncio.run(run())


def test_what_comes_at_the_same_time_is_sent_at_once() -> None:
    engine = FakeEngine(["x"] * 500)
    app = create_app(engine, ServerSettings())

    async def run() -> None:
        request = exchange(CHAT, stream=True)
        answer = await request.run(app)
        assert len(events(answer.body)) == 500 + 3
        assert len(request.sent) < 250

    asyncio.run(run())
