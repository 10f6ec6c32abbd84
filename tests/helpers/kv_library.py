"""The C interface of the KV budgets as its header says it, with nothing of the runtime in between.

The tests of the library go through here, so that a fault of the runtime's bindings cannot hide one of the library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from helpers.stock import Gguf

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
SCORES = ("snapkv", "recent", "random", "tova", "keydiff", "h2o")
PREFILLS = ("exact", "bounded", "chunked", "lane")
POOLS = ("avg", "max")


class Refused(Exception):
    """The library said no; the text is its reason."""


class Aborted(Exception):
    """The abort callback stopped the computation."""


class _Params(ctypes.Structure):
    """``struct ziggurat_kv_params``."""

    _fields_ = [
        ("n_layer", ctypes.c_uint32),
        ("rows", ctypes.POINTER(ctypes.c_uint32)),
        ("window", ctypes.c_uint32),
        ("sinks", ctypes.c_uint32),
        ("pool", ctypes.c_uint32),
        ("pool_type", ctypes.c_int32),
        ("slack", ctypes.c_uint32),
        ("score", ctypes.c_int32),
        ("prefill", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("n_reading", ctypes.c_uint32),
        ("n_copies", ctypes.c_uint32),
    ]


class Layout(ctypes.Structure):
    """``struct ziggurat_kv_layout``."""

    _fields_ = [
        ("rows_bytes", ctypes.c_uint64),
        ("position_bytes", ctypes.c_uint64),
        ("query_bytes", ctypes.c_uint64),
        ("sum_bytes", ctypes.c_uint64),
        ("copy_bytes", ctypes.c_uint64),
        ("stage_bytes", ctypes.c_uint64),
        ("hidden_bytes", ctypes.c_uint64),
        ("stage_rows", ctypes.c_uint32),
        ("layer_major", ctypes.c_uint32),
    ]


class Progress(ctypes.Structure):
    """``struct ziggurat_kv_progress``."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("steps_done", "steps", "tokens", "finished")]


