from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from helpers.samplers import left, softmax
from ziggurat.runtime.bindings import Context, ContextSettings, Model, SamplerChain
from ziggurat.runtime.errors import InvalidRequestError, TokenError
from ziggurat.runtime.sampler import Sampler, build_chain
from ziggurat.runtime.sampling import SamplingParams

LOGITS = np.random.default_rng(0).normal(0, 2, 50).astype(np.float32)
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": 2**32 - 1},
        {"typical_p": 0.0},
        {"top_n_sigma": -2.0},
        {"min_keep": -1},
        {"dynatemp_range": -1.0},
        {"dynatemp_exponent": 0.0},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": math.nan},
        {"repeat_last_n": -2},
        {"repeat_last_n": 2**31},
        {"frequency_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"dry_multiplier": -1.0},
        {"dry_base": 0.5},
        {"dry_allowed_length": 0},
        {"dry_penalty_last_n": -2},
        {"dry_sequence_breakers": ("",)},
        {"dry_sequence_breakers": ("a\0b",)},
        {"dry_sequence_breakers": ("\ud800",)},
        {"dry_sequence_breakers": ("x" * 41,)},
        {"dry_sequence_breakers": ("x",) * 65},
        {"xtc_probability": 1.1},
        {"xtc_threshold": -0.1},
        {"mirostat": 3},
        {"mirostat_tau": 0.0},
        {"mirostat_eta": 0.0},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {-1: 1.0}},
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="must be") as caught:
        SamplingParams(**values)
    assert "\n" not in str(caught.value)


def draw(model: Model, params: SamplingParams, count: int = 20, prompt: tuple[int, ...] = (1, 5, 9)) -> list[int]:
    """Draw again and again from the same logits."""
    with Context(model, ContextSettings(n_ctx=256, n_threads=1)) as context:
        batch = context.new_batch()
        index = batch.add(prompt, 0, 0, output_last=True)
        context.decode(batch)
        sampler = Sampler(params, model.vocab, 256)
        sampler.prime(prompt)
        tokens = [sampler.sample(context, index) for _ in range(count)]
        sampler.close()
    assert None not in tokens
    return [token for token in tokens if token is not None]


def logits_of(model: Model, prompt: tuple[int, ...] = (1, 5, 9)) -> np.ndarray:
    with Context(model, ContextSettings(n_ctx=256, n_threads=1)) as context:
        batch = context.new_batch()
        index = batch.add(prompt, 0, 0, output_last=True)
        context.decode(batch)
        return np.asarray(context.logits(index))


@pytest.mark.parametrize("values", [{}, {"mirostat": 1}, {"mirostat": 2}, {"xtc_probability": 0.5}, {"typical_p": 0.9}])
def test_a_seed_repeats_and_another_differs(spm_model: Model, values: dict[str, Any]) -> None:
    params = SamplingParams(temperature=1.5, seed=7, **OFF, **values)
    assert draw(spm_model, params) == draw(spm_model, params)
    assert draw(spm_model, params) != draw(spm_model, SamplingParams(1.5, seed=8, **OFF, **values))


def test_temperature_zero_and_top_k_one_take_the_likeliest(spm_model: Model) -> None:
    greedy = draw(spm_model, SamplingParams(temperature=0), 3)
    assert set(greedy) == {int(logits_of(spm_model).argmax())}
    assert draw(spm_model, SamplingParams(temperature=2.0, top_k=1, seed=1), 3) == greedy
    assert draw(spm_model, SamplingParams(temperature=2.0, top_k=0, top_p=1e-6, min_p=0, seed=1), 3) == greedy
    assert draw(spm_model, SamplingParams(temperature=2.0, top_k=0, top_p=1, min_p=1, seed=1), 3) == greedy
    assert draw(spm_model, SamplingParams(temperature=1e-40, seed=1, **OFF), 3) == greedy  # its quotients overflow
    assert draw(spm_model, SamplingParams(temperature=2.0, top_n_sigma=1e-3, seed=1, **OFF), 3) == greedy
    assert draw(spm_model, SamplingParams(temperature=0, mirostat=1), 3) == greedy


def test_seeded_fixes_a_seed_once() -> None:
    seeded = SamplingParams().seeded()
    assert seeded.seed is not None
    assert seeded.seeded() == seeded


