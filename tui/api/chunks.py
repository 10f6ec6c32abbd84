"""From the data of a stream's events to what the chat knows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ziggurat.tui.api.thoughts import ThoughtSplitter
from ziggurat.tui.backend import Delta, Done, DoneReason, Timings, Usage


class ChatChunks:
    """Takes the chunks of one streamed chat completion, in order."""

    def __init__(self) -> None:
        #: Why the answer ended, None as long as it has not.
        self.reason: DoneReason | None = None
        self._usage: Usage | None = None
        self._timings: Timings | None = None
        self._thoughts = ThoughtSplitter()

    def take(self, chunk: Mapping[str, Any]) -> Iterator[Delta]:
        """Return the text of a chunk. What of it is not as OpenAI has it is left out."""
        if isinstance(chunk.get("usage"), dict):
            self._usage = usage_of(chunk["usage"])
        if isinstance(chunk.get("timings"), dict):
            self._timings = timings_of(chunk["timings"])
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        choice = choices[0]
        delta = choice.get("delta")
        if isinstance(delta, dict):
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            if isinstance(thought, str) and thought:
                yield Delta(thought, thought=True)
            text = delta.get("content") or delta.get("refusal")
            if isinstance(text, str) and text:
                yield from self._thoughts.take(text)
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            self.reason = "length" if reason == "length" else "stop"

    def rest(self) -> Iterator[Delta]:
        """Return what was held back, at the end of the stream."""
        yield from self._thoughts.rest()

    def done(self) -> Done:
        """Return the end."""
        return Done(self.reason or "stop", self._usage, self._timings)


def usage_of(data: Mapping[str, Any]) -> Usage:
    """Read the usage of an answer."""
    details = data.get("prompt_tokens_details")
    return Usage(
        _count(data, "prompt_tokens"),
        _count(data, "completion_tokens"),
        _count(details, "cached_tokens") if isinstance(details, dict) else 0,
    )


def timings_of(data: Mapping[str, Any]) -> Timings:
    """Read the timings that a server of ours gives; llama.cpp's have fewer fields, and no time to the first token."""
    first = data.get("time_to_first_token_ms", data.get("prompt_ms"))
    return Timings(
        time_to_first_token_s=_number(first) / 1000,
        prompt_tokens_per_second=_number(data.get("prompt_per_second")),
        decode_tokens_per_second=_number(data.get("predicted_per_second")),
        queue_s=_number(data.get("queue_ms")) / 1000,
        drafted_tokens=_count(data, "draft_n"),
        accepted_tokens=_count(data, "draft_n_accepted"),
        kv_bytes=_count(data, "kv_bytes"),
        kv_bytes_full=_count(data, "kv_bytes_full"),
        evicted_rows=_count(data, "evicted_rows"),
    )


def _count(data: Mapping[str, Any], key: str) -> int:
    return int(_number(data.get(key)))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
