"""KV budgets: a bounded number of rows per layer, as the patched library keeps them.

Mirrors ``ziggurat-kv.h``. A stock library has none of it: ``available`` says so, and everything else raises
LibraryError with the remedy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ziggurat.runtime.bindings import library
from ziggurat.runtime.bindings.kv_settings import POOLS, PREFILLS, SCORES, KVLayout, KVSettings, Progress
from ziggurat.runtime.errors import ContextError, DecodeAborted, DecodeError, InvalidRequestError, LibraryError

if TYPE_CHECKING:
    from ziggurat.runtime.bindings.model import Model

#: Most tokens of a decoding step: so many can be removed again with the next selection's queries still there.
MAX_STEP = 16
_FIELD = "kv_budget"
_FAILED, _ABORTED = -2, 2


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


class _Layout(ctypes.Structure):
    """``struct ziggurat_kv_layout``."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("rows", "positions", "queries", "sums", "copies", "stage", "hidden")),
        ("stage_rows", ctypes.c_uint32),
        ("layer_major", ctypes.c_uint32),
    ]


class _Progress(ctypes.Structure):
    """``struct ziggurat_kv_progress``."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("steps_done", "steps", "tokens", "finished")]


def available() -> bool:
    """Whether the library has budgets: it is installed, patched, and recent enough. Never raises."""
    try:
        return _has_budgets(library.api())
    except LibraryError:
        return False


def takes_samplers() -> bool:
    """Whether samplers may be in a graph that is cut into layers; before ziggurat.5 they read what was never set."""
    version = library.probe().ziggurat_version or ""
    number = version.rpartition(".")[2]
    return number.isdecimal() and int(number) >= 5


def require() -> None:
    """Raise LibraryError, with the remedy in it, unless the library has budgets."""
    _functions()


def _has_budgets(lib: Any) -> bool:
    # the field as well: the struct travels by value, and a binding without it would pass too short a one
    return hasattr(lib._lib, "ziggurat_kv_windows") and hasattr(lib.llama_context_default_params(), _FIELD)


@lru_cache(maxsize=1)
def _functions() -> dict[str, Any]:
    lib = library.api()
    if not _has_budgets(lib):
        raise LibraryError(f"this llama.cpp keeps every KV row: {library.PATCHED_REMEDY}")
    pointer, i32, size, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t, ctypes.c_char_p
    u32s, i32s = ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_int32)
    signatures: dict[str, tuple[Any, ...]] = {
        "unsupported": (text, pointer),
        "windows": (i32, pointer, u32s, size),
        "active": (ctypes.c_bool, pointer),
        "refusal": (text, pointer),
        "get_layout": (i32, pointer, ctypes.POINTER(_Layout)),
        "capacity": (i32, pointer, u32s, size),
        "rows": (i32, pointer, i32, u32s, size),
        "positions": (i32, pointer, i32, i32, i32s, size),
        "set_budget": (i32, pointer, i32, u32s, size),
        "select": (i32, pointer, i32),
        "set_step": (i32, pointer, ctypes.c_uint32),
        "removable_from": (i32, pointer, i32),
        "prompt_begin": (i32, pointer, i32, i32s, size),
        "prompt_step": (i32, pointer, i32, ctypes.c_uint32, ctypes.POINTER(_Progress)),
        "prompt_cancel": (i32, pointer, i32),
    }
    return {name: library.function(lib, f"ziggurat_kv_{name}", *types) for name, types in signatures.items()}


def unsupported(model: Model) -> str | None:
    """Return why a model cannot have a budget, None if it can. Raises LibraryError with a stock library."""
    reason: bytes | None = _functions()["unsupported"](model.handle)
    return None if reason is None else library.text(reason)


def windows(model: Model) -> tuple[int, ...]:
    """Return the sliding window of each layer in tokens, 0 for the layers that see everything.

    Only the latter can have a budget. Raises LibraryError with a stock library.
    """
    found = (ctypes.c_uint32 * model.n_layer)()
    count = _functions()["windows"](model.handle, found, model.n_layer)
    if count != model.n_layer:
        raise LibraryError(f"the library counts the windows of {count} layers, the model has {model.n_layer}")
    return tuple(found)


def fill(params: Any, settings: KVSettings) -> object:
    """Point the context parameters at a budget; what is returned has to live until the context is made.

    Raises LibraryError with a stock library.
    """
    require()
    rows = (ctypes.c_uint32 * len(settings.rows))(*settings.rows)
    native = _Params(
        n_layer=len(settings.rows),
        rows=rows,
        window=settings.window,
        sinks=settings.sinks,
        pool=settings.pool,
        pool_type=POOLS[settings.pool_type],
        slack=settings.slack,
        score=SCORES[settings.score],
        prefill=PREFILLS[settings.prefill],
        seed=settings.seed,
        n_reading=settings.n_reading,
        n_copies=settings.copies,
    )
    setattr(params, _FIELD, ctypes.addressof(native))
    return native, rows


class Cache:
    """What a context with a budget can be asked and told. ``handle`` is its own."""

    def __init__(self, handle: Any, n_layer: int) -> None:
        self._handle, self._n_layer = handle, n_layer
        self._call = _functions()

    @property
    def active(self) -> bool:
        """Whether the context got the budget; False when the model cannot have one."""
        return bool(self._call["active"](self._handle))

    def refusal(self) -> str:
        """Why the last call on the cache was refused; empty when it was not."""
        return library.text(self._call["refusal"](self._handle))

    def layout(self) -> KVLayout:
        """What is allocated."""
        found = _Layout()
        if self._call["get_layout"](self._handle, ctypes.byref(found)) < 0:
            raise LibraryError("the library does not say what the KV budget takes")
        return KVLayout(
            rows_bytes=found.rows,
            position_bytes=found.positions,
            query_bytes=found.queries,
            sum_bytes=found.sums,
            copy_bytes=found.copies,
            stage_bytes=found.stage,
            hidden_bytes=found.hidden,
            stage_rows=found.stage_rows,
            layer_major=bool(found.layer_major),
        )

    def capacity(self) -> tuple[int, ...]:
        """Rows allocated per layer and sequence."""
        return self._per_layer("capacity")

    def rows(self, sequence: int) -> tuple[int, ...]:
        """Rows in use per layer."""
        return self._per_layer("rows", sequence)

    def _per_layer(self, name: str, *arguments: int) -> tuple[int, ...]:
        rows = (ctypes.c_uint32 * self._n_layer)()
        count = self._call[name](self._handle, *arguments, rows, self._n_layer)
        if count != self._n_layer:
            raise LibraryError(f"the library counts the KV {name} of {count} layers, the model has {self._n_layer}")
        return tuple(rows)

    def positions(self, sequence: int, layer: int) -> Any:
        """Positions of the rows of one layer, ascending: int32 of shape (KV heads, rows in use)."""
        import numpy as np

        count = self._call["positions"](self._handle, sequence, layer, None, 0)
        if count < 0:
            raise InvalidRequestError(f"sequence {sequence} has no layer {layer} whose rows could be told")
        found = np.empty(count, np.int32)
        pointer = found.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        if self._call["positions"](self._handle, sequence, layer, pointer, count) != count:
            raise LibraryError(f"the library does not say which rows layer {layer} keeps")
        return found.reshape(-1, max(1, self.rows(sequence)[layer]))

    def set_budget(self, sequence: int, rows: Sequence[int] | None) -> None:
        """Give one sequence a budget of its own, None for the context's again."""
        array = None if rows is None else (ctypes.c_uint32 * len(rows))(*rows)
        status = self._call["set_budget"](self._handle, sequence, array, 0 if rows is None else len(rows))
        if status != 0:
            raise InvalidRequestError(self.refusal() or f"sequence {sequence} cannot have the budget {rows}")

    def select(self, sequence: int) -> int:
        """Bring every layer down to its budget now; return how many layers were above it."""
        count = int(self._call["select"](self._handle, sequence))
        if count == _FAILED:
            raise ContextError(f"selecting the rows of sequence {sequence} failed; they are as they were")
        if count < 0:
            raise ContextError(self.refusal() or f"sequence {sequence} cannot be selected from")
        return count

    def set_step(self, n_tokens: int) -> None:
        """Let up to so many tokens of a sequence in a batch be a decoding step."""
        status = self._call["set_step"](self._handle, n_tokens)
        if status == _FAILED:
            raise ContextError(self.refusal())
        if status != 0:
            raise InvalidRequestError(f"the KV budget refuses {self.refusal()}")

    def removable_from(self, sequence: int) -> int:
        """Return the first position from which on the sequence's end can be removed."""
        return int(self._call["removable_from"](self._handle, sequence))

    def prompt_begin(self, sequence: int, tokens: Sequence[int]) -> None:
        """Make ready to read tokens in steps; raise ContextError when the sequence cannot take them, or not now."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if self._call["prompt_begin"](self._handle, sequence, array, len(tokens)) != 0:
            raise ContextError(self.refusal() or f"no prompt of {len(tokens)} tokens can be read")

    def prompt_step(self, sequence: int, max_steps: int) -> Progress:
        """Compute at most ``max_steps`` steps.

        Raises ContextError when no prompt is being read for the sequence; DecodeAborted and DecodeError, after which
        the prompt is cancelled and the sequence as it was before it.
        """
        found = _Progress()
        status = int(self._call["prompt_step"](self._handle, sequence, max_steps, ctypes.byref(found)))
        if status == _ABORTED:
            raise DecodeAborted("the computation was aborted as asked", status)
        if status == _FAILED:
            raise DecodeError(f"reading a prompt of {found.tokens} tokens failed", status)
        if status != 0:
            raise ContextError(self.refusal() or f"no prompt is being read for sequence {sequence}")
        return Progress(found.steps_done, found.steps, found.tokens, bool(found.finished))

    def prompt_cancel(self, sequence: int) -> bool:
        """Give the prompt up; False if none is being read for the sequence."""
        return bool(self._call["prompt_cancel"](self._handle, sequence) == 0)
