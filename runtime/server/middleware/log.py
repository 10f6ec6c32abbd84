"""One line for each request: what was asked of which route and how it went, never what was said."""

from __future__ import annotations

import logging
import re
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.metrics import Metrics
from ziggurat.runtime.server.middleware.refuse import end_stream, refuse
from ziggurat.runtime.server.record import RequestRecord, attach

_logger = logging.getLogger(__name__)

_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_MAX_PATH = 200


class LogMiddleware:
    """The outermost: names a request, counts it, logs it when it has ended, and answers what nobody else caught.

    A client's ``X-Request-Id`` is taken if it is 1 to 128 letters, digits and ``._:-``; the answer carries it, or the
    one that was made. The line goes to this module's logger: at INFO, at WARNING from status 500 on.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        record = RequestRecord(
            id=_request_id(scope),
            method=scope["method"],
            path=scope["path"],
            client=client[0] if client else None,
            observer=self._metrics,
        )
        attach(scope, record)
        exchange = _Exchange(record, receive, send)
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except Exception:
                # the traceback is for us; clients learn where to find it
                _logger.exception("request %s failed", record.id)
                await _internal_error(scope, exchange)
            finally:
                record.route = _route(scope)
                record.disconnected = record.disconnected and not exchange.ended
                self._metrics.request(record)
                _write(record)


class _Exchange:
    """Both directions of a request, watched."""

    def __init__(self, record: RequestRecord, receive: Receive, send: Send) -> None:
        self._record, self._receive, self._send = record, receive, send
        self.started = self.ended = self.events = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._record.disconnected = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._record.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._record.id.encode())]
            self.events = any(value.startswith(b"text/event-stream") for _, value in headers)
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.ended = True
        await self._send(message)


async def _internal_error(scope: Scope, exchange: _Exchange) -> None:
    error = ApiError(500, "the server made a mistake; its log says more", code="internal_error")
    if not exchange.started:
        await refuse(scope, exchange.receive, exchange.send, error)
    elif exchange.events and not exchange.ended:
        await end_stream(scope, exchange.send, error)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value.decode("ascii"))
    return uuid.uuid4().hex


def _route(scope: Scope) -> str | None:
    """Return the pattern of the route that took the request; None where none did, or it was refused before."""
    path = getattr(scope.get("route"), "path", None)
    return path.replace(":path}", "}") if isinstance(path, str) else None


def _write(record: RequestRecord) -> None:
    level = logging.WARNING if (record.status or 0) >= 500 else logging.INFO
    if _logger.isEnabledFor(level):
        fields = line(record)
        _logger.log(level, "%s %s %s", record.method, fields["path"], record.status, extra={"fields": fields})


def line(record: RequestRecord) -> dict[str, Any]:
    """Return the keys of a log line. Times in seconds; keys without a value are left out."""
    keys = {
        "id": record.id,
        "client": record.client,
        "method": record.method,
        "path": record.path[:_MAX_PATH],
        "status": record.status,
        "seconds": round(record.seconds, 4),
        "queue_s": _rounded(record.queue_s),
        "first_token_s": _rounded(record.first_token_s),
        "model": record.model,
        "prompt_tokens": record.prompt_tokens or None,
        "reused_tokens": record.reused_tokens or None,
        "completion_tokens": record.completion_tokens or None,
        "finish": ",".join(record.finish) or None,
        "error": record.error,
        "disconnected": record.disconnected or None,
    }
    return {name: value for name, value in keys.items() if value is not None}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
