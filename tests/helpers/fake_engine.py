"""An engine that says what it was told to: for tests of everything that talks to an ``Engine``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from ziggurat.runtime.engine import (
    Embeddings,
    EngineStats,
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    GenerationStats,
    KeptRows,
    ModelInfo,
    TokenEvent,
)
from ziggurat.runtime.engine.stream import Channel, EventStream
from ziggurat.runtime.errors import (
    ConversationError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    StateFileError,
    TokenError,
)

Script = Callable[[GenerationRequest], Iterable[str]]

INFO = ModelInfo(
    path="fake.gguf",
    description="fake 0B",
    n_params=0,
    n_bytes=0,
    n_vocab=256,
    n_ctx=4096,
    n_ctx_train=4096,
    has_chat_template=True,
    kv_bytes=0,
)


class FakeEngine:
    """Satisfies ``Engine``. Each request is answered by a thread of its own with the pieces of ``script``.

    ``script`` is a list of pieces, or a function of the request that may also raise (the error reaches the consumer) or
    wait. ``delay`` seconds pass before each piece. ``requests`` records what was asked.
    """

    def __init__(
        self, script: Iterable[str] | Script = ("Hello", " world", "."), *, delay: float = 0.0, info: ModelInfo = INFO
    ) -> None:
        pieces = None if callable(script) else tuple(script)
        self._script: Script = script if callable(script) else lambda _request: pieces or ()
        self._delay = delay
        self._info = info
        self._lock = threading.RLock()
        self._running: dict[str, threading.Event] = {}
        self._stats = EngineStats()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self.requests: list[GenerationRequest] = []
        self.embedded = self.unwanted = 0  # texts that were, and calls that were not finished
        self.conversations: dict[str, KeptRows] = {}

    def load(self) -> ModelInfo:
        if self._closed:
            raise EngineClosedError("the engine was closed")
        self._stats = replace(self._stats, loaded=True)
        return self._info

    def stream(self, request: GenerationRequest) -> EventStream[Event]:
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine was closed")
            if not self._stats.loaded:
                raise EngineError("the engine has no model yet: call load() first")
            self.requests.append(request)
            cancelled = self._running[request.id] = threading.Event()
        channel: Channel[Event] = Channel()
        thread = threading.Thread(target=self._answer, args=(request, channel, cancelled), daemon=True)
        self._threads.append(thread)
        thread.start()
        return EventStream(channel, cancelled.set)

    def _answer(self, request: GenerationRequest, channel: Channel[Event], cancelled: threading.Event) -> None:
        reason: FinishReason = "stop"
        count, started = 0, time.perf_counter()
        try:
            for piece in self._script(request):
                if cancelled.wait(self._delay) if self._delay else cancelled.is_set():
                    reason = "cancelled"
                    break
                if count == request.max_tokens:
                    reason = "length"
                    break
                channel.push(TokenEvent(count % INFO.n_vocab, piece))
                count += 1
        except Exception as error:
            channel.end(error)
        else:
            if self._closed:
                channel.end(EngineClosedError("the engine was closed before this request ended"))
            channel.push(FinishEvent("", reason, _stats(request, count, time.perf_counter() - started)))
            channel.end()
        finally:
            with self._lock:
                self._running.pop(request.id, None)

    def cancel(self, request_id: str) -> bool:
        with self._lock:
            cancelled = self._running.get(request_id)
        if cancelled is not None:
            cancelled.set()
        return cancelled is not None

    def embed(self, texts: Sequence[str | Sequence[int]], *, wanted: Callable[[], bool] = lambda: True) -> Embeddings:
        """Return vectors of the texts' lengths, ``delay`` seconds after each other."""
        for text in texts:
            if not text:
                raise InvalidRequestError("text 0 has no tokens, and there is nothing to embed")
            if not wanted():
                self.unwanted += 1
                raise EngineError("not wanted")
            time.sleep(self._delay)
            self.embedded += 1
        vectors = np.array([[len(text), 0.5, -1.25] for text in texts], dtype=np.float32)
        return Embeddings(vectors, sum(map(len, texts)))

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the text's bytes, 1 before them with ``add_special``."""
        return [1] * add_special + list(text.encode())

    def detokenize(self, tokens: Sequence[int]) -> str:
        if any(not 0 <= token < INFO.n_vocab for token in tokens):
            raise TokenError(f"a token of {list(tokens)} is not in the vocabulary")
        return bytes(tokens).decode(errors="replace")

    def kept(self, conversation: str) -> KeptRows:
        """Return what ``conversations`` holds."""
        if conversation not in self.conversations:
            raise ConversationError(f"the engine holds no conversation {conversation!r}")
        return self.conversations[conversation]

    def encode(self, request: GenerationRequest) -> list[int]:
        if request.tokens is not None:
            return list(request.tokens)
        texts = [message.content for message in request.messages or ()] if request.prompt is None else [request.prompt]
        return [token for text in texts for token in self.tokenize(text)]

    def save(self, conversation: str, path: str | os.PathLike[str]) -> int:
        raise ConversationError(f"there is no conversation {conversation!r} to be saved to {os.fspath(path)}")

    def restore(self, conversation: str, path: str | os.PathLike[str]) -> int:
        raise StateFileError(f"{os.fspath(path)}: is of no conversation {conversation!r}")

    def stats(self) -> EngineStats:
        with self._lock:
            return replace(self._stats, running=len(self._running), loaded=self._stats.loaded and not self._closed)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for cancelled in self._running.values():
                cancelled.set()
        for thread in self._threads:
            thread.join()


def _stats(request: GenerationRequest, n_generated: int, seconds: float) -> GenerationStats:
    n_prompt = len(request.tokens or request.prompt or request.messages or ())
    return GenerationStats(
        prompt_tokens=n_prompt,
        generated_tokens=n_generated,
        prompt_seconds=0.0,
        decode_seconds=seconds,
        decode_steps=max(0, n_generated - 1),
        time_to_first_token_s=0.0,
        kv_bytes=0,
        kv_bytes_peak=0,
        kv_bytes_full=0,
        kv_rows_per_layer=(),
        evicted_rows=0,
        n_ctx=INFO.n_ctx,
        seed=request.sampling.seed,
    )
