"""What can be chosen when a model is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from ziggurat.runtime.bindings import ContextSettings
from ziggurat.runtime.engine.speculation import MAX_DRAFT
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.hardware import default_threads
from ziggurat.runtime.kv_policy import LANES, KVPolicy
from ziggurat.runtime.lora import LoraAdapter

#: Context taken when none is asked for: the model's own, but no more than this.
DEFAULT_CTX = 8192
#: Sequences that a context can have.
MAX_SEQUENCES = 256


@dataclass(frozen=True)
class EngineSettings:
    """How an engine loads its model.

    ``n_ctx`` is per conversation, in tokens; None takes the trained context up to ``DEFAULT_CTX``. ``n_ubatch`` tokens
    are computed at once. ``type_k`` and ``type_v`` are the KV row types (f16, bf16, q8_0, q4_0). ``threads`` None takes
    the physical cores, ``gpu_layers`` None all that the device can hold. ``kv`` bounds the rows that stay of a prompt;
    None keeps all.

    ``parallel`` requests run at a time, and ``cached`` sequences beside theirs hold what earlier ones left, to be
    continued or begun with; ``queue_limit`` more requests may wait. While prompts are read, the time between two tokens
    of the others may be ``gap`` times what it is undisturbed, and one piece of reading. ``one_shot`` is for single
    prompts: the cache is made for each one's length, and nothing of it is used again. ``loras`` are adapters that are
    applied to all that is computed. ``embeddings`` makes a context for them as well, with ``pooling`` mean, cls or last
    where that is not left to the model's file.

    A ``draft_model`` of the same vocabulary proposes up to ``draft_max`` tokens (1 to 15) at a time, and before it, or
    alone, ``prompt_lookup`` what followed the last tokens when they occurred before.
    """

    n_ctx: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: str = "auto"
    threads: int | None = None
    gpu_layers: int | None = None
    kv: KVPolicy | None = None
    parallel: int = 1
    cached: int = 0
    queue_limit: int = 64
    gap: float = 3.0
    one_shot: bool = False
    loras: tuple[LoraAdapter, ...] = ()
    draft_model: str | os.PathLike[str] | None = None
    draft_max: int = 8
    prompt_lookup: bool = False
    embeddings: bool = False
    pooling: str | None = None

    def __post_init__(self) -> None:
        for name in ("n_ctx", "n_batch", "n_ubatch", "threads", "parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} is {value}; it must be at least 1")
        if self.gpu_layers is not None and self.gpu_layers < 0:
            raise InvalidRequestError(f"gpu_layers is {self.gpu_layers}; it must be 0 or more")
        for name in ("cached", "queue_limit"):
            if getattr(self, name) < 0:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.parallel + self.cached > MAX_SEQUENCES:
            raise InvalidRequestError(
                f"parallel and cached are {self.parallel} and {self.cached}; together they can be {MAX_SEQUENCES}"
            )
        if not 1 <= self.draft_max <= MAX_DRAFT:
            raise InvalidRequestError(f"draft_max is {self.draft_max}; it must be from 1 to {MAX_DRAFT}")
        if not 1 < self.gap <= 1000:
            raise InvalidRequestError(f"the gap is {self.gap}; it must be above 1 and at most 1000")
        if self.one_shot and (self.parallel, self.cached) != (1, 0):
            raise InvalidRequestError("an engine for single prompts runs one at a time and keeps nothing")
        if self.pooling is not None and not self.embeddings:
            raise InvalidRequestError(f"pooling {self.pooling} is for embeddings, which were not asked for")

    @property
    def lanes(self) -> int:
        """Prompts that are read at a time."""
        return min(LANES, self.parallel) if self.kv is None else self.kv.lanes(self.parallel)

    def with_lanes(self) -> EngineSettings:
        """Return the settings with what ``kv`` leaves to how many requests run, which it says itself then."""
        if self.kv is None:
            return self
        # with one shot every prompt begins with an empty cache
        return replace(self, kv=replace(self.kv, reading=self.lanes, copies=0 if self.one_shot else None))

    def ctx_of(self, n_ctx_train: int) -> int:
        """Return the context of a conversation for a model trained with one of so many tokens (0: unknown)."""
        return self.n_ctx or min(n_ctx_train or DEFAULT_CTX, DEFAULT_CTX)

    def context(self, n_ctx: int) -> ContextSettings:
        """Return what a context is made with, but for its budget."""
        return ContextSettings(
            n_ctx=n_ctx,
            n_batch=self.n_batch,
            n_ubatch=self.n_ubatch,
            n_seq_max=self.parallel + self.cached,
            type_k=self.type_k,
            type_v=self.type_v,
            flash_attention=self.flash_attention,
            n_threads=self.threads or default_threads(),
            n_step=1 + self.draft_max if self.prompt_lookup or self.draft_model is not None else 1,
        )
