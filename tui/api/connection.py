"""Requests to one server: JSON and streams out, BackendError for everything that goes wrong."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx

from ziggurat.tui.api.address import Address
from ziggurat.tui.api.errors import answer_error, connection_error, event_error, not_a_chat
from ziggurat.tui.api.sse import SSEError, SSEParser
from ziggurat.tui.backend import BackendError

_CONNECT_S = 5.0
_ANSWER_S = 20.0
_DONE = "[DONE]"
# an error's body, and any other answer that is not a stream
_MAX_BODY = 64 * 1024 * 1024


class Connection:
    """A server's connections. ``transport`` stands for the network in tests, ``log`` names a file that says more."""

    def __init__(
        self,
        address: Address,
        *,
        api_key: str | None = None,
        log: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.address, self._log = address, log
        if transport is None and address.unix_socket is not None:
            transport = httpx.AsyncHTTPTransport(uds=str(address.unix_socket))
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(
            transport=transport,
            headers={"User-Agent": "ziggurat-chat", **headers},
            timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
            # the environment's proxies are for the world, not for this machine
            trust_env=not address.local,
        )

    async def get_api(self, path: str) -> dict[str, Any]:
        """Return the answer of one of OpenAI's paths."""
        return await self._json("GET", f"{self.address.api}{path}")

    async def get(self, path: str, query: dict[str, str] | None = None) -> dict[str, Any]:
        """Return the answer of one of the server's own paths."""
        return await self._json("GET", f"{self.address.root}{path}", params=query)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer of one of the server's own paths to a body."""
        return await self._json("POST", f"{self.address.root}{path}", json=body)

    async def stream(
        self, path: str, body: dict[str, Any], *, silence: float | None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Return the objects of a stream of events, to its end or its mark of the end; None seconds wait for ever.

        That a stream ends without the mark is no error here.
        """
        timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S, read=silence)
        try:
            async with self._http.stream("POST", f"{self.address.api}{path}", json=body, timeout=timeout) as response:
                if response.status_code != 200:
                    raise answer_error(response.status_code, await _body_of(response), response.headers, self.address)
                kind = response.headers.get("content-type", "")
                if not kind.startswith("text/event-stream"):
                    raise not_a_chat(self.address, f"{kind or 'nothing'} instead of a stream")
                parser = SSEParser()
                async for part in response.aiter_bytes():
                    for value in self._parsed(parser, part):
                        if value is None:
                            return
                        yield value
                raise BackendError(
                    f"{self.address} ended in the middle of the answer", "have it answered again", kind="lost"
                )
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise connection_error(error, self.address, log=self._log) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    def _parsed(self, parser: SSEParser, part: bytes) -> Iterator[dict[str, Any] | None]:
        """Return the data of the events that became whole, and None for the mark of the end."""
        try:
            for event in parser.feed(part):
                if event.data.strip() == _DONE:
                    yield None
                    return
                value = json.loads(event.data)
                if not isinstance(value, dict):
                    raise ValueError("data that is no object")
                if event.type == "error" or value.get("error"):
                    raise event_error(value if "error" in value else {"error": value}, self.address)
                yield value
        except (SSEError, ValueError) as error:
            raise not_a_chat(self.address, f"a stream with {error}") from None

    async def _json(self, method: str, url: str, **more: Any) -> dict[str, Any]:
        try:
            async with self._http.stream(method, url, **more) as response:
                body = await _body_of(response)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise connection_error(error, self.address, log=self._log) from None
        if response.status_code >= 300:
            raise answer_error(response.status_code, body, response.headers, self.address)
        try:
            value = json.loads(body)
        except ValueError:
            raise not_a_chat(self.address, "no JSON") from None
        if not isinstance(value, dict):
            raise not_a_chat(self.address, "JSON that is no object")
        return value


async def _body_of(response: httpx.Response) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > _MAX_BODY:
            break
    return b"".join(parts)
