"""The tokens of one decode call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from ziggurat.runtime.errors import ContextError, InvalidRequestError

_MAX_TOKEN = 2**31 - 1


class Batch:
    """A reusable batch of up to ``capacity`` tokens of any of ``n_seq_max`` sequences.

    Arrays are this object's own: nothing is allocated per step. Keep it alive while ``decode`` runs.
    """

    def __init__(self, capacity: int, n_seq_max: int = 1) -> None:
        self.capacity = capacity
        self.n_seq_max = n_seq_max
        self._length = 0
        self._outputs: list[int] = []
        self._tokens = (ctypes.c_int32 * capacity)()
        self._positions = (ctypes.c_int32 * capacity)()
        self._sequences = (ctypes.c_int32 * capacity)()
        self._wanted = (ctypes.c_int8 * capacity)()
        self._counts = (ctypes.c_int32 * capacity)(*([1] * capacity))
        pointer = ctypes.POINTER(ctypes.c_int32)
        base = ctypes.addressof(self._sequences)
        # each token names its sequences by a pointer; ours all point at one element of one array
        addresses = (ctypes.c_void_p * capacity)(*range(base, base + 4 * capacity, 4))
        self._sequence_pointers = ctypes.cast(addresses, ctypes.POINTER(pointer))
        self._addresses = addresses

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> Sequence[int]:
        """The token ids added so far."""
        return self._tokens[: self._length]

    @property
    def outputs(self) -> frozenset[int]:
        """Indices of the tokens whose logits were asked for."""
        return frozenset(self._outputs)

    def clear(self) -> None:
        """Empty the batch."""
        self._length = 0
        self._outputs.clear()

    def add(self, tokens: Sequence[int], position: int, sequence: int, *, output_last: bool) -> int:
        """Append consecutive tokens of one sequence, the first at ``position``; return the index of the last.

        ``output_last`` asks for the logits after the last one. Raises ContextError when they do not fit and
        InvalidRequestError for no tokens or a sequence out of range; the batch is then unchanged.
        """
        start, end = self._length, self._length + len(tokens)
        if end > self.capacity:
            raise ContextError(f"a batch of {end} tokens exceeds its capacity of {self.capacity}")
        if not tokens or not 0 <= sequence < self.n_seq_max or position < 0:
            raise InvalidRequestError(f"cannot add {len(tokens)} tokens of sequence {sequence} at position {position}")
        if min(tokens) < 0 or max(tokens) > _MAX_TOKEN:  # ctypes would wrap them into valid ids
            raise InvalidRequestError(f"token ids go from 0 to {_MAX_TOKEN}, not {min(tokens)} to {max(tokens)}")
        self._tokens[start:end] = list(tokens)
        count = end - start
        self._positions[start:end] = list(range(position, position + count))
        self._sequences[start:end] = [sequence] * count
        self._wanted[start:end] = [0] * count
        if output_last:
            self._wanted[end - 1] = 1
            self._outputs.append(end - 1)
        self._length = end
        return end - 1

    def native(self, lib: Any) -> Any:
        """Return the ``llama_batch`` struct over these arrays; valid while this object lives and is unchanged."""
        return lib.llama_batch(
            n_tokens=self._length,
            token=self._tokens,
            embd=None,
            pos=self._positions,
            n_seq_id=self._counts,
            seq_id=self._sequence_pointers,
            logits=self._wanted,
        )
