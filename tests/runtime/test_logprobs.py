from __future__ import annotations

import math

import numpy as np
import pytest

from helpers.samplers import softmax
from ziggurat.runtime.bindings import Context, ContextSettings, Model
from ziggurat.runtime.engine import GenerationRequest, TokenEvent
from ziggurat.runtime.engine.llama_engine import LlamaEngine
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.logprobs import TokenLogprobs, token_logprobs
from ziggurat.runtime.sampling import SamplingParams


def test_log_probabilities_are_those_of_the_softmax(bpe_model: Model) -> None:
    vocab = bpe_model.vocab
    logits = np.random.default_rng(1).normal(0, 3, vocab.n_tokens).astype(np.float32)
    logits[[7, 9, 11]] = logits.max() + 1  # equally likely: in the order of the ids
    expected = np.log(softmax(logits.astype(np.float64)))
    found = token_logprobs(logits, 200, 5, vocab)
    assert found.chosen.token == 200
    assert found.chosen.logprob == pytest.approx(expected[200], abs=1e-5)
    assert [top.token for top in found.top[:3]] == [7, 9, 11]
    assert {top.token for top in found.top} == set(np.argsort(-expected)[:5].tolist())
    assert [top.logprob for top in found.top] == sorted((top.logprob for top in found.top), reverse=True)
    np.testing.assert_allclose(
        [top.logprob for top in found.top], [expected[top.token] for top in found.top], atol=1e-5
    )
    assert all(top.bytes == vocab.piece(top.token, special=True) for top in found.top)
    everything = token_logprobs(logits, 0, 10**6, vocab)
    assert sum(math.exp(top.logprob) for top in everything.top) == pytest.approx(1, abs=1e-5)
    assert token_logprobs(logits, 0, 0, vocab).top == ()


def test_parts_of_characters_and_control_tokens_have_bytes_and_text(bpe_model: Model) -> None:
    vocab = bpe_model.vocab
    assert vocab.eos is not None
    half = next(token for token in range(256) if vocab.piece(token) == b"\xc3")
    logits = np.zeros(vocab.n_tokens, np.float32)
    assert token_logprobs(logits, half, 0, vocab).chosen.bytes == b"\xc3"
    assert token_logprobs(logits, half, 0, vocab).chosen.text == "\ufffd"
    assert token_logprobs(logits, vocab.eos, 0, vocab).chosen.text == "<|im_end|>"


def test_they_are_of_the_model_before_any_sampler(engine: LlamaEngine, spm_model: Model) -> None:
    """Temperature, bias and grammar change what is chosen and not what is reported."""
    prompt = (1, 260, 265)
    with Context(spm_model, ContextSettings(n_ctx=256, n_threads=1)) as context:
        batch = context.new_batch()
        index = batch.add(prompt, 0, 0, output_last=True)
        context.decode(batch)
        logits = context.logits(index).astype(np.float64)
    expected = np.log(softmax(logits))
    settings = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=3.0, seed=1, logit_bias={270: 50.0}),
        SamplingParams(temperature=0, grammar="root ::= [x-z]+", repeat_penalty=2.0),
    ]
    for sampling in settings:
        request = GenerationRequest(tokens=prompt, max_tokens=3, sampling=sampling, logprobs=20)
        first, *others, _ = engine.stream(request)
        assert all(isinstance(event, TokenEvent) and event.logprobs is not None for event in others)
        assert isinstance(first, TokenEvent)
        assert isinstance(first.logprobs, TokenLogprobs)
        assert first.logprobs.chosen.token == first.token
        assert first.logprobs.chosen.logprob == pytest.approx(expected[first.token], abs=1e-3)
        assert [top.token for top in first.logprobs.top][:5] == np.argsort(-expected)[:5].tolist()
        assert len(first.logprobs.top) == 20


def test_they_come_only_when_asked_for(engine: LlamaEngine) -> None:
    *tokens, _ = engine.stream(GenerationRequest(prompt="the", max_tokens=2))
    assert [event.logprobs for event in tokens if isinstance(event, TokenEvent)] == [None, None]
    for wrong in (-1, 21):
        with pytest.raises(InvalidRequestError, match="from 0 to 20"):
            GenerationRequest(prompt="the", logprobs=wrong)
