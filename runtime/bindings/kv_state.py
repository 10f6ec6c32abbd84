"""The state of a sequence as bytes: all that it needs to go on in another context, or later.

With a KV budget the bytes begin with a version, and with what rows and selections depend on: head sizes and types of
the rows, budgets, window, score. The library refuses them in a context where any of that differs, and where the numbers
after it cannot be those of a sequence; contents of rows and queries it takes as they are (``kv_file`` adds a checksum).
Without one they are what the stock library writes, and it compares less: they are for contexts of the same model with
the same types of rows and as many sequences.
"""

from __future__ import annotations

import ctypes

from ziggurat.runtime.bindings import library
from ziggurat.runtime.bindings.context import Context
from ziggurat.runtime.bindings.log import reason
from ziggurat.runtime.errors import ContextError, InvalidRequestError


def save(context: Context, sequence: int) -> bytes:
    """Return the state of one sequence; its size grows with the rows in use. Waits for the computation.

    Raises ContextError while a prompt of the sequence is being read, and without a KV budget while rows that were
    copied are not there yet, until the next ``Context.decode``.
    """
    _check(context, sequence)
    lib = library.api()
    with library.log.capture() as lines:
        size = lib.llama_state_seq_get_size(context.handle, sequence)
        data = (ctypes.c_uint8 * size)()
        written = lib.llama_state_seq_get_data(context.handle, data, size, sequence)
    if not size or written != size:
        raise ContextError(f"sequence {sequence} cannot be saved: {reason(lines, 'no reason was given')}")
    return bytes(data)


def restore(context: Context, sequence: int, state: bytes | memoryview) -> None:
    """Put a sequence into a saved state; what it had is forgotten. There are no logits before its next token.

    Raises ContextError, with nothing changed, for a state of another kind of context, one that is damaged where that
    can be told, and where ``save`` does.
    """
    _check(context, sequence)
    if context.kv_active:
        _restore(context, sequence, state)
        return
    before = save(context, sequence)
    try:
        context.remove(sequence)  # a state without rows leaves those that are there
        _restore(context, sequence, state)
    except ContextError:
        context.remove(sequence)
        _restore(context, sequence, before)
        raise


def _restore(context: Context, sequence: int, state: bytes | memoryview) -> None:
    lib = library.api()
    data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    with library.log.capture() as lines:
        read = lib.llama_state_seq_set_data(context.handle, data, len(state), sequence)
    if not read:
        raise ContextError(f"sequence {sequence} cannot be restored: {reason(lines, 'no reason was given')}")


def _check(context: Context, sequence: int) -> None:
    if not 0 <= sequence < context.settings.n_seq_max:  # the library would abort the process
        raise InvalidRequestError(f"sequence {sequence} is not one of {context.settings.n_seq_max}")
    if context.model.simulated:
        raise ContextError("this context was made to be measured and has no rows")
    if context.copies_pending:
        raise ContextError("rows that were copied are not there yet: save and restore after the next computation")
