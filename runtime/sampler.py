"""Chooses the tokens of one generation: the library's samplers, a grammar, and what is forbidden."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ziggurat.runtime.bindings import Candidates, Context, GrammarSampler, SamplerChain, Vocab
from ziggurat.runtime.errors import InvalidRequestError, TokenError, UnsupportedError
from ziggurat.runtime.grammar import Grammar
from ziggurat.runtime.sampling import SamplingParams

_COLDEST = 0.01  # where a dynamic temperature ends: at 0 the library's logits overflow


class Sampler:
    """The state of one generation's sampling: seed, penalized tokens, place in the grammar.

    ``n_ctx`` is what "as many as the context has" means. Raises InvalidRequestError for what does not fit the
    vocabulary: biases of tokens it has not, grammars with such tokens. Belongs to the model; may be made in any
    thread, and used in one at a time.
    """

    def __init__(self, params: SamplingParams, vocab: Vocab, n_ctx: int) -> None:
        self.params = params = params.seeded()
        self._vocab = vocab
        biases = _biases(params, vocab)
        self._forbidden = tuple(token for token, bias in biases.items() if bias == -math.inf)
        grammar = params.read_grammar()
        self._chain = build_chain(params, vocab, n_ctx, biases, masked=grammar is not None)
        self._window = _window(params, n_ctx)
        # the chain is one sampler then, before which the library copies all logits
        self._takes_best = _only_greedy(params) and not (biases or self._window or grammar is not None)
        self._grammar: GrammarSampler | None = None
        self._candidates: Candidates | None = None
        if grammar is not None:
            self._grammar = GrammarSampler(vocab, grammar.text, _named_tokens(grammar, vocab))
            self._candidates = Candidates(vocab.n_tokens)

    def prime(self, tokens: Sequence[int]) -> None:
        """Count a prompt's tokens for penalties and DRY; the grammar begins after them."""
        if self._window:
            self._chain.accept(tokens[-self._window :])

    def sample(self, context: Context, index: int) -> int | None:
        """Choose a token from the logits at ``index`` of the last batch; None when the grammar is at its end.

        An end token is chosen like any other. Raises UnsupportedError when the vocabulary has no token with which the
        grammar could go on.
        """
        if self._takes_best:
            return context.likeliest(index)
        if self._grammar is None or self._candidates is None:
            return self._chain.sample(context, index)
        token = self._choose(self._grammar, self._candidates, context.logits(index))
        if token is not None:
            self._grammar.accept(token)
            if self._window:
                self._chain.accept((token,))
        return token

    def _choose(self, grammar: GrammarSampler, candidates: Candidates, logits: object) -> int | None:
        candidates.load(logits, self._forbidden)
        # Mirostat learns from every token it chooses, so it is to choose only what is allowed.
        if self.params.mirostat == 0:
            token = candidates.choose(self._chain)
            if grammar.allows(token):
                return token
        grammar.mask(candidates)
        while candidates.any():
            token = candidates.choose(self._chain)
            if grammar.shows(token):
                return token
            candidates.forbid((token,))
        ends = self._vocab.eog_tokens()
        if not ends or any(grammar.allows(token) for token in ends):
            return None  # nothing but an end could follow, and that is forbidden or unknown here
        raise UnsupportedError("the model's vocabulary has no token with which the grammar could go on")

    def attach(self, context: Context, sequence: int) -> None:
        """Let the samplers work within the context from its next batch on; see ``SamplerChain.attach``.

        ``device_sampling.unsupported`` has to allow it. ``close`` before the sequence is anybody else's.
        """
        self._takes_best = False
        self._chain.attach(context, sequence)

    def close(self) -> None:
        """Free the samplers. Idempotent."""
        self._chain.close()
        if self._grammar is not None:
            self._grammar.close()


