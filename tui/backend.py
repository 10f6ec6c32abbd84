"""What the chat needs of whoever runs the model: requests in, typed events out.

``Backend`` is the only thing that the session and the screens know of a server; ``Host`` starts models on this machine.
Their tests pass scripted ones. Everything here is frozen data or a protocol: no I/O, no widget.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ziggurat.tui.kept import Kept

Role = Literal["system", "user", "assistant"]

#: Why an answer ended: by itself, at the token limit or a full context, or because the person stopped it.
DoneReason = Literal["stop", "length", "cancelled"]

#: What an error is about, for screens that offer something: nobody answers, the server still loads, it has too much to
#: do, it does not know the API key, the conversation is too long, the request is refused, the server failed, or what it
#: answered makes no sense.
ErrorKind = Literal["lost", "loading", "busy", "key", "too_long", "refused", "failed", "nonsense"]


class BackendError(Exception):
    """A failure that a person can be told in one line: what happened, and what to do about it.

    ``retryable`` says that the same request may succeed later without any change, ``retry_after_s`` when, as far as
    the server has told; ``load_progress`` is the part of the model that a server which loads it has, 0.0 to 1.0.
    """

    def __init__(
        self,
        message: str,
        remedy: str = "",
        *,
        kind: ErrorKind = "failed",
        retryable: bool = False,
        retry_after_s: float | None = None,
        load_progress: float | None = None,
    ) -> None:
        super().__init__(f"{message}: {remedy}" if remedy else message)
        self.message, self.remedy, self.kind = message, remedy, kind
        self.retryable, self.retry_after_s = retryable, retry_after_s
        self.load_progress = load_progress


@dataclass(frozen=True)
class ChatMessage:
    """One turn, as it goes to the model."""

    role: Role
    content: str


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; None leaves it to the server. ``max_tokens`` is of one answer."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """What to answer. ``conversation`` names whose rows the engine holds, for ``Backend.kept``, ``save``, ``restore``.

    ``reread`` has the whole conversation read again instead of going on with the rows that were kept of it.
    """

    messages: tuple[ChatMessage, ...]
    sampling: Sampling = Sampling()
    conversation: str | None = None
    reread: bool = False


@dataclass(frozen=True)
class Progress:
    """How much of the prompt was read, 0.0 to 1.0, and at how many tokens per second (0.0 while unknown)."""

    fraction: float
    tokens_per_second: float


@dataclass(frozen=True)
class Delta:
    """New text of the answer, which took about so many tokens. ``thought``: the model's thinking, not its answer."""

    text: str
    tokens: int = 1
    thought: bool = False


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: ``reused_tokens`` of the prompt's were not read anew."""

    prompt_tokens: int
    generated_tokens: int
    reused_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Figures that only a server of ours tells: rates in tokens per second, sizes in bytes."""

    time_to_first_token_s: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    queue_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    evicted_rows: int = 0


@dataclass(frozen=True)
class Done:
    """The last event of every answer that did not fail. What the server does not tell is None."""

    reason: DoneReason
    usage: Usage | None = None
    timings: Timings | None = None


ChatEvent = Progress | Delta | Done


@dataclass(frozen=True)
class Status:
    """What is served and what it does now; cheap enough to ask a few times a second. Sizes in bytes, 0 for unknown.

    ``ours``: the server is of this project, and tells what follows it here. ``n_ctx`` is None where unknown.
    ``kv_bytes`` is what the cache takes after prompts, ``kv_bytes_full`` what keeping every row would take,
    ``kv_bytes_planned`` what was planned. ``kv_refused`` says why a budget that was asked for is not used.
    ``process_bytes`` and ``gpu_bytes`` are those of a server on this machine that the chat started.
    """

    model: str
    ours: bool = False
    description: str = ""
    n_ctx: int | None = None
    n_ctx_train: int | None = None
    n_layer: int | None = None
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    kv_bytes_planned: int = 0
    kv_refused: str | None = None
    prompt_progress: float | None = None
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    running: int = 0
    queued: int = 0
    process_bytes: int = 0
    gpu_bytes: int = 0


class Backend(Protocol):
    """Answers chats, one at a time. All methods raise BackendError for what went wrong, and nothing else."""

    def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Return the answer's events: Progress, then Deltas, then one Done. Closing it early ends the request."""
        ...

    async def stop(self) -> None:
        """End the running answer at once: its events end with Done("cancelled"). Nothing if none runs."""
        ...

    async def status(self) -> Status:
        """Tell what is served."""
        ...

    async def models(self) -> tuple[str, ...]:
        """Return the names that the server answers to."""
        ...

    async def kept(self, conversation: str) -> Kept | None:
        """Tell which rows of a conversation are held; None where the server cannot tell or holds none of this name."""
        ...

    async def text(self, tokens: Sequence[int]) -> str | None:
        """Return the text of tokens; None where the server cannot."""
        ...

    async def count(self, text: str) -> int | None:
        """Return the number of tokens of a text; None where the server cannot tell."""
        ...

    async def save(self, conversation: str) -> bool:
        """Keep a conversation's rows beyond the server's end; False where that is not possible."""
        ...

    async def restore(self, conversation: str) -> bool:
        """Take up the rows that ``save`` kept; False where there are none that fit."""
        ...

    async def close(self) -> None:
        """End the running answer, and the server as well if the chat started it. Idempotent."""
        ...


@dataclass(frozen=True)
class ModelSetup:
    """A model on this machine and what to run it with; None leaves it to the server. Fields as the options of serve.

    ``extra`` are further options of ``ziggurat serve`` as they stand on a command line.
    """

    path: Path
    ctx: int | None = None
    kv_budget: str | None = None
    kv_policy: str | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    gpu_layers: int | None = None
    threads: int | None = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """Bytes that a setup takes. ``kv_full`` is what keeping every row would take, ``free`` what the machine has.

    ``rows`` are those that each layer keeps of a prompt as long as the context, empty without a budget. ``shortage``
    says why it will not fit, None if it will.
    """

    total: int
    weights: int
    kv: int
    kv_full: int
    free: int
    n_ctx: int
    rows: tuple[int, ...] = ()
    shortage: str | None = None


@dataclass(frozen=True)
class ModelFile:
    """A GGUF on this machine. ``trouble`` says why it cannot be used, None if it can; sizes in bytes."""

    path: Path
    size: int
    architecture: str = ""
    file_type: str = ""
    n_params: int = 0
    n_ctx_train: int = 0
    kv: int = 0
    total: int = 0
    trouble: str | None = None


@dataclass(frozen=True)
class Loading:
    """How the start of a model goes on: what is done, and the part of it that is, None while that is unknown."""

    message: str
    fraction: float | None = None


class Host(Protocol):
    """Runs models of this machine, one at a time, each in a process of its own. Raises BackendError."""

    async def plan(self, setup: ModelSetup) -> Planned:
        """Tell what a setup takes, before anything is loaded."""
        ...

    async def load(self, setup: ModelSetup, tell: Callable[[Loading], None]) -> Backend:
        """End what runs and start this instead. What does not fit is refused before. Cancelling ends the start."""
        ...

    async def models(self) -> tuple[ModelFile, ...]:
        """List the models of the configured folders, by name."""
        ...

    async def close(self) -> None:
        """End what runs. Idempotent."""
        ...
