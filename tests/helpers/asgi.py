"""Asks an ASGI application directly: what no HTTP client would send can be sent, and timing is under control."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class Answer:
    status: int | None
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


def scope_of(method: str = "GET", path: str = "/", headers: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": raw,
        "client": ("192.0.2.1", 50000),
        "server": ("127.0.0.1", 80),
        "state": {},
    }


class Exchange:
    """One request on its way. ``parts`` of the body come at once; after them ``left`` or nothing more, or never."""

    def __init__(self, scope: dict[str, Any], parts: Iterable[bytes] = (b"",), *, complete: bool = True) -> None:
        self.scope = scope
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        parts = list(parts)
        for number, part in enumerate(parts, start=1):
            more = number < len(parts) or not complete
            self._incoming.put_nowait({"type": "http.request", "body": part, "more_body": more})
        self.sent: list[dict[str, Any]] = []
        self.n_received = 0

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> dict[str, Any]:
        message = await self._incoming.get()
        self.n_received += len(message.get("body", b""))
        return message

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def run(self, app: Any) -> Answer:
        await app(self.scope, self.receive, self.send)
        return self.answer()

    def answer(self) -> Answer:
        starts = [message for message in self.sent if message["type"] == "http.response.start"]
        assert len(starts) <= 1
        headers = {name.decode(): value.decode() for name, value in starts[0]["headers"]} if starts else {}
        body = b"".join(message.get("body", b"") for message in self.sent if message["type"] == "http.response.body")
        return Answer(starts[0]["status"] if starts else None, headers, body)


def ask(
    app: Any,
    method: str = "GET",
    path: str = "/",
    headers: Iterable[tuple[str, str]] = (),
    parts: Iterable[bytes] = (b"",),
    *,
    complete: bool = True,
) -> Answer:
    """Return what an application answers; a body that is not ``complete`` stops after its parts."""

    async def run() -> Answer:
        return await Exchange(scope_of(method, path, headers), parts, complete=complete).run(app)

    return asyncio.run(run())


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the body, and how many messages it came in."""
    body, count, more = b"", 0, True
    while more:
        message = await receive()
        body, count, more = body + message.get("body", b""), count + 1, message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-messages", str(count).encode())]})
    await send({"type": "http.response.body", "body": body})
