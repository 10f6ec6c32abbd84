"""Request bodies: read whole before the application sees them, and no further than they may be long."""

from __future__ import annotations

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.middleware.refuse import refuse

_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class BodyMiddleware:
    """Refuses bodies that are too long (413), not JSON by their type (415), or do not arrive in time (408).

    ``limit`` is in bytes, of what is announced as well as of what comes; nothing is parsed before all of it is there.
    ``timeout`` seconds pass at most until then. Only ``application/json`` is taken, also because no page of another
    site can make a browser send it without being asked about first.
    """

    def __init__(self, app: ASGIApp, limit: int, timeout: float) -> None:
        self._app, self._limit, self._timeout = app, limit, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole body, or refuse it."""
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers:
            await self._app(scope, receive, send)  # which knows whether there must be one
            return
        error = _type_error(headers) or self._length_error(headers)
        body = b""
        if error is None:
            try:
                with anyio.fail_after(self._timeout):
                    body = await self._read(receive)
            except TimeoutError:
                error = ApiError(
                    408, f"the request's body did not arrive within {self._timeout:g} s", code="request_timeout"
                )
            except _TooLong:
                error = self._too_long()
            except _Left:
                return  # nobody to answer
        if error is not None:
            await refuse(scope, receive, send, error)
            return
        await self._app(scope, _replay(body, receive), send)

    def _length_error(self, headers: dict[bytes, bytes]) -> ApiError | None:
        announced = headers.get(b"content-length", b"0")
        # the HTTP parser has refused what is no number, and numbers of more digits than this one are longer anyway
        return self._too_long() if len(announced) > 20 or int(announced) > self._limit else None

    def _too_long(self) -> ApiError:
        return ApiError(
            413, f"the request's body is longer than the {self._limit} bytes that are taken", code="body_too_large"
        )

    async def _read(self, receive: Receive) -> bytes:
        parts, length = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _Left
            part = message.get("body", b"")
            length += len(part)
            if length > self._limit:
                raise _TooLong
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


class _TooLong(Exception):
    pass


class _Left(Exception):
    pass


def _type_error(headers: dict[bytes, bytes]) -> ApiError | None:
    given = headers.get(b"content-type", b"").decode("latin-1")
    kind, _, parameters = given.partition(";")
    if kind.strip().lower() != "application/json":
        wrong = f"the content type is {kind.strip()[:80]}" if kind.strip() else "there is no content type"
        return _unsupported(f"{wrong}; send JSON with Content-Type: application/json")
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in ("utf-8", "utf8", "us-ascii"):
            return _unsupported(f"the body's charset is {value.strip()[:40]}; JSON is sent as UTF-8")
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding not in ("", "identity"):
        return _unsupported(f"the body's encoding is {encoding[:40]}; send it without any")
    return None


def _unsupported(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives the whole body at once, and after it what comes: a disconnect."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
