"""Server-sent events, from bytes that are cut anywhere.

After the HTML standard's "event stream interpretation": lines end with LF, CR LF or CR, a line that begins with a colon
is a comment, ``data`` lines of an event are joined by LF, one space after the colon is not part of a value, and a blank
line ends the event. What stands at the end without a blank line is no event. ``id`` and ``retry`` are ignored: nothing
here connects again in the middle of a stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: Bytes that one event may take before it is not taken for an event any more.
MAX_EVENT = 16 * 1024 * 1024


class SSEError(ValueError):
    """The stream holds an event that is larger than any can be."""


@dataclass(frozen=True)
class ServerEvent:
    """One event: its data, and its type, ``message`` unless the stream says otherwise."""

    data: str
    type: str = "message"


class SSEParser:
    """Takes the bytes of one stream in order and returns the events that became whole."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[str] = []
        self._type = ""
        self._size = 0
        self._after_cr = self._begun = False

    def feed(self, part: bytes) -> list[ServerEvent]:
        """Take bytes. Raises SSEError."""
        return [event for line in self._lines(part) if (event := self._take(line)) is not None]

    def _lines(self, part: bytes) -> Iterator[bytes]:
        if self._after_cr and part:  # the LF of a CR LF that was cut in the middle
            self._after_cr = False
            part = part[1:] if part.startswith(b"\n") else part
        if b"\r" in part:
            self._after_cr = part.endswith(b"\r")
            part = part.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, last = part.split(b"\n")
        for line in lines:
            self._rest += line
            whole = bytes(self._rest)
            self._rest.clear()
            yield whole
        self._rest += last
        if self._size + len(self._rest) > MAX_EVENT:
            raise SSEError(f"an event of more than {MAX_EVENT} bytes")

    def _take(self, raw: bytes) -> ServerEvent | None:
        line = raw.decode("utf-8", errors="replace")
        if not self._begun:
            self._begun = True
            line = line.removeprefix("\ufeff")
        if not line:
            return self._end()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._size += len(raw)
            if self._size > MAX_EVENT:
                raise SSEError(f"an event of more than {MAX_EVENT} bytes")
            self._data.append(value)
        elif name == "event":
            self._type = value
        return None

    def _end(self) -> ServerEvent | None:
        data, kind = self._data, self._type
        self._data, self._type, self._size = [], "", 0
        return ServerEvent("\n".join(data), kind or "message") if data else None
