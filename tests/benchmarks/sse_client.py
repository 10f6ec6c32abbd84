"""A closed loop of clients that read streamed completions: each sends its next request when the last one has ended.

Raw sockets and no JSON parser while a stream runs, so that the client takes little of the cores that the server needs:
an event is a time and its bytes, and is looked into when all requests have ended.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """One request: when it was sent and when each of its events came, in seconds of ``time.perf_counter``."""

    sent: float
    status: int = 0
    events: list[tuple[float, bytes]] = field(default_factory=list)  # what follows "data: "
    prompt_tokens: int | None = None
    tokens: int | None = None
    times: list[float] = field(default_factory=list)  # of the events that bring a token

    def read(self) -> None:
        """Look into the events. Raises ValueError for an answer that is not a whole stream."""
        if self.status != 200 or not self.events or not self.events[-1][1].startswith(b"[DONE]"):
            raise ValueError(f"status {self.status}, ends with {self.events[-1:]}")
        for moment, data in self.events[:-1]:
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                raise ValueError(str(event["error"]))
            if (usage := event.get("usage")) is not None:
                self.prompt_tokens, self.tokens = usage["prompt_tokens"], usage["completion_tokens"]
            if any(choice.get("finish_reason") is None for choice in event["choices"]):
                self.times.append(moment)
        if not self.times:
            raise ValueError("no token came")


async def ask(host: str, port: int, body: Mapping[str, Any]) -> Answer:
    """Send a request over a connection of its own and read its stream to the end. Raises OSError and EOFError."""
    data = json.dumps(body).encode()
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        status, *fields = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        answer.status = int(status.split()[1])
        chunked = any(line.startswith(b"transfer-encoding:") and b"chunked" in line for line in fields)
        await _read_events(reader, answer, chunked)
    finally:
        writer.close()
    return answer


async def _read_events(reader: asyncio.StreamReader, answer: Answer, chunked: bool) -> None:
    text = b""
    while True:
        if chunked:
            size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
            piece = (await reader.readexactly(size + 2))[:-2]
        else:
            piece = await reader.read(1 << 16)
        if not piece:
            return
        now = time.perf_counter()
        *lines, text = (text + piece).split(b"\n")
        answer.events += [(now, line[5:].strip()) for line in lines if line.startswith(b"data:")]


def closed_loop(host: str, port: int, clients: Sequence[Iterable[Mapping[str, Any]]]) -> list[list[Answer]]:
    """Run clients side by side; each sends its requests one after the other. Return the answers of each."""

    async def one(requests: Iterable[Mapping[str, Any]]) -> list[Answer]:
        return [await ask(host, port, body) for body in requests]

    async def all_of_them() -> list[list[Answer]]:
        return await asyncio.gather(*(one(requests) for requests in clients))

    answers = asyncio.run(all_of_them())
    for answer in (each for found in answers for each in found):
        answer.read()
    return answers