def build_chain(
    params: SamplingParams, vocab: Vocab, n_ctx: int, biases: dict[int, float], *, masked: bool = False
) -> SamplerChain:
    """Make the library's chain in its default order; the caller closes it. ``params`` have a seed.

    ``masked``: candidates with a logit of minus infinity come in.
    """
    seed = params.seed
    assert seed is not None
    keep = params.min_keep
    n_vocab = vocab.n_tokens
    chain = SamplerChain().logit_bias(biases, n_vocab)
    if penalizes(params):
        last_n = _length(params.repeat_last_n, n_ctx)
        chain.penalties(
            n_vocab, last_n, params.repeat_penalty, params.frequency_penalty, params.presence_penalty
        )  # fmt: skip
    if params.dry_multiplier > 0:
        last_n = _length(params.dry_penalty_last_n, n_ctx)
        length, breakers = params.dry_allowed_length, params.dry_sequence_breakers
        chain.dry(vocab, params.dry_multiplier, params.dry_base, length, last_n, breakers)
    if _only_greedy(params):
        return chain.greedy()  # what is left out never removes the likeliest token
    logarithms = params.typical_p < 1 or params.mirostat
    if params.mirostat == 0 and params.top_n_sigma > 0:
        chain.top_n_sigma(params.top_n_sigma)
    if logarithms and (masked or biases or params.dry_multiplier > 0 or params.top_n_sigma > 0):
        chain.drop_impossible()
    if params.mirostat:
        _heat(chain, params)
        tau, eta = params.mirostat_tau, params.mirostat_eta
        return chain.mirostat(n_vocab, seed, tau, eta) if params.mirostat == 1 else chain.mirostat_v2(seed, tau, eta)
    chain.top_k(params.top_k).typical(params.typical_p, keep).top_p(params.top_p, keep).min_p(params.min_p, keep)
    chain.xtc(params.xtc_probability, params.xtc_threshold, keep, seed)
    if params.greedy:
        return chain.greedy()
    _heat(chain, params)
    return chain.dist(seed)


def _only_greedy(params: SamplingParams) -> bool:
    """Whether no sampler before the choice changes which token is the likeliest, but for biases and penalties."""
    return params.greedy and (params.mirostat > 0 or (params.typical_p == 1 and params.xtc_probability == 0))


def _heat(chain: SamplerChain, params: SamplingParams) -> None:
    temperature, spread = params.temperature, params.dynatemp_range
    if spread > 0:
        low, high = max(_COLDEST, temperature - spread), max(2 * _COLDEST, temperature + spread)
        temperature, spread = (low + high) / 2, (high - low) / 2
    chain.temperature(temperature, spread, params.dynatemp_exponent)


def _biases(params: SamplingParams, vocab: Vocab) -> dict[int, float]:
    for token in params.logit_bias:
        if token >= vocab.n_tokens:
            raise TokenError(f"the logit bias is of token {token}; the vocabulary goes to {vocab.n_tokens - 1}")
    biases = {token: bias for token, bias in params.logit_bias.items() if bias}
    forbidden = [*vocab.suppressed(), *(vocab.eog_tokens() if params.ignore_eos else ())]
    biases.update(dict.fromkeys(forbidden, -math.inf))
    if sum(bias == -math.inf for bias in biases.values()) == vocab.n_tokens:
        raise InvalidRequestError("the logit bias forbids every token of the vocabulary")
    return biases


def _named_tokens(grammar: Grammar, vocab: Vocab) -> frozenset[int]:
    found = set()
    for named in grammar.tokens:
        tokens = [named] if isinstance(named, int) else vocab.tokenize(named, add_special=False, parse_special=True)
        if len(tokens) != 1 or tokens[0] >= vocab.n_tokens:
            raise InvalidRequestError(f"the grammar names {named!r}, which is no token of the model's vocabulary")
        if vocab.is_eog(tokens[0]):
            raise InvalidRequestError(
                f"the grammar names {named!r}, which ends a text; it may follow every text anyway"
            )
        found.update(tokens)
    return frozenset(found)


def penalizes(params: SamplingParams) -> bool:
    """Whether tokens that occurred before are penalized."""
    off = params.repeat_penalty == 1 and params.frequency_penalty == 0 == params.presence_penalty
    return not off and params.repeat_last_n != 0


def _window(params: SamplingParams, n_ctx: int) -> int:
    """Return how many tokens back the samplers look."""
    penalties = _length(params.repeat_last_n, n_ctx) if penalizes(params) else 0
    return max(penalties, _length(params.dry_penalty_last_n, n_ctx) if params.dry_multiplier > 0 else 0)


def _length(last_n: int, n_ctx: int) -> int:
    return n_ctx if last_n < 0 else last_n
