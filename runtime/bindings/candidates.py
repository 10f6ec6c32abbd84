"""The tokens that may come next, as the library's samplers take them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

from ziggurat.runtime.bindings import library
from ziggurat.runtime.bindings.sampler import SamplerChain


class Candidates:
    """All tokens of a vocabulary with their logits; those that are forbidden have minus infinity.

    Reusable: arrays are this object's own, filled by ``load``.
    """

    def __init__(self, n_vocab: int) -> None:
        import numpy as np

        self._lib = library.api()
        kind = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._base: Any = np.zeros(n_vocab, kind)  # in the order of the ids
        self._base["id"] = np.arange(n_vocab)
        self._work = self._base.copy()  # samplers sort and shorten it
        self._copied = self._work.view(np.int32), self._base.view(np.int32)  # quicker to copy than structs

    def load(self, logits: Any, forbidden: Sequence[int]) -> None:
        """Take new logits, a float array of shape (n_vocab,), and forbid some tokens."""
        self._base["logit"] = logits
        self.forbid(forbidden)

    def forbid(self, tokens: Sequence[int]) -> None:
        """Forbid further tokens until the next ``load``."""
        if tokens:
            self._base["logit"][list(tokens)] = -math.inf

    def any(self) -> bool:
        """Whether a token is left."""
        return bool((self._base["logit"] > -math.inf).any())

    def native(self, array: Any) -> Any:
        """Return the library's struct over an array of candidates; valid as long as that."""
        lib = self._lib
        pointer = array.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
        return lib.llama_token_data_array(data=pointer, size=len(array), selected=-1, sorted=False)

    def mask(self, sampler: Any) -> None:
        """Let a sampler that forbids tokens and keeps their order work on these."""
        struct = self.native(self._base)
        self._lib.llama_sampler_apply(sampler, ctypes.byref(struct))

    def choose(self, chain: SamplerChain) -> int:
        """Return the token that a chain chooses; these candidates stay as they are. One has to be left."""
        target, source = self._copied
        target[:] = source
        struct = self.native(self._work)
        self._lib.llama_sampler_apply(chain.handle, ctypes.byref(struct))
        assert 0 <= struct.selected < struct.size, "the chain's last sampler chooses"
        return int(struct.data[struct.selected].id)
