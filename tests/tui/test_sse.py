"""The parser of event streams: the same events however the bytes are cut."""

from __future__ import annotations

import pytest

from ziggurat.tui.api.sse import MAX_EVENT, ServerEvent, SSEError, SSEParser

STREAM = (
    "\ufeff: hello\r\n\r\n"
    "data: one\n\n"
    "event: error\r\ndata: zwei \U0001f600\r\n\r\n"
    "data: a\rdata:b\r\r"
    ": still here\n\n"
    "id: 7\nretry: 10\ndata\n\n"
    'data: {"x":"\u00e9"}\n\n'
    "data: lost, because no blank line follows"
).encode()
EVENTS = [
    ServerEvent("one"),
    ServerEvent("zwei \U0001f600", "error"),
    ServerEvent("a\nb"),
    ServerEvent(""),
    ServerEvent('{"x":"\u00e9"}'),
]


def test_whole_stream() -> None:
    assert SSEParser().feed(STREAM) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_stream_in_pieces(size: int) -> None:
    parser = SSEParser()
    found = [event for start in range(0, len(STREAM), size) for event in parser.feed(STREAM[start : start + size])]
    assert found == EVENTS


def test_cut_at_every_byte() -> None:
    for place in range(len(STREAM) + 1):
        parser = SSEParser()
        assert parser.feed(STREAM[:place]) + parser.feed(STREAM[place:]) == EVENTS


def test_empty_parts_change_nothing() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: x\r") == []
    assert parser.feed(b"") == []
    assert parser.feed(b"\n\r\n") == [ServerEvent("x")]


def test_event_without_end_is_refused() -> None:
    parser = SSEParser()
    with pytest.raises(SSEError, match="more than"):
        for _ in range(MAX_EVENT // 2**20 + 1):
            parser.feed(b"x" * 2**20)


def test_many_data_lines_without_end_are_refused() -> None:
    parser = SSEParser()
    line = b"data:" + b"x" * 2**20 + b"\n"
    with pytest.raises(SSEError, match="more than"):
        for _ in range(MAX_EVENT // 2**20 + 1):
            parser.feed(line)
