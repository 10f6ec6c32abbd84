"""How a middleware answers instead of the application."""

from __future__ import annotations

import json

import anyio
from starlette.types import Receive, Scope, Send

from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.record import record_of

# for how long what a client still sends is read and thrown away
_LINGER_S = 2.0


async def refuse(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """Answer with an error, and end the connection where a body is or may be on its way.

    What comes of the body in the next moments is read and thrown away: a connection that is closed on a client which
    writes is reset, and some clients then never look at the answer.
    """
    unread = any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
                 for name, value in scope["headers"])  # fmt: skip
    await _head(scope, send, error, close=unread)
    body = json.dumps(error.body()).encode()
    if unread:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        with anyio.move_on_after(_LINGER_S):
            while (await receive()).get("more_body", False):
                pass
        body = b""
    await send({"type": "http.response.body", "body": body})


async def _head(scope: Scope, send: Send, error: ApiError, *, close: bool) -> None:
    record_of(scope).error = error.code or error.type
    length = len(json.dumps(error.body()).encode())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
    headers += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in error.headers.items()]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})


async def end_stream(scope: Scope, send: Send, error: ApiError) -> None:
    """End an SSE response that has begun with an error event."""
    record_of(scope).error = error.code or error.type
    body = f"data: {json.dumps(error.body())}\n\n".encode()
    await send({"type": "http.response.body", "body": body})
