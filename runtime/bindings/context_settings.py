"""How a context is made: its settings, and the library's struct filled with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ziggurat.runtime.bindings import kv
from ziggurat.runtime.bindings.kv_settings import KVSettings
from ziggurat.runtime.errors import InvalidRequestError

#: ggml type ids of the KV row types the library has attention kernels for everywhere; f32 is for exact comparisons.
CACHE_TYPES = {"f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "f32": 0}
_UNBLOCKED = ("f16", "bf16", "f32")
#: What ``ContextSettings.flash_attention`` may be; auto takes it where the device supports it.
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
#: How a context for embeddings may make one vector of a text; model: as its file says.
POOLINGS = {"model": -1, "mean": 1, "cls": 2, "last": 3}
#: KV rows a context can have, all sequences together.
MAX_ROWS = 2**31 - 1024


@dataclass(frozen=True)
class ContextSettings:
    """How a context is made.

    ``n_ctx`` is the number of KV rows **per sequence** (never divided by ``n_seq_max``; the library rounds it up to a
    multiple of 256). ``n_batch`` bounds a batch (never to less than one token of every sequence), ``n_ubatch`` what is
    computed at once; both in tokens. ``type_k`` and ``type_v`` are keys of ``CACHE_TYPES``. ``n_threads`` computes
    single tokens, ``n_threads_batch`` (default: the same) prompts. ``swa_full`` keeps whole-context rows in
    sliding-window layers as well. ``kv`` bounds the rows that stay of a prompt: ``n_ctx`` then bounds the prompt alone,
    and ``n_batch`` is raised to it unless prompts are read in chunks, so that a whole one can be a batch.

    ``n_step`` tokens of a sequence at most are decoded at a time; see ``Context.set_step``.

    ``pooling``, a key of ``POOLINGS``, makes a context for embeddings, whose sequences share ``n_ctx`` rows: what a
    batch gives is a vector for each of its sequences, right if all its tokens are computed at once.
    """

    n_ctx: int
    n_batch: int = 2048
    n_ubatch: int = 512
    n_seq_max: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: str = "auto"
    n_threads: int = 4
    n_threads_batch: int | None = None
    swa_full: bool = False
    kv: KVSettings | None = None
    n_step: int = 1
    pooling: str | None = None

    def __post_init__(self) -> None:
        if self.kv is not None and self.kv.prefill != "chunked" and self.n_batch < self.n_ctx:
            object.__setattr__(self, "n_batch", self.n_ctx)
        for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads", "n_step"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("n_batch", "n_ubatch"):
            if getattr(self, name) > MAX_ROWS:  # the library's fields have 32 bits: 2^32 + 1 would arrive as 1
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; it can be at most {MAX_ROWS}")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise InvalidRequestError(f"pooling {self.pooling!r} is unknown; take one of {', '.join(POOLINGS)}")
        if self.n_ctx * self.n_streams > MAX_ROWS:
            raise InvalidRequestError(f"a context of {self.n_ctx} x {self.n_streams} rows is beyond {MAX_ROWS}")
        for name in (self.type_k, self.type_v):
            if name not in CACHE_TYPES:
                raise InvalidRequestError(f"cache type {name!r} is unknown; take one of {', '.join(CACHE_TYPES)}")
        if self.flash_attention not in FLASH_ATTENTION:
            raise InvalidRequestError(f"flash attention is auto, on or off, not {self.flash_attention!r}")
        if self.flash_attention == "off" and self.type_v not in _UNBLOCKED:
            raise InvalidRequestError(
                f"cache type {self.type_v} for V needs flash attention; turn it on or keep V in f16"
            )

    @property
    def n_streams(self) -> int:
        """How many times ``n_ctx`` rows there are: for each sequence, or once for those that share them."""
        return self.n_seq_max if self.pooling is None else 1


def fill(params: Any, settings: ContextSettings) -> object:
    """Write the settings into the library's struct, whose layout is llama_cpp's, which ships with the library.

    What is returned has to live until the context is made: the struct points into it.
    """
    params.n_ctx = _padded(settings.n_ctx) * settings.n_streams
    # the library reserves one output for every sequence, and aborts the process when a batch has no room for them
    params.n_batch = max(settings.n_batch, settings.n_seq_max)
    params.n_ubatch = min(settings.n_ubatch, settings.n_batch)
    params.n_seq_max = settings.n_seq_max
    params.n_threads = settings.n_threads
    params.n_threads_batch = settings.n_threads_batch or settings.n_threads
    params.type_k = CACHE_TYPES[settings.type_k]
    params.type_v = CACHE_TYPES[settings.type_v]
    params.flash_attn_type = FLASH_ATTENTION[settings.flash_attention]
    params.swa_full = settings.swa_full
    # Above 1 the library's samplers draw anew when a batch that was aborted is computed again, instead of going on.
    params.n_outputs_max_per_seq = 2
    params.kv_unified = params.embeddings = settings.pooling is not None
    params.pooling_type = POOLINGS[settings.pooling or "model"]
    params.no_perf = True
    return kv.fill(params, settings.kv) if settings.kv is not None else None


def _padded(rows: int) -> int:
    # as the library does per sequence; done here so that its division by n_seq_max leaves no remainder
    return -(-rows // 256) * 256
