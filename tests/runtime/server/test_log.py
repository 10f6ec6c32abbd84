from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.asgi import Exchange, ask, echo, scope_of
from helpers.fake_engine import FakeEngine
from ziggurat.runtime.engine import FinishEvent, GenerationStats, TokenEvent
from ziggurat.runtime.server.logs import JsonLines
from ziggurat.runtime.server.metrics import Metrics
from ziggurat.runtime.server.middleware.cors import cors
from ziggurat.runtime.server.middleware.log import LogMiddleware
from ziggurat.runtime.server.record import record_of

SECRET = "what somebody asked"


def stats_of(**figures: Any) -> GenerationStats:
    given = {"prompt_tokens": 7, "generated_tokens": 3, "prompt_seconds": 0.1, "decode_seconds": 0.1}
    rest: dict[str, Any] = {"decode_steps": 2, "time_to_first_token_s": 0.1, "evicted_rows": 0, "n_ctx": 64}
    kv: dict[str, Any] = {"kv_bytes": 0, "kv_bytes_peak": 0, "kv_bytes_full": 0, "kv_rows_per_layer": ()}
    return GenerationStats(**{**given, **rest, **kv, "seed": None, **figures})


async def generates(scope: Any, receive: Any, send: Any) -> None:
    record = record_of(scope)
    record.model = "m"
    for _ in range(2):
        meter = record.meter()
        for token in range(3):
            meter(TokenEvent(token, SECRET))
        meter(FinishEvent("", "length", stats_of(reused_tokens=4, queue_seconds=0.25)))
    await echo(scope, receive, send)


async def fails(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError(SECRET)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(FakeEngine())


def values(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (s.name, tuple(s.labels[n] for n in sorted(s.labels))): s.value for family in families for s in family.samples
    }


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    caplog.set_level(logging.INFO, logger="ziggurat.runtime.server")
    formatter = JsonLines()

    class Lines(list[Any]):
        def __iter__(self) -> Any:
            return iter([json.loads(formatter.format(record)) for record in caplog.records])

    return Lines()


def test_one_line_for_a_request_without_what_was_said(metrics: Metrics, lines: Any) -> None:
    app = LogMiddleware(generates, metrics)
    got = ask(app, "POST", "/v1/x", [("X-Request-Id", "abc.1")], [SECRET.encode()])
    assert got.status == 200 and got.headers["x-request-id"] == "abc.1"
    (line,) = lines
    assert line.pop("seconds") >= 0 and line.pop("first_token_s") >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", line.pop("time"))
    assert line == {
        "level": "info",
        "logger": "ziggurat.runtime.server.middleware.log",
        "message": "POST /v1/x 200",
        "id": "abc.1",
        "client": "192.0.2.1",
        "method": "POST",
        "path": "/v1/x",
        "status": 200,
        "queue_s": 0.25,
        "model": "m",
        "prompt_tokens": 14,
        "reused_tokens": 8,
        "completion_tokens": 6,
        "finish": "length,length",
    }


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\nb", "é", '"', "{}"])
def test_ids_that_are_none_are_replaced(given: str, metrics: Metrics, lines: Any) -> None:
    got = ask(LogMiddleware(echo, metrics), headers=[("X-Request-Id", given)])
    assert re.fullmatch(r"[0-9a-f]{32}", got.headers["x-request-id"])
    assert [line["id"] for line in lines] == [got.headers["x-request-id"]]


def test_what_nobody_caught_is_answered_and_logged(metrics: Metrics, lines: Any) -> None:
    got = ask(LogMiddleware(fails, metrics))
    assert got.status == 500 and got.error["code"] == "internal_error" and SECRET not in got.body.decode()
    failure, request = lines
    assert "Traceback" in failure["traceback"] and failure["level"] == "error"
    assert request["status"] == 500 and request["level"] == "warning" and request["error"] == "internal_error"
    assert values(metrics)["ziggurat_http_requests_total", ("GET", "none", "500")] == 1


def test_paths_are_cut_and_never_break_the_line(metrics: Metrics, lines: Any) -> None:
    ask(LogMiddleware(echo, metrics), path="/a\n\x1b[2J\x00" + "b" * 1000)
    (line,) = lines
    assert len(line["path"]) == 200 and line["path"].startswith("/a\n")


def test_a_client_that_left_is_told_apart(metrics: Metrics, lines: Any) -> None:
    import asyncio

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def run() -> None:
        exchange = Exchange(scope_of())
        exchange.leave()
        await exchange.run(LogMiddleware(waits, metrics))

    asyncio.run(run())
    (line,) = lines
    assert line["disconnected"] is True and "status" not in line
    assert values(metrics)["ziggurat_http_requests_total", ("GET", "none", "499")] == 1


def test_latencies_and_requests_are_counted(metrics: Metrics) -> None:
    async def routed(scope: Any, receive: Any, send: Any) -> None:
        class Route:
            path = "/v1/models/{model}"

        assert values(metrics)["ziggurat_http_requests_in_flight", ()] == 1
        scope["route"] = Route()
        await generates(scope, receive, send)

    ask(LogMiddleware(routed, metrics), "BREW", "/v1/models/whatever")
    got = values(metrics)
    assert got["ziggurat_http_requests_total", ("other", "/v1/models/{model}", "200")] == 1
    assert got["ziggurat_http_request_seconds_count", ("/v1/models/{model}",)] == 1
    assert got["ziggurat_time_to_first_token_seconds_count", ()] == 2
    assert got["ziggurat_inter_token_seconds_count", ()] == 4
    assert got["ziggurat_http_requests_in_flight", ()] == 0


def test_other_sites_are_kept_out_unless_named() -> None:
    origin = ("Origin", "https://a.example")
    ask_first = [origin, ("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "authorization")]
    assert "access-control-allow-origin" not in ask(cors(echo, []), headers=[origin]).headers
    app = cors(echo, ["https://a.example"])
    assert ask(app, headers=[origin]).headers["access-control-allow-origin"] == "https://a.example"
    got = ask(app, "OPTIONS", headers=ask_first)
    assert got.status == 200 and "authorization" in got.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in got.headers
    other = ask(app, headers=[("Origin", "https://b.example")])
    assert "access-control-allow-origin" not in other.headers
    assert ask(cors(echo, ["*"]), headers=[origin]).headers["access-control-allow-origin"] == "*"