def test_penalties_are_those_of_the_formula() -> None:
    chain = SamplerChain().penalties(50, 4, 1.3, 0.5, 0.25)
    chain.accept([9, 9, 1, 2, 2, 3])  # the first two are too long ago
    expected = LOGITS.astype(np.float64)
    for token, count in ((1, 1), (2, 2), (3, 1)):
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
        expected[token] -= 0.5 * count + 0.25
    found = left(chain, LOGITS)
    np.testing.assert_allclose([found[token] for token in range(50)], expected, rtol=1e-5)


def test_the_prompt_counts_for_penalties(spm_model: Model) -> None:
    vocab = spm_model.vocab
    prompt = (1, 5, 9)
    best = int(logits_of(spm_model).argmax())
    assert best not in prompt
    for values, window in (({"presence_penalty": 1000.0}, 64), ({"presence_penalty": 1000.0, "repeat_last_n": 2}, 2)):
        sampler = Sampler(SamplingParams(temperature=0, **values), vocab, 256)
        sampler.prime([best, *prompt])
        with Context(spm_model, ContextSettings(n_ctx=256, n_threads=1)) as context:
            batch = context.new_batch()
            index = batch.add(prompt, 0, 0, output_last=True)
            context.decode(batch)
            assert (sampler.sample(context, index) == best) is (window == 2)


def test_dry_penalizes_what_prolongs_a_repetition(spm_model: Model) -> None:
    vocab = spm_model.vocab
    logits = np.zeros(vocab.n_tokens, np.float32)
    letters = [vocab.tokenize(letter, add_special=False, parse_special=False)[-1] for letter in "abcdef"]
    a, b, c, d, e, f = letters
    said = [a, b, c, d, e, f, a, b, c]  # a b c again: d would prolong it to four
    chain = SamplerChain().dry(vocab, 0.8, 1.75, 2, 64, ())
    chain.accept(said)
    found = left(chain, logits)
    assert found.pop(d) == pytest.approx(-0.8 * 1.75 ** (3 - 2))
    assert set(found.values()) == {0.0}
    broken = SamplerChain().dry(vocab, 0.8, 1.75, 2, 64, ("b",))
    broken.accept(said)
    assert set(left(broken, logits).values()) == {0.0}  # after b there is one token of repetition only


def test_typical_keeps_the_expected_surprise() -> None:
    probabilities = softmax(LOGITS.astype(np.float64))
    surprise = -np.log(probabilities)
    order = np.argsort(np.abs(surprise - (probabilities * surprise).sum()))
    count = int(np.searchsorted(np.cumsum(probabilities[order]), 0.6, side="right")) + 1
    assert set(left(SamplerChain().typical(0.6), LOGITS)) == set(order[:count].tolist())
    assert len(left(SamplerChain().typical(0.01, min_keep=7), LOGITS)) == 7


def test_xtc_leaves_the_last_of_the_likely_ones() -> None:
    probabilities = softmax(LOGITS.astype(np.float64))
    likely = np.flatnonzero(probabilities >= 0.05)
    assert len(likely) > 2
    keep = likely[probabilities[likely].argmin()]
    chain = SamplerChain().xtc(1.0, 0.05, 0, 1)
    assert set(left(chain, LOGITS)) == set(range(50)) - (set(likely.tolist()) - {int(keep)})
    assert len(left(SamplerChain().xtc(0.0, 0.05, 0, 1), LOGITS)) == 50


def test_top_n_sigma_top_p_and_min_p_are_those_of_the_formulas() -> None:
    sigma = {token for token in range(50) if LOGITS[token] >= LOGITS.max() - 1.5 * LOGITS.std()}
    assert set(left(SamplerChain().top_n_sigma(1.5), LOGITS)) == sigma
    probabilities = softmax(LOGITS.astype(np.float64))
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), 0.7)) + 1
    assert set(left(SamplerChain().top_p(0.7), LOGITS)) == set(order[:count].tolist())
    likely = {token for token in range(50) if probabilities[token] >= 0.1 * probabilities.max()}
    assert set(left(SamplerChain().min_p(0.1), LOGITS)) == likely
    assert len(left(SamplerChain().min_p(1.0, min_keep=3), LOGITS)) == 3


