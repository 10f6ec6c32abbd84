from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from helpers.asgi import Answer, Exchange, ask, echo, scope_of
from ziggurat.runtime.server.middleware.limits import LimitsMiddleware
from ziggurat.runtime.server.phase import Phase

SSE = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
PLAIN = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}


def slow(*before: dict[str, Any], seconds: float = 10.0) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in before:
            await send(message)
        await asyncio.sleep(seconds)
        await echo(scope, receive, send)

    return app


def test_nothing_is_taken_while_closing() -> None:
    app = LimitsMiddleware(echo, Phase("closing"), requests=10)
    got = ask(app, path="/v1/models")
    assert (got.status, got.error["code"]) == (503, "server_closing")
    assert int(got.headers["retry-after"]) > 0
    assert ask(app, path="/health").status == ask(app, path="/metrics").status == 200


def test_so_many_run_at_a_time() -> None:
    async def run() -> None:
        phase = Phase()
        app = LimitsMiddleware(slow(seconds=0.05), phase, requests=2)
        exchanges = [Exchange(scope_of(path="/x")) for _ in range(4)]
        health = Exchange(scope_of(path="/health"))
        answers = await asyncio.gather(*(exchange.run(app) for exchange in exchanges), health.run(app))
        assert [answer.status for answer in answers] == [200, 200, 503, 503, 200]
        assert answers[2].error["code"] == "too_many_requests" and answers[2].headers["retry-after"] == "1"
        assert phase.running == 0
        assert (await Exchange(scope_of(path="/x")).run(app)).status == 200

    asyncio.run(run())


def test_places_of_failed_requests_are_free_again() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError

    phase = Phase()
    app = LimitsMiddleware(fails, phase, requests=1)
    for _ in range(2):
        with pytest.raises(ValueError):
            ask(app, path="/x")
    assert phase.running == 0


def test_a_request_that_takes_too_long() -> None:
    got = ask(LimitsMiddleware(slow(), Phase(), requests=1, timeout=0.02), path="/x")
    assert (got.status, got.error["code"]) == (504, "request_timeout")


def test_a_stream_that_takes_too_long_ends_with_an_error_event() -> None:
    part = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
    got = ask(LimitsMiddleware(slow(SSE, part), Phase(), requests=1, timeout=0.02), path="/x")
    first, last, end = got.body.split(b"\n\n")
    assert (first, end) == (b"data: 1", b"")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "request_timeout"


def test_a_half_sent_answer_is_left_incomplete() -> None:
    part = {"type": "http.response.body", "body": b"{", "more_body": True}
    got = ask(LimitsMiddleware(slow(PLAIN, part), Phase(), requests=1, timeout=0.02), path="/x")
    assert got.body == b"{"


def test_closing_cancels_what_still_runs() -> None:
    async def run() -> tuple[Answer, Answer]:
        phase = Phase()
        app = LimitsMiddleware(slow(), phase, requests=9)
        streams = LimitsMiddleware(slow(SSE), phase, requests=9)
        tasks = [asyncio.create_task(Exchange(scope_of(path="/x")).run(each)) for each in (app, streams)]
        await asyncio.sleep(0.01)
        assert phase.end_all() == 2
        whole, stream = await asyncio.gather(*tasks)
        assert phase.running == 0
        return whole, stream

    whole, stream = asyncio.run(run())
    assert (whole.status, whole.error["code"]) == (503, "server_closing")
    assert stream.status == 200 and b"server_closing" in stream.body


def test_cancellations_of_others_pass_through() -> None:
    async def run() -> None:
        phase = Phase()
        task = asyncio.create_task(Exchange(scope_of(path="/x")).run(LimitsMiddleware(slow(), phase, requests=1)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert phase.running == 0

    asyncio.run(run())
