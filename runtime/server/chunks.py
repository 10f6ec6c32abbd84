"""The events of a stream as bytes. What does not change between the chunks of a choice is encoded once."""

from __future__ import annotations

import json
from json.encoder import encode_basestring
from typing import Any

from ziggurat.runtime.engine import FinishEvent, GenerationStats
from ziggurat.runtime.server.results import timings_of, usage_of
from ziggurat.runtime.server.streaming import DONE
from ziggurat.runtime.server.tools.deltas import CallDelta, Delta, TextDelta


class ChunkWriter:
    """Writes the chunks of one stream.

    ``head`` are the fields that all of them have. With ``usage`` every chunk has the field, null but for the last one,
    which has no choices. ``per_prompt`` choices share a prompt.
    """

    def __init__(self, head: dict[str, Any], *, usage: bool, per_prompt: int = 1) -> None:
        self._head = _json(head)[:-1]
        self._usage, self._per_prompt = usage, per_prompt
        self._stats: dict[int, GenerationStats] = {}

    def end_of_choice(self, place: int, stats: GenerationStats) -> None:
        """Take the figures of a choice."""
        self._stats[place] = stats

    def chunk(self, choices: str, more: str = "") -> str:
        """Return a chunk of choices that are JSON already."""
        usage = ',"usage":null' if self._usage else ""
        return f'data: {self._head},"choices":[{choices}]{usage}{more}}}\n\n'

    def around(self, choices: str) -> tuple[str, str]:
        """Return what stands before and after a mark, ``@@``, in a chunk of these choices."""
        before, _, after = self.chunk(choices).rpartition("@@")
        return before, after

    def timings(self, place: int, n_choices: int) -> str:
        """Return the figures as a further field of a chunk, if there is one choice."""
        return f',"timings":{_json(timings_of(self._stats[place]))}' if n_choices == 1 else ""

    def end(self) -> bytes:
        """Return the usage, if it was asked for, and the mark of the end."""
        if not self._usage:
            return DONE
        usage = _json(usage_of(self._stats, self._per_prompt))
        return f'data: {self._head},"choices":[],"usage":{usage}}}\n\n'.encode() + DONE


class ChatChunks(ChunkWriter):
    """The chunks of a chat's stream, of ``n`` choices; with ``tools`` they may have no text at all."""

    def __init__(self, head: dict[str, Any], *, usage: bool, n: int, tools: bool = False) -> None:
        super().__init__(head, usage=usage, per_prompt=n)
        self._n = n
        self._first = _json({"role": "assistant", "content": None if tools else "", "refusal": None})
        self._around = [self.around(_choice(index, '{"content":@@}')) for index in range(n)]

    def role(self, index: int) -> bytes:
        """Return the first chunk of a choice."""
        return self.chunk(_choice(index, self._first)).encode()

    def of(self, index: int, delta: Delta, logprobs: list[dict[str, Any]] | None = None) -> bytes:
        """Return a chunk with what is new of a choice, and with log-probabilities of its tokens."""
        if isinstance(delta, TextDelta):
            if logprobs is None:
                return self.text(index, delta.text)
            return self.delta(index, {"content": delta.text}, logprobs)
        if isinstance(delta, CallDelta):
            function = {"name": delta.name, "arguments": ""}
            call = {"index": delta.index, "id": delta.id, "type": "function", "function": function}
        else:
            call = {"index": delta.index, "function": {"arguments": delta.text}}
        return self.delta(index, {"tool_calls": [call]}, logprobs)

    def text(self, index: int, text: str) -> bytes:
        """Return a chunk with text and nothing else."""
        before, after = self._around[index]
        return (before + encode_basestring(text) + after).encode()

    def delta(self, index: int, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None) -> bytes:
        """Return a chunk with any delta, and with log-probabilities of its tokens."""
        told = "null" if logprobs is None else _json({"content": logprobs, "refusal": None})
        return self.chunk(_choice(index, _json(delta), told)).encode()

    def finish(self, index: int, reason: str, stats: GenerationStats) -> bytes:
        """Return the last chunk of a choice."""
        self.end_of_choice(index, stats)
        return self.chunk(_choice(index, "{}", reason=f'"{reason}"'), self.timings(index, self._n)).encode()


class CompletionChunks(ChunkWriter):
    """The chunks of a completion's stream, of ``n_choices`` in all, ``n`` for each prompt."""

    def __init__(self, head: dict[str, Any], *, usage: bool, n: int, n_choices: int) -> None:
        super().__init__(head, usage=usage, per_prompt=n)
        self._n_choices = n_choices
        self._around = [self.around(_text_choice(index, "@@")) for index in range(n_choices)]

    def text(self, index: int, text: str) -> bytes:
        """Return a chunk with text and nothing else."""
        before, after = self._around[index]
        return (before + encode_basestring(text) + after).encode()

    def with_logprobs(self, index: int, text: str, logprobs: dict[str, Any]) -> bytes:
        """Return a chunk with log-probabilities of its tokens."""
        return self.chunk(_text_choice(index, encode_basestring(text), _json(logprobs))).encode()

    def finish(self, index: int, event: FinishEvent) -> bytes:
        """Return the last chunk of a choice, with the text that was held back."""
        self.end_of_choice(index, event.stats)
        choice = _text_choice(index, encode_basestring(event.text), reason=f'"{event.reason}"')
        return self.chunk(choice, self.timings(index, self._n_choices)).encode()


def _text_choice(index: int, text: str, logprobs: str = "null", reason: str = "null") -> str:
    return f'{{"index":{index},"text":{text},"logprobs":{logprobs},"finish_reason":{reason}}}'


def _choice(index: int, delta: str, logprobs: str = "null", reason: str = "null") -> str:
    return f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{reason}}}'


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
