"""Long caches without reading long texts: the rows of a short text, as often as it takes.

How long a step takes does not depend on what the rows hold. So the saved state of a sequence of some hundred tokens is
rewritten to one of many more: the same rows again and again, at the positions that follow.
"""

from __future__ import annotations

import struct

#: Tokens that are read to have rows to multiply.
BASE = 512
_HEAD = struct.Struct("<IiII")  # magic, sequence, streams, cells
_CELL = struct.Struct("<iIi")  # position, number of sequences, the sequence
_LAYERS = struct.Struct("<II")  # whether V is transposed, layers
_ROWS = struct.Struct("<iQ")  # ggml type, bytes of a row


def multiplied(state: bytes, n_tokens: int, n_layer: int, n_streams: int) -> bytes | None:
    """Return a state of ``n_tokens`` tokens made of the rows of sequence 0's ``state``, for ``n_streams`` sequences.

    ``state`` is that of a cache of plain rows without a KV budget, saved in a context of one or several sequences,
    positions from 0 on. The form is llama.cpp's (``llama_kv_cache::state_write``). None for a state that is something
    else: a transposed V, sliding windows, recurrent state, cells with more than a position.
    """
    try:
        return _multiplied(memoryview(state), n_tokens, n_layer, n_streams)
    except (struct.error, ZeroDivisionError):  # shorter than such a state is
        return None


def _multiplied(state: memoryview, n_tokens: int, n_layer: int, n_streams: int) -> bytes | None:
    magic, sequence, streams, cells = _HEAD.unpack_from(state)
    at = _HEAD.size
    for index in range(cells):
        if _CELL.unpack_from(state, at) != (index, 1, sequence):
            return None
        at += _CELL.size
    transposed, layers = _LAYERS.unpack_from(state, at)
    if sequence != 0 or transposed or layers != n_layer:
        return None
    meta = b"".join(_CELL.pack(position, 1, 0) for position in range(n_tokens))
    pieces: list[bytes | memoryview] = [_HEAD.pack(magic, 0, n_streams, n_tokens), meta, _LAYERS.pack(0, layers)]
    at += _LAYERS.size
    times, rest = divmod(n_tokens, cells)
    for _ in range(2 * layers):  # all K, then all V
        kind, row = _ROWS.unpack_from(state, at)
        rows = state[at + _ROWS.size : at + _ROWS.size + cells * row]
        if len(rows) != cells * row:
            return None
        pieces += [_ROWS.pack(kind, row), *[rows] * times, rows[: rest * row]]
        at += _ROWS.size + len(rows)
    ending = struct.pack("<I", 0) * (streams - 1)
    if bytes(state[at:]) != ending:  # the other streams' cells: none
        return None
    return b"".join([*pieces, struct.pack("<I", 0) * (n_streams - 1)])
