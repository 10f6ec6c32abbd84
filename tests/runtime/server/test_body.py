from __future__ import annotations

import asyncio

import pytest

from helpers.asgi import Answer, Exchange, ask, echo, scope_of
from ziggurat.runtime.server.middleware import refuse
from ziggurat.runtime.server.middleware.body import BodyMiddleware

JSON = ("Content-Type", "application/json")
LIMIT = 10


@pytest.fixture(autouse=True)
def no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refuse, "_LINGER_S", 0.01)


def post(*parts: bytes, headers: tuple[tuple[str, str], ...] = (JSON,), complete: bool = True) -> Answer:
    """Ask with a body of unknown length, unless the headers say another."""
    app = BodyMiddleware(echo, limit=LIMIT, timeout=0.05)
    if not any(name == "Content-Length" for name, _ in headers):
        headers = (*headers, ("Transfer-Encoding", "chunked"))
    return ask(app, "POST", headers=headers, parts=parts, complete=complete)


def test_a_body_arrives_whole_and_at_once() -> None:
    got = post(b"12", b"", b"345")
    assert (got.status, got.body, got.headers["x-messages"]) == (200, b"12345", "1")


def test_what_follows_the_body_reaches_the_application() -> None:
    async def waits(scope: object, receive: object, send: object) -> None:
        kinds.append((await receive())["type"])  # type: ignore[operator]
        kinds.append((await receive())["type"])  # type: ignore[operator]

    async def run() -> None:
        exchange = Exchange(scope_of("POST", headers=[JSON, ("Transfer-Encoding", "chunked")]), [b"{}"])
        exchange.leave()
        await exchange.run(BodyMiddleware(waits, LIMIT, 1.0))

    kinds: list[str] = []
    asyncio.run(run())
    assert kinds == ["http.request", "http.disconnect"]


def test_the_limit_is_inclusive() -> None:
    assert post(b"x" * LIMIT, headers=(JSON, ("Content-Length", "10"))).status == 200


@pytest.mark.parametrize("length", ["11", "33554432", "9" * 30])
def test_announced_lengths_are_refused_before_anything_is_taken(length: str) -> None:
    async def run() -> tuple[Answer, int]:
        exchange = Exchange(scope_of("POST", headers=[JSON, ("Content-Length", length)]), [], complete=False)
        return await exchange.run(BodyMiddleware(echo, LIMIT, 10.0)), exchange.n_received

    got, taken = asyncio.run(run())
    assert (got.status, got.error["code"], taken) == (413, "body_too_large", 0)
    assert "10 bytes" in got.error["message"] and got.headers["connection"] == "close"


def test_streamed_bytes_are_counted() -> None:
    got = post(b"123456", b"123456", b"...", headers=(JSON,))
    assert (got.status, got.error["code"]) == (413, "body_too_large")
    # more than was announced does not get through either
    assert post(b"123456", b"123456", headers=(JSON, ("Content-Length", "6"))).status == 413


def test_what_is_still_sent_to_a_refused_request_is_read_for_a_moment() -> None:
    async def run() -> int:
        exchange = Exchange(scope_of("POST", headers=[JSON, ("Content-Length", "100")]), [b"x" * 50, b"x" * 50])
        got = await exchange.run(BodyMiddleware(echo, LIMIT, 10.0))
        assert got.status == 413 and got.error
        return exchange.n_received

    assert asyncio.run(run()) == 100


def test_a_slow_body_times_out() -> None:
    got = post(b"{", complete=False, headers=(JSON, ("Content-Length", "9")))
    assert (got.status, got.error["code"]) == (408, "request_timeout")


def test_a_client_that_leaves_meanwhile_gets_no_answer() -> None:
    async def run() -> Answer:
        exchange = Exchange(scope_of("POST", headers=[JSON, ("Transfer-Encoding", "chunked")]), [b"{"], complete=False)
        exchange.leave()
        return await exchange.run(BodyMiddleware(echo, LIMIT, 10.0))

    assert asyncio.run(run()).status is None


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "Application/JSON",
        "application/json;charset=UTF-8",
        'application/json; charset="utf-8"',
        "application/json; charset=us-ascii; x=y",
    ],
)
def test_json_is_taken(kind: str) -> None:
    assert post(b"{}", headers=(("Content-Type", kind),)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("Content-Type", ""),),
        (("Content-Type", "text/plain"),),
        (("Content-Type", "application/x-www-form-urlencoded"),),
        (("Content-Type", "multipart/form-data; boundary=x"),),
        (("Content-Type", "application/jsonx"),),
        (("Content-Type", "application/json; charset=utf-16"),),
        (JSON, ("Content-Encoding", "gzip")),
    ],
)
def test_other_types_are_refused(headers: tuple[tuple[str, str], ...]) -> None:
    got = post(b"{}", headers=headers)
    assert (got.status, got.error["code"]) == (415, "unsupported_media_type")


def test_requests_without_a_body_pass() -> None:
    app = BodyMiddleware(echo, LIMIT, 1.0)
    assert ask(app, "GET", headers=[("Content-Type", "text/plain")]).status == 200
    assert ask(app, "DELETE").status == 200
    # whether there must be one is the application's to say
    assert ask(app, "PUT").status == 200
    assert ask(app, "POST", headers=[("Content-Length", "0")]).status == 200
