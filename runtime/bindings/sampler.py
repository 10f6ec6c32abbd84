"""A chain of the library's samplers."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ziggurat.runtime.bindings import kv, library
from ziggurat.runtime.bindings.context import Context
from ziggurat.runtime.bindings.vocab import Vocab
from ziggurat.runtime.errors import InvalidRequestError, UnsupportedError

#: Below this part of the likeliest token's probability a token is as good as impossible.
_IMPOSSIBLE = 1e-30
#: How many tokens mirostat 1 estimates the vocabulary's distribution from, as llama.cpp does.
_MIROSTAT_M = 100


class SamplerChain:
    """Samplers applied in the order they were added; the last must choose a token (``greedy``, ``dist``, mirostat).

    The chain owns its samplers and frees them. It holds random state, so use one per generation. Values are the
    library's own and not checked here. ``min_keep`` everywhere is the number of tokens that a sampler leaves at least.
    """

    def __init__(self) -> None:
        lib = self._lib = library.api()
        params = lib.llama_sampler_chain_default_params()
        params.no_perf = True
        self.handle = lib.llama_sampler_chain_init(params)
        self._free = weakref.finalize(self, lib.llama_sampler_free, self.handle)
        # Not at exit: finalizers run latest first there, which would free the chain under an engine still sampling.
        self._free.atexit = False
        self._place: tuple[Context, int] | None = None
        self._spent = False

    def _add(self, sampler: Any) -> SamplerChain:
        self._lib.llama_sampler_chain_add(self.handle, sampler)
        return self

    def logit_bias(self, biases: Mapping[int, float], n_vocab: int) -> SamplerChain:
        """Add to the logits of these tokens; minus infinity forbids one."""
        if not biases:
            return self
        array = (self._lib.llama_logit_bias * len(biases))(*biases.items())
        return self._add(self._lib.llama_sampler_init_logit_bias(n_vocab, len(biases), array))

    def drop_impossible(self) -> SamplerChain:
        """Remove forbidden tokens, of whose probability 0 ``typical`` and mirostat would take the logarithm."""
        return self._add(self._lib.llama_sampler_init_min_p(_IMPOSSIBLE, 1))

    def penalties(self, n_vocab: int, last_n: int, repeat: float, frequency: float, presence: float) -> SamplerChain:
        """Penalize the tokens among the last ``last_n`` accepted ones.

        A positive logit is divided by ``repeat``, another multiplied; then ``frequency`` times the count and
        ``presence`` are subtracted.
        """
        init = self._lib.llama_sampler_init_penalties
        return self._add(init(n_vocab, last_n, repeat, frequency, presence))

    def dry(
        self,
        vocab: Vocab,
        multiplier: float,
        base: float,
        allowed_length: int,
        last_n: int,
        breakers: Sequence[str],
    ) -> SamplerChain:
        """Penalize tokens that would prolong a repetition among the last ``last_n`` accepted ones.

        By ``multiplier * base ** (length - allowed_length)``; repetitions do not reach over one of ``breakers``.
        """
        texts = (ctypes.c_char_p * max(1, len(breakers)))(*(text.encode() for text in breakers))
        init = self._lib.llama_sampler_init_dry
        pointer = ctypes.cast(texts, ctypes.POINTER(ctypes.c_char_p))
        return self._add(init(vocab.handle, multiplier, base, allowed_length, last_n, pointer, len(breakers)))

    def top_n_sigma(self, n: float) -> SamplerChain:
        """Keep tokens within n standard deviations of the best logit."""
        return self._add(self._lib.llama_sampler_init_top_n_sigma(n))

    def top_k(self, k: int) -> SamplerChain:
        """Keep the k most likely tokens; 0 keeps all."""
        return self._add(self._lib.llama_sampler_init_top_k(k))

    def typical(self, p: float, min_keep: int = 0) -> SamplerChain:
        """Keep the tokens whose surprise is nearest to the expected one, until they sum to p; 1 keeps all."""
        return self._add(self._lib.llama_sampler_init_typical(p, min_keep))

    def top_p(self, p: float, min_keep: int = 0) -> SamplerChain:
        """Keep the smallest set of tokens whose probabilities sum to p; 1 keeps all."""
        return self._add(self._lib.llama_sampler_init_top_p(p, min_keep))

    def min_p(self, p: float, min_keep: int = 0) -> SamplerChain:
        """Keep tokens at least p times as likely as the likeliest; 0 keeps all."""
        return self._add(self._lib.llama_sampler_init_min_p(p, min_keep))

    def xtc(self, probability: float, threshold: float, min_keep: int, seed: int) -> SamplerChain:
        """With this probability remove all tokens of at least ``threshold`` but the least likely of them."""
        return self._add(self._lib.llama_sampler_init_xtc(probability, threshold, min_keep, seed))

    def temperature(self, temperature: float, spread: float = 0.0, exponent: float = 1.0) -> SamplerChain:
        """Divide the logits; with a spread by a temperature within it, the higher the entropy the higher."""
        return self._add(self._lib.llama_sampler_init_temp_ext(temperature, spread, exponent))

    def greedy(self) -> SamplerChain:
        """Choose the likeliest token."""
        return self._add(self._lib.llama_sampler_init_greedy())

    def dist(self, seed: int) -> SamplerChain:
        """Draw a token from what is left, from this seed's sequence (0 to 2^32 - 2)."""
        return self._add(self._lib.llama_sampler_init_dist(seed))

    def mirostat(self, n_vocab: int, seed: int, tau: float, eta: float) -> SamplerChain:
        """Draw a token so that the surprise stays near ``tau`` bits (Mirostat 1.0)."""
        return self._add(self._lib.llama_sampler_init_mirostat(n_vocab, seed, tau, eta, _MIROSTAT_M))

    def mirostat_v2(self, seed: int, tau: float, eta: float) -> SamplerChain:
        """Draw a token so that the surprise stays near ``tau`` bits (Mirostat 2.0)."""
        return self._add(self._lib.llama_sampler_init_mirostat_v2(seed, tau, eta))

    def accept(self, tokens: Iterable[int]) -> None:
        """Let the samplers remember tokens that they did not choose."""
        for token in tokens:
            self._lib.llama_sampler_accept(self.handle, token)

    def sample(self, context: Context, index: int) -> int:
        """Choose a token from the logits at ``index`` of the last batch, and let the samplers remember it."""
        return int(self._lib.llama_sampler_sample(self.handle, context.handle, context.output_index(index)))

    def attach(self, context: Context, sequence: int) -> None:
        """Let the samplers work within the context's graph, on its device, for one sequence, from the next batch on.

        ``sample`` goes on as before, and nothing else changes but that the sequence's logits cannot be read and that no
        batch may ask for more than two of its outputs. The library supports some samplers only, and some are others
        there (``runtime.device_sampling`` says which are the same). It plans its memory anew at the next batch, which
        takes milliseconds. Once attached a chain works nowhere else: ``close`` is all that may follow ``detach``.

        With a KV budget that is for after the prompt: read in one batch, it would draw once for every layer.

        Raises UnsupportedError with a KV budget and a library from before ziggurat.5, and when the library refuses;
        InvalidRequestError for a chain that was attached before, and a sequence that has another.
        """
        if context.kv_active and not kv.takes_samplers():
            raise UnsupportedError(
                f"this library has no samplers within a context that has a KV budget: {library.PATCHED_REMEDY}"
            )
        if self._spent or sequence in context.samplers or not 0 <= sequence < context.settings.n_seq_max:
            raise InvalidRequestError(f"sequence {sequence} cannot take this chain of samplers")
        self._spent = True
        if not self._lib.llama_set_sampler(context.handle, sequence, self.handle):
            raise UnsupportedError("the library does not let these samplers work within a context")
        self._place = context, sequence
        context.samplers[sequence] = self

    def detach(self) -> None:
        """Take the chain out of its context. Idempotent."""
        place, self._place = self._place, None
        if place is None or place[0].closed:
            return
        context, sequence = place
        self._lib.llama_set_sampler(context.handle, sequence, None)
        del context.samplers[sequence]

    def close(self) -> None:
        """Take the chain out of its context and free it. Idempotent."""
        self.detach()
        self._free()
