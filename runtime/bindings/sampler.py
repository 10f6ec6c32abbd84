"""A chain of the library's samplers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

from ziggurat.runtime.bindings import library
from ziggurat.runtime.bindings.context import Context


class SamplerChain:
    """Samplers applied in the order they were added; the last must choose a token (``greedy`` or ``dist``).

    The chain owns its samplers and frees them. It holds random state, so use one per generation.
    """

    def __init__(self) -> None:
        lib = self._lib = library.api()
        params = lib.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain = lib.llama_sampler_chain_init(params)
        self._free = weakref.finalize(self, lib.llama_sampler_free, self._chain)
        # Not at exit: finalizers run latest first there, which would free the chain under an engine still sampling.
        self._free.atexit = False

    def _add(self, sampler: Any) -> SamplerChain:
        self._lib.llama_sampler_chain_add(self._chain, sampler)
        return self

    def suppress(self, tokens: Iterable[int], n_vocab: int) -> SamplerChain:
        """Never choose these tokens."""
        biases = [(token, -math.inf) for token in tokens]
        if not biases:
            return self
        array = (self._lib.llama_logit_bias * len(biases))(*biases)
        return self._add(self._lib.llama_sampler_init_logit_bias(n_vocab, len(biases), array))

    def top_k(self, k: int) -> SamplerChain:
        """Keep the k most likely tokens; 0 keeps all."""
        return self._add(self._lib.llama_sampler_init_top_k(k))

    def top_p(self, p: float) -> SamplerChain:
        """Keep the smallest set of tokens whose probabilities sum to p; 1 keeps all."""
        return self._add(self._lib.llama_sampler_init_top_p(p, 0))

    def min_p(self, p: float) -> SamplerChain:
        """Keep tokens at least p times as likely as the likeliest; 0 keeps all."""
        return self._add(self._lib.llama_sampler_init_min_p(p, 0))

    def temperature(self, temperature: float) -> SamplerChain:
        """Divide the logits."""
        return self._add(self._lib.llama_sampler_init_temp(temperature))

    def greedy(self) -> SamplerChain:
        """Choose the likeliest token."""
        return self._add(self._lib.llama_sampler_init_greedy())

    def dist(self, seed: int) -> SamplerChain:
        """Draw a token from what is left, from this seed's sequence (0 to 2^32 - 2)."""
        return self._add(self._lib.llama_sampler_init_dist(seed))

    def sample(self, context: Context, index: int) -> int:
        """Choose a token from the logits at ``index`` of the last batch, and let the samplers remember it."""
        return int(self._lib.llama_sampler_sample(self._chain, context.handle, context.output_index(index)))

    def close(self) -> None:
        """Free the chain. Idempotent."""
        self._free()
