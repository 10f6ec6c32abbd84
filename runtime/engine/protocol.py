"""What every front end talks to: requests in, events out.

``Engine`` is small on purpose. The command line, the server and the chat take one as an argument; their tests pass a
scripted one. Requests and results are frozen, so what later work needs (logprobs, grammars, conversations to continue,
budgets) arrives as new fields with defaults and breaks no caller.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from ziggurat.runtime.engine.stream import EventStream
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.logprobs import MAX_LOGPROBS, TokenLogprobs
from ziggurat.runtime.sampling import SamplingParams

#: Why a generation ended: an end token, a stop string or the end of a grammar; the token limit or a full context; or a
#: cancellation.
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, as chat templates know it; ``more`` are further keys, such as ``tool_calls``."""

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_mapping(self) -> dict[str, Any]:
        """Return it as templates have it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate from and how. Exactly one of ``messages``, ``prompt`` and ``tokens`` is given.

    ``messages`` go through the model's chat template, with ``tools`` (JSON schemas of functions, as OpenAI's API has
    them) and ``template_variables`` where it knows what to do with them; ``prompt`` is tokenized as it is (special
    tokens written in it are recognized; BOS is added once if the model wants it), ``tokens`` are taken unchanged.
    ``max_tokens`` None means until the model ends or the context is full, which it never is with a KV budget.
    Generation ends before any of the ``stop`` strings, or where the grammar of ``sampling`` ends. ``logprobs`` asks for
    the log-probability of each token and of so many of the likeliest ones, 0 to 20, before any sampler; None for none.
    ``shown`` are control tokens, as they are written, that belong to the text of the answer.

    A prompt that goes on where an earlier one ended continues on the rows that were kept of it, and only its new tokens
    are read; with ``reread`` only rows that nothing was evicted from are used again. ``conversation`` names what
    ``Engine.save`` and ``Engine.kept`` are asked about later. ``speculate`` off leaves the engine's draft unused.
    ``timeout_s`` seconds after the submission RequestTimeoutError ends the request wherever it is.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    logprobs: int | None = None
    conversation: str | None = None
    reread: bool = False
    speculate: bool = True
    timeout_s: float | None = None
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
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise InvalidRequestError(f"the timeout is {self.timeout_s} s; it must be above 0")


@dataclass(frozen=True)
class GenerationStats:
    """Figures of one generation: times in seconds, sizes in bytes.

    ``prompt_seconds`` runs from the start of the prompt's computation to its logits, ``decode_seconds`` over the
    ``decode_steps`` after the first token (which the prompt's logits give), ``time_to_first_token_s`` from the
    submission. ``kv_bytes`` is what the cache takes after the prompt, ``kv_bytes_peak`` the most it took, and
    ``kv_bytes_full`` what the stock library takes for this context: without a budget all three are the whole context,
    which it allocates at once. ``kv_rows_per_layer`` are the rows in use after the prompt, ``evicted_rows`` the tokens
    seen less the rows held at the end, summed over the layers that have a budget (not those with a sliding window,
    which let go what no token sees any more); both per KV head.

    ``reused_tokens`` of the prompt's were there already and not read (a rate is of the others), ``queue_seconds``
    passed before it began. ``accepted_tokens`` of ``drafted_tokens`` that speculation proposed were the model's choice
    as well.
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
    reused_tokens: int = 0
    queue_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens read per second, those that were reused not counted."""
        read = self.prompt_tokens - self.reused_tokens
        return read / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens generated per second after the first; 0 when there was only one."""
        after = self.generated_tokens - 1
        return after / self.decode_seconds if self.decode_seconds > 0 and after > 0 else 0.0

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
class Embeddings:
    """Vectors of some texts: float32 of shape (texts, size), each of length 1; and the tokens that were read."""

    vectors: Any
    prompt_tokens: int


@dataclass(frozen=True)
class KeptRows:
    """What a conversation's rows are of.

    ``tokens`` are all that it has seen; ``budgets`` what each layer keeps of them after a prompt (0 for a layer with a
    sliding window: its latest rows), and ``positions`` of
    which of them it has rows: per layer an int32 array of shape (KV heads, rows), ascending. Without a KV budget every
    row is kept, and both are empty.
    """

    tokens: tuple[int, ...]
    budgets: tuple[int, ...]
    positions: tuple[Any, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded engine serves. ``n_ctx`` is per conversation, in tokens; sizes in bytes.

    ``parallel`` requests run at a time. ``kv_bytes`` is what the cache takes after prompts as long as the context.
    ``kv_unsupported`` says why the KV budget that was asked for is not used and every row is kept; None when it is
    used, or none was asked for. ``metadata`` are the file's single values by name. ``embedding_size`` is None where the
    engine makes no embeddings. ``chat_template`` is the template's source, None if the model has none.
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
    parallel: int = 1
    generates_text: bool = True
    embedding_size: int | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class SlotStats:
    """One sequence of the context: what it does (``idle``, ``reading`` or ``decoding``), and for whom.

    ``tokens`` it has seen, ``rows`` it holds over all layers, per KV head, as last counted, and about what they take in
    bytes; ``prompt_progress`` is the part of its prompt, 0.0 to 1.0, that was read while it reads.
    """

    state: str
    tokens: int
    rows: int
    kv_bytes: int = 0
    request_id: str | None = None
    conversation: str | None = None
    prompt_progress: float | None = None


@dataclass(frozen=True)
class EngineStats:
    """Counters since ``load``; cheap enough to read ten times a second.

    ``running`` requests have a sequence, ``queued`` ones wait for one, ``queue_limit`` of them at most.
    ``prompt_progress`` is the part of its prompt, 0.0 to 1.0, that the first of the running requests which read one has
    read; None when none does. Rates are of the last seconds in which there was something to do, all requests together.
    ``kv_bytes`` are those of the cache after prompts, ``kv_bytes_allocated`` with what reading takes, and
    ``kv_bytes_planned`` what the planner expected; all are allocated at ``load``. ``evicted_rows`` counts over the
    layers, per KV head.
    """

    loaded: bool = False
    running: int = 0
    queued: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    evicted_rows: int = 0
    kv_bytes: int = 0
    kv_bytes_allocated: int = 0
    kv_bytes_planned: int = 0
    queue_limit: int = 0
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    prompt_progress: float | None = None
    slots: tuple[SlotStats, ...] = ()


class Engine(Protocol):
    """Loads a model and generates text for any number of callers. Every method may be called from any thread."""

    def load(self) -> ModelInfo:
        """Load the model if it is not yet, and describe it. Blocks; Ctrl-C stops it. Raises ZigguratError."""
        ...

    def stream(self, request: GenerationRequest) -> EventStream[Event]:
        """Queue a request and return its events: TokenEvents, then one FinishEvent.

        What is wrong with the request itself (too long, unknown tokens, a template that refuses it) is raised here, and
        QueueFullError when too many wait; what goes wrong later is raised by the iterator.
        """
        ...

    def cancel(self, request_id: str) -> bool:
        """End a request at its next step with reason ``cancelled``. False if it is not queued or running."""
        ...

    def embed(self, texts: Sequence[str | Sequence[int]], *, wanted: Callable[[], bool] = lambda: True) -> Embeddings:
        """Return the embeddings of texts, or of their tokens, pooled as the model says.

        ``wanted`` is asked between batches of texts, in the engine's thread: once it says False nothing more is
        computed. Raises UnsupportedError where there are none, PromptTooLongError, TokenError and EngineError, which is
        also the end of what is not wanted.
        """
        ...

    def encode(self, request: GenerationRequest) -> list[int]:
        """Return the tokens of a request's prompt. Raises what ``stream`` raises about a prompt, but for its length."""
        ...

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the tokens of a text, with BOS and EOS as the model wants them or not; special ones recognized or not.

        Raises TokenError.
        """
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones as they are written. Raises TokenError."""
        ...

    def save(self, conversation: str, path: str | os.PathLike[str]) -> int:
        """Write the rows of a conversation that runs no request to a file; return its number of tokens.

        Raises ConversationError when the engine holds none of this name any more, and ZigguratError.
        """
        ...

    def restore(self, conversation: str, path: str | os.PathLike[str]) -> int:
        """Take up a conversation that was saved, so that its next prompt goes on from there; return its tokens.

        Raises StateFileError, its subclass StateMismatchError for another model or other settings, and
        ConversationError when no sequence is free.
        """
        ...

    def kept(self, conversation: str) -> KeptRows:
        """Tell what a conversation's rows are of. Raises ConversationError when the engine holds none of this name."""
        ...

    def stats(self) -> EngineStats:
        """Return the counters."""
        ...

    def close(self) -> None:
        """End all requests with EngineClosedError and free the model. Idempotent."""
        ...
