"""What every front end talks to: requests in, events out.

``Engine`` is small on purpose. The command line, the server and the chat take one as an argument; their tests pass a
scripted one. Requests and results are frozen, so what later work needs (logprobs, grammars, conversations to continue,
budgets) arrives as new fields with defaults and breaks no caller.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.logprobs import MAX_LOGPROBS, TokenLogprobs
from ziggurat.runtime.sampling import SamplingParams
from ziggurat.runtime.stream import EventStream

#: Why a generation ended: an end token, a stop string or the end of a grammar; the token limit or a full context; or a
#: cancellation.
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, as chat templates know it."""

    role: str
    content: str


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate from and how. Exactly one of ``messages``, ``prompt`` and ``tokens`` is given.

    ``messages`` go through the model's chat template, ``prompt`` is tokenized as it is (special tokens written in it
    are recognized; BOS is added once if the model wants it), ``tokens`` are taken unchanged. ``max_tokens`` None means
    until the model ends or the context is full, which it never is with a KV budget. Generation ends before any of the
    ``stop`` strings, or where the grammar of ``sampling`` ends. ``logprobs`` asks for the log-probability of each token
    and of so many of the likeliest ones, 0 to 20, before any sampler; None for none.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        given = [source for source in (self.messages, self.prompt, self.tokens) if source is not None]
        if len(given) != 1:
            raise InvalidRequestError("give exactly one of messages, prompt and tokens")
        if not given[0]:
            raise InvalidRequestError("the prompt is empty: there is nothing to generate from")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequestError(f"the number of tokens to generate is {self.max_tokens}; it must be at least 1")
        if any(not stop for stop in self.stop):
            raise InvalidRequestError("a stop string is empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidRequestError(f"logprobs is {self.logprobs}; it must be from 0 to {MAX_LOGPROBS}")


@dataclass(frozen=True)
class GenerationStats:
    """Figures of one generation: times in seconds, sizes in bytes.

    ``prompt_seconds`` runs from the start of the prompt's computation to its logits, ``decode_seconds`` over the
    ``decode_steps`` after the first token (which the prompt's logits give), ``time_to_first_token_s`` from the
    submission. ``kv_bytes`` is what the cache takes after the prompt, ``kv_bytes_peak`` the most it took, and
    ``kv_bytes_full`` what the stock library takes for this context: without a budget all three are the whole context,
    which it allocates at once. ``kv_rows_per_layer`` are the rows in use after the prompt, ``evicted_rows`` the tokens
    seen less the rows held at the end, summed over the layers; both per KV head.
    """

    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    decode_seconds: float
    decode_steps: int
    time_to_first_token_s: float
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_full: int
    kv_rows_per_layer: tuple[int, ...]
    evicted_rows: int
    n_ctx: int
    seed: int | None

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens read per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens generated per second after the first; 0 when there was only one."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the keys of the ``--stats`` contract, and the fields they are made of."""
        return {
            **asdict(self),
            "kv_rows_per_layer": list(self.kv_rows_per_layer),
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. ``text`` is what became certain with it: whole characters, often none, or of several.

    ``logprobs`` is there when the request asked for it.
    """

    token: int
    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class FinishEvent:
    """The last event: the text that was still held back, why it ended, and the figures."""

    text: str
    reason: FinishReason
    stats: GenerationStats


Event = TokenEvent | FinishEvent


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded engine serves. ``n_ctx`` is per conversation, in tokens; sizes in bytes.

    ``kv_bytes`` is what the cache takes after a prompt as long as the context. ``kv_unsupported`` says why the KV
    budget that was asked for is not used and every row is kept; None when it is used, or none was asked for.
    """

    path: str
    description: str
    n_params: int
    n_bytes: int
    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    has_chat_template: bool
    kv_bytes: int
    kv_unsupported: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineStats:
    """Counters since ``load``; cheap enough to read ten times a second.

    ``prompt_progress`` is the part of its prompt, 0.0 to 1.0, that the running request has read; None when none runs.
    """

    loaded: bool = False
    running: int = 0
    queued: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    kv_bytes: int = 0
    prompt_progress: float | None = None


class Engine(Protocol):
    """Loads a model and generates text for any number of callers. Every method may be called from any thread."""

    def load(self) -> ModelInfo:
        """Load the model if it is not yet, and describe it. Blocks; Ctrl-C stops it. Raises ZigguratError."""
        ...

    def stream(self, request: GenerationRequest) -> EventStream[Event]:
        """Queue a request and return its events: TokenEvents, then one FinishEvent.

        What is wrong with the request itself (too long, unknown tokens, a template that refuses it) is raised here;
        what goes wrong later is raised by the iterator.
        """
        ...

    def cancel(self, request_id: str) -> bool:
        """End a request at its next step with reason ``cancelled``. False if it is not queued or running."""
        ...

    def stats(self) -> EngineStats:
        """Return the counters."""
        ...

    def close(self) -> None:
        """End all requests with EngineClosedError and free the model. Idempotent."""
        ...
