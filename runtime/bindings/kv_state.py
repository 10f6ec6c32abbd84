"""The state of a sequence with a KV budget as bytes: all that it needs to go on in another context, or later.

The bytes begin with a version, and with what rows and selections depend on: head sizes and types of the rows, budgets,
window, score. The library refuses them in a context where any of that differs, and where the numbers after it cannot be
those of a sequence; contents of rows and queries it takes as they are (``kv_file`` adds a checksum).
"""

from __future__ import annotations

import ctypes

from ziggurat.runtime.bindings import library
from ziggurat.runtime.bindings.context import Context
from ziggurat.runtime.bindings.log import reason
from ziggurat.runtime.errors import ContextError, InvalidRequestError


def save(context: Context, sequence: int) -> bytes:
    """Return the state of one sequence; its size grows with the rows in use. Waits for the computation.

    Raises InvalidRequestError without a KV budget, ContextError while a prompt of the sequence is being read.
    """
    _require_budget(context, sequence)
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

    Raises InvalidRequestError without a KV budget, and ContextError, with nothing changed, for a state of another kind
    of context, one that is damaged where that can be told, and while a prompt of the sequence is being read.
    """
    _require_budget(context, sequence)
    lib = library.api()
    data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    with library.log.capture() as lines:
        read = lib.llama_state_seq_set_data(context.handle, data, len(state), sequence)
    if not read:
        raise ContextError(f"sequence {sequence} cannot be restored: {reason(lines, 'no reason was given')}")


def _require_budget(context: Context, sequence: int) -> None:
    if not context.kv_rows(sequence):
        raise InvalidRequestError("this context has no KV budget, and states are saved of sequences with one")
    if context.model.simulated:
        raise ContextError("this context was made to be measured and has no rows")
