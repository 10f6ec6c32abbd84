"""What a context takes in memory, by device and buffer, as the patched library counts it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from ziggurat.runtime.bindings import library
from ziggurat.runtime.bindings.context import Context
from ziggurat.runtime.errors import LibraryError

_NAME = 64
_ERROR = 256
_SYMBOL = "ziggurat_memory_breakdown"


@dataclass(frozen=True)
class BufferMemory:
    """One kind of buffer; sizes in bytes.

    ``device`` is ggml's name of the device whose memory it is, ``CPU`` for the host's. ``context`` are KV rows and
    recurrent state, ``compute`` the graph's temporaries.
    """

    device: str
    buffer: str
    weights: int
    context: int
    compute: int


class _Row(ctypes.Structure):
    """``struct ziggurat_memory_row`` of ziggurat-memory.h."""

    _fields_ = [
        ("device", ctypes.c_char * _NAME),
        ("buffer", ctypes.c_char * _NAME),
        ("model", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("compute", ctypes.c_uint64),
    ]


def can_measure() -> bool:
    """Whether the library can be asked: it is installed, patched, and recent enough. Never raises."""
    try:
        return hasattr(library.api()._lib, _SYMBOL)
    except LibraryError:
        return False


def measure(context: Context) -> tuple[BufferMemory, ...]:
    """Return what a context and its model take, or would take if the model is simulated; by device and buffer.

    The buffer that logits are copied into, ``4 * n_vocab`` bytes per output, belongs to no category of the library's
    and is not in it. Raises LibraryError with a stock library.
    """
    lib = library.api()
    if not hasattr(lib._lib, _SYMBOL):
        raise LibraryError(f"this llama.cpp cannot say what it allocates: {library.PATCHED_REMEDY}")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function = library.function(lib, _SYMBOL, ctypes.c_int32, pointer, pointer, size, ctypes.c_char_p, size)
    error = ctypes.create_string_buffer(_ERROR)
    capacity = 16
    while True:
        rows = (_Row * capacity)()
        count = function(context.handle, rows, capacity, error, _ERROR)
        if count < 0:
            raise LibraryError(f"the library could not say what it allocates: {library.text(error.value)}")
        if count <= capacity:
            break
        capacity = count
    return tuple(
        BufferMemory(library.text(row.device), library.text(row.buffer), row.model, row.context, row.compute)
        for row in rows[:count]
    )
