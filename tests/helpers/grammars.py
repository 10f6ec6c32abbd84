"""What a grammar allows, asked of the library with a vocabulary and no model behind it."""

from __future__ import annotations

import numpy as np

from ziggurat.runtime.bindings import Candidates, GrammarSampler, SamplerChain, Vocab
from ziggurat.runtime.grammar import read_grammar


def accepts(vocab: Vocab, grammar: str, text: str) -> bool:
    """Whether a text is one of the grammar's: it may be written token by token, and end there."""
    sampler = GrammarSampler(vocab, read_grammar(grammar).text)
    for token in vocab.tokenize(text, add_special=False, parse_special=False):
        if not sampler.allows(token):
            return False
        sampler.accept(token)
    assert vocab.eos is not None
    return sampler.allows(vocab.eos)


def random_text(vocab: Vocab, grammar: str, seed: int, *, limit: int = 2000) -> str | None:
    """Write a text by choosing among the allowed tokens at random; None when it does not end within ``limit``.

    The end and the tokens that close something are the likelier the longer it gets.
    """
    rng = np.random.default_rng(seed)
    sampler, chain = GrammarSampler(vocab, read_grammar(grammar).text), SamplerChain().dist(seed)
    candidates = Candidates(vocab.n_tokens)
    closing = np.array(
        [vocab.is_eog(token) or vocab.piece(token)[:1] in (b'"', b"}", b"]") for token in range(vocab.n_tokens)]
    )
    text = b""
    for written in range(limit):
        candidates.load(rng.normal(0, 1.5, vocab.n_tokens) + closing * written * 0.1, ())
        sampler.mask(candidates)
        while True:
            assert candidates.any(), text
            token = candidates.choose(chain)
            if sampler.shows(token):
                break
            candidates.forbid((token,))
        if vocab.is_eog(token):
            return text.decode("utf-8")
        sampler.accept(token)
        text += vocab.piece(token)
    return None