@dataclass(frozen=True)
class Budget:
    """``struct ziggurat_kv_params`` with small defaults, so that short prompts are evicted."""

    rows: tuple[int, ...]
    window: int = 8
    sinks: int = 2
    pool: int = 5
    pool_type: str = "avg"
    slack: int = 8
    score: str = "snapkv"
    prefill: str = "exact"
    seed: int = 0
    n_reading: int = 1
    n_copies: int | None = None  # as many

    def native(self) -> _Params:
        return _Params(
            len(self.rows), _array(self.rows), self.window, self.sinks, self.pool, POOLS.index(self.pool_type),
            self.slack, SCORES.index(self.score), PREFILLS.index(self.prefill), self.seed, self.n_reading,
            self.n_reading if self.n_copies is None else self.n_copies,
        )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one sequence in a batch, from `start` on, or from after its last position."""

    sequence: int
    tokens: Sequence[int]
    start: int | None = None


def _array(values: Sequence[int]) -> Any:
    return (ctypes.c_uint32 * len(values))(*values)


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = llama_cpp.llama_cpp._lib[name]  # an attribute is shared with the bindings under test
    function.restype, function.argtypes = result, list(arguments)
    return function


class BudgetModel(Gguf):
    """A loaded GGUF that makes contexts with and without a budget. Close them before it."""

    def __enter__(self) -> BudgetModel:
        return self

    @property
    def unsupported(self) -> str | None:
        """Why this model cannot have a budget."""
        reason = _function("ziggurat_kv_unsupported", ctypes.c_char_p, ctypes.c_void_p)(self._model)
        return None if reason is None else reason.decode()

    def context(self, n_ctx: int, budget: Budget | None = None, **options: Any) -> BudgetContext:
        """Make a context of `n_ctx` rows for each sequence; for the options see `BudgetContext`."""
        return BudgetContext(self._model, self.vocab_size, n_ctx, budget, **options)


class BudgetContext:
    """A context. `types`: of K and V; `ubatch` None: as large as a whole batch; `batch` None: all sequences' rows.

    `unified`: sequences share rows, and a row can be of several (without a budget only).
    """

    def __init__(
        self,
        model: Any,
        vocab_size: int,
        n_ctx: int,
        budget: Budget | None,
        *,
        n_seq: int = 1,
        ubatch: int | None = None,
        batch: int | None = None,
        flash: bool = False,
        types: tuple[str, str] = ("f32", "f32"),
        threads: int = 1,
        unified: bool = False,
        abort: Callable[[], bool] | None = None,
    ) -> None:
        self.n_seq, self._vocab_size = n_seq, vocab_size
        p = llama_cpp.llama_context_default_params()
        p.n_ctx = -(-n_ctx // 256) * 256 * n_seq
        p.n_batch = batch or p.n_ctx
        p.n_ubatch = ubatch or p.n_batch
        p.n_seq_max, p.kv_unified = n_seq, unified
        p.swa_full = False  # without a budget layers with a sliding window bound their rows as well
        p.n_threads = p.n_threads_batch = threads
        p.type_k, p.type_v = (TYPES[name] for name in types)
        enabled, disabled = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.flash_attn_type = enabled if flash else disabled
        self._abort = llama_cpp.ggml_abort_callback(lambda _: abort() if abort else False)
        p.abort_callback = self._abort
        native = budget.native() if budget else None
        if native is not None:
            p.kv_budget = ctypes.addressof(native)
        self._context = llama_cpp.llama_init_from_model(model, p)
        if not self._context:
            raise Refused(f"no context for {budget}")
        self._memory = llama_cpp.llama_get_memory(self._context)

    def close(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
        self._context = None

    def __enter__(self) -> BudgetContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def handle(self) -> Any:
        return self._context

    def decode(self, *parts: Part, every: bool = False) -> list[Floats]:
        """Compute a batch of parts; return each part's logits, (1, vocabulary), or after every token.

        A part that stands twice, or interleaved with others, is several parts.
        """
        total = sum(len(part.tokens) for part in parts)
        batch = llama_cpp.llama_batch_init(max(total, 1), 0, 1)
        wanted: list[list[int]] = []
        ends: dict[int, int] = {}
        index = 0
        for part in parts:
            start = ends.get(part.sequence, self.last(part.sequence) + 1) if part.start is None else part.start
            asked = range(index if every else index + len(part.tokens) - 1, index + len(part.tokens))
            wanted.append(list(asked))
            for offset, token in enumerate(part.tokens):
                batch.token[index], batch.pos[index] = token, start + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, part.sequence
                batch.logits[index] = index in asked
                index += 1
            ends[part.sequence] = start + len(part.tokens)
        batch.n_tokens = total
        try:
            status = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status == 1:
            raise Refused(self.refusal or "status 1 without a reason")
        if status == 2:
            raise Aborted
        if status:
            raise RuntimeError(f"llama_decode returns {status}")
        return [self._logits(indices) for indices in wanted]

    def _logits(self, indices: Sequence[int]) -> Floats:
        rows = [llama_cpp.llama_get_logits_ith(self._context, index) for index in indices]
        return np.stack([np.ctypeslib.as_array(row, (self._vocab_size,)).copy() for row in rows])

    def read(self, tokens: Sequence[int], sequence: int = 0, *, every: bool = False) -> Floats:
        """Decode tokens of one sequence in one call; return the logits after the last, or after each."""
        return self.decode(Part(sequence, tokens), every=every)[0]

    def last(self, sequence: int = 0) -> int:
        """The largest position of a sequence, -1 when it is empty."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, sequence))

    def remove(self, sequence: int, start: int = -1, end: int = -1) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, end))

    def copy(self, source: int, target: int, start: int = -1, end: int = -1) -> None:
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, start, end)
        if self.refusal:
            raise Refused(self.refusal)

    def shift(self, sequence: int, start: int, end: int, by: int) -> None:
        llama_cpp.llama_memory_seq_add(self._memory, sequence, start, end, by)

    def divide(self, sequence: int, start: int, end: int, by: int) -> None:
        llama_cpp.llama_memory_seq_div(self._memory, sequence, start, end, by)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)

    @property
    def can_shift(self) -> bool:
        return bool(llama_cpp.llama_memory_can_shift(self._memory))

    def saved(self, sequence: int | None = None) -> bytes:
        """The state of one sequence, or of everything."""
        c, whole = self._context, sequence is None
        size = llama_cpp.llama_state_get_size(c) if whole else llama_cpp.llama_state_seq_get_size(c, sequence)
        data = (ctypes.c_uint8 * max(size, 1))()
        written = (
            llama_cpp.llama_state_get_data(c, data, size)
            if whole
            else llama_cpp.llama_state_seq_get_data(c, data, size, sequence)
        )
        if not written:
            raise Refused(f"no state of sequence {sequence}")
        assert written == size
        return bytes(data)

    def restore(self, state: bytes, sequence: int | None = None) -> None:
        """Put a sequence, or everything, into a saved state."""
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if sequence is None:
            read = llama_cpp.llama_state_set_data(self._context, data, len(state))
        else:
            read = llama_cpp.llama_state_seq_set_data(self._context, data, len(state), sequence)
        if not read:
            raise Refused(self.refusal)
        assert read == len(state)

    @property
    def active(self) -> bool:
        return bool(_function("ziggurat_kv_active", ctypes.c_bool, ctypes.c_void_p)(self._context))

    @property
    def refusal(self) -> str:
        text = _function("ziggurat_kv_refusal", ctypes.c_char_p, ctypes.c_void_p)(self._context)
        return (text or b"").decode()

    def layout(self) -> Layout | None:
        layout = Layout()
        get = _function("ziggurat_kv_get_layout", ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(Layout))
        return None if get(self._context, layout) < 0 else layout

    def capacity(self) -> tuple[int, ...]:
        """Rows allocated in each layer, for each sequence; empty without a budget."""
        call = _function("ziggurat_kv_capacity", ctypes.c_int32, *[ctypes.c_void_p] * 2, ctypes.c_size_t)
        return self._counts(lambda values, n: call(self._context, values, n))

    def rows(self, sequence: int = 0) -> tuple[int, ...]:
        """Rows in use in each layer; empty without a budget and for a sequence that is none."""
        call = _function(
            "ziggurat_kv_rows", ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t
        )
        return self._counts(lambda values, n: call(self._context, sequence, values, n))

    def _counts(self, call: Callable[[Any, int], int]) -> tuple[int, ...]:
        values = (ctypes.c_uint32 * 256)()
        return tuple(values[: max(call(values, 256), 0)])

    def positions(self, layer: int, sequence: int = 0) -> Ints:
        """Positions of a layer's rows, (KV heads, rows)."""
        call = _function(
            "ziggurat_kv_positions", ctypes.c_int32,
            ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t,
        )  # fmt: skip
        count = call(self._context, sequence, layer, None, 0)
        if count < 0:
            raise Refused(f"no positions of sequence {sequence}, layer {layer}")
        values = np.full(count, -1, np.int32)
        call(self._context, sequence, layer, values.ctypes.data, count)
        rows = self.rows(sequence)[layer]
        return values.reshape(-1, rows) if rows else values.reshape(0, 0)

    def kept(self, sequence: int = 0) -> list[Ints]:
        """Positions of every layer's rows."""
        return [self.positions(layer, sequence) for layer in range(len(self.rows(sequence)))]

    def set_budget(self, sequence: int, rows: Sequence[int] | None) -> int:
        call = _function(
            "ziggurat_kv_set_budget", ctypes.c_int32,
            ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_uint32), ctypes.c_size_t,
        )  # fmt: skip
        return int(call(self._context, sequence, None if rows is None else _array(rows), len(rows or ())))

    def set_step(self, n: int) -> int:
        """Let up to n tokens of a sequence in a batch be a decoding step; return the status."""
        return int(_function("ziggurat_kv_set_step", ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint32)(
            self._context, n))  # fmt: skip

    def removable_from(self, sequence: int = 0) -> int:
        """The first position from which on the end can be removed."""
        return int(_function("ziggurat_kv_removable_from", ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32)(
            self._context, sequence))  # fmt: skip

    def select(self, sequence: int = 0) -> int:
        """Select now; return the number of layers that were brought down."""
        return int(_function("ziggurat_kv_select", ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32)(
            self._context, sequence))  # fmt: skip

    def begin(self, tokens: Sequence[int], sequence: int = 0) -> None:
        """Make ready to read a prompt in steps."""
        call = _function(
            "ziggurat_kv_prompt_begin", ctypes.c_int32,
            ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_size_t,
        )  # fmt: skip
        if call(self._context, sequence, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens)):
            raise Refused(self.refusal or "no reason")

    def step(self, sequence: int = 0, steps: int = 1) -> Progress:
        """Compute steps of a prompt."""
        progress = Progress()
        call = _function(
            "ziggurat_kv_prompt_step", ctypes.c_int32,
            ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.POINTER(Progress),
        )  # fmt: skip
        status = call(self._context, sequence, steps, progress)
        if status == -1:
            raise Refused(self.refusal or "no reason")
        if status == 2:
            raise Aborted
        if status:
            raise RuntimeError(f"ziggurat_kv_prompt_step returns {status}")
        return progress

    def cancel(self, sequence: int = 0) -> bool:
        """Give the prompt up; False if none is being read."""
        call = _function("ziggurat_kv_prompt_cancel", ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32)
        return bool(call(self._context, sequence) == 0)

    def read_in_steps(
        self, tokens: Sequence[int], sequence: int = 0, steps: int = 1, between: Callable[[int], object] | None = None
    ) -> Floats:
        """Read a prompt in steps; return the logits after it. `between` is called with the steps that are done."""
        self.begin(tokens, sequence)
        while not (progress := self.step(sequence, steps)).finished:
            if between is not None:
                between(progress.steps_done)
        return self._logits([-1])

    def fail_at(self, n: int) -> None:
        """Let the n-th allocation or computation of a graph from now on fail; negative: none."""
        _function("ziggurat_kv_test_fail_at", ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64)(self._context, n)