def test_a_dynamic_temperature_follows_the_entropy() -> None:
    probabilities = softmax(LOGITS.astype(np.float64))
    entropy = -(probabilities * np.log(probabilities)).sum() / np.log(50)
    temperature = 0.5 + (1.5 - 0.5) * entropy**2
    found = left(SamplerChain().temperature(1.0, 0.5, 2.0), LOGITS)
    np.testing.assert_allclose([found[token] for token in range(50)], LOGITS / temperature, rtol=1e-4)


def test_logit_bias_chooses_and_forbids(spm_model: Model) -> None:
    best = int(logits_of(spm_model).argmax())
    assert set(draw(spm_model, SamplingParams(temperature=0, logit_bias={77: 100.0}))) == {77}
    assert set(draw(spm_model, SamplingParams(temperature=0, logit_bias={best: -math.inf}))) != {best}
    for values in ({"typical_p": 0.9}, {"mirostat": 1}, {"mirostat": 2}, {"xtc_probability": 1.0}):
        all_but = {token: -math.inf for token in range(spm_model.vocab.n_tokens) if token not in (80, 81)}
        params = SamplingParams(1.0, seed=3, logit_bias=all_but, **OFF, **values)
        assert set(draw(spm_model, params, 40)) <= {80, 81}


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_holds_the_surprise(spm_model: Model, version: int) -> None:
    probabilities = softmax(logits_of(spm_model).astype(np.float64) / 5.0)
    means = []
    for tau in (1.5, 4.0):
        params = SamplingParams(5.0, seed=1, mirostat=version, mirostat_tau=tau)
        # the surprise is that among the tokens it leaves, so the whole distribution's is above
        means.append(float(-np.log2(probabilities[draw(spm_model, params, 300)]).mean()))
    assert means[0] < means[1] - 0.5


def test_ignore_eos_never_ends(spm_model: Model) -> None:
    eos = spm_model.vocab.eos
    assert eos is not None
    wanted = SamplingParams(temperature=0, logit_bias={eos: 100.0})
    assert set(draw(spm_model, wanted)) == {eos}
    assert eos not in draw(spm_model, SamplingParams(temperature=0, logit_bias={eos: 100.0}, ignore_eos=True))


def test_what_does_not_fit_the_vocabulary_is_refused(spm_model: Model) -> None:
    vocab = spm_model.vocab
    with pytest.raises(TokenError, match=f"vocabulary goes to {vocab.n_tokens - 1}"):
        Sampler(SamplingParams(logit_bias={vocab.n_tokens: 1.0}), vocab, 256)
    with pytest.raises(InvalidRequestError, match="forbids every token"):
        Sampler(SamplingParams(logit_bias=dict.fromkeys(range(vocab.n_tokens), -math.inf)), vocab, 256)


def test_the_order_is_that_of_llama_cpp(spm_model: Model) -> None:
    calls: list[str] = []

    class Recorded(SamplerChain):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_") and name not in ("handle", "close", "detach"):
                calls.append(name)
            return super().__getattribute__(name)

    everything = SamplingParams(
        seed=1, typical_p=0.9, top_n_sigma=1.0, dynatemp_range=0.1, repeat_penalty=1.1, dry_multiplier=0.8,
        xtc_probability=0.5,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ziggurat.runtime.sampler.SamplerChain", Recorded)
        build_chain(everything, spm_model.vocab, 256, {}).close()
    assert calls == [
        "logit_bias", "penalties", "dry", "top_n_sigma", "drop_impossible", "top_k", "typical", "top_p", "min_p", "xtc",
        "temperature", "dist",
    ]  # fmt: skip


def test_the_likeliest_token_is_the_chains(spm_model: Model) -> None:
    """Taken without the library's sampler, which gives the same."""
    with Context(spm_model, ContextSettings(n_ctx=64, n_threads=1)) as context:
        batch = context.new_batch()
        for position in range(20):
            batch.clear()
            index = batch.add((5 + 3 * position,), position, 0, output_last=True)
            context.decode(batch)
            chain = SamplerChain().greedy()
            assert context.likeliest(index) == chain.sample(context, index) == int(context.logits(index).argmax())
            chain.close()
