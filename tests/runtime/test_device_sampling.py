"""Samplers within the context's graph choose the tokens that they choose outside, wherever we let them."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest

from ziggurat.runtime.bindings import Context, ContextSettings, KVSettings, Model, SamplerChain, kv, library
from ziggurat.runtime.device_sampling import unsupported, worthwhile
from ziggurat.runtime.errors import DecodeAborted, DecodeError, InvalidRequestError, UnsupportedError
from ziggurat.runtime.sampler import Sampler
from ziggurat.runtime.sampling import SamplingParams

PROMPT = [3 + (7 * n) % 250 for n in range(100)]
SETTINGS = ContextSettings(n_ctx=256, n_ubatch=64, n_threads=1, n_seq_max=3)
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}

SAME: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "default": {},
    "hot": {"temperature": 1.7},
    "top-p": {**OFF, "top_p": 0.8},
    "min-p": {**OFF, "min_p": 0.02},
    "top-k and top-p": {**OFF, "top_k": 7, "top_p": 0.9, "temperature": 1.5},
    "nothing": OFF,
    "biases": {"logit_bias": {260: -100.0, 270: 3.0}, "ignore_eos": True},
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "top-k alone": ({**OFF, "top_k": 40}, "another order"),
    "all of top-k": ({"top_k": 302}, "aborts on a top-k beyond"),
    "dynamic temperature": ({"dynatemp_range": 0.5}, "another order"),
    "min-keep": ({"min_keep": 5}, "min-keep is not heeded"),
    "typical-p": ({"typical_p": 0.5}, "no typical-p and no XTC"),
    "XTC": ({"xtc_probability": 0.5}, "no typical-p and no XTC"),
    "greedy after XTC": ({"xtc_probability": 0.5, "temperature": 0}, "no typical-p and no XTC"),
    "penalties": ({"repeat_penalty": 1.3}, "no penalties"),
    "greedy with penalties": ({"frequency_penalty": 0.3, "temperature": 0}, "no penalties"),
    "DRY": ({"dry_multiplier": 0.8}, "no DRY"),
    "mirostat": ({"mirostat": 2}, "no mirostat"),
    "top-n-sigma": ({"top_n_sigma": 1.0}, "no top-n-sigma"),
    "a grammar": ({"grammar": 'root ::= "a"'}, "a grammar is asked"),
}


def generate(model: Model, params: dict[str, Any], attach_at: int | None, *, n: int = 40, seeds: int = 3) -> list[Any]:
    """Tokens of sequences that are read and decoded together, each with its seed.

    The chains of all but the last are attached before a step, at 0 before the prompts; and how many tokens were chosen
    in the graph.
    """
    samplers = [Sampler(SamplingParams(**params, seed=seed), model.vocab, 256) for seed in range(seeds)]
    chosen: list[list[int]] = [[] for _ in samplers]
    by_device = 0
    with Context(model, SETTINGS) as context:
        batch = context.new_batch()
        for sampler in samplers:
            sampler.prime(PROMPT)
        pending: list[list[int]] = [PROMPT] * seeds
        for step in range(n):
            if step == attach_at:
                for sequence, sampler in enumerate(samplers[:-1]):
                    sampler.attach(context, sequence)
            batch.clear()
            indices = [
                batch.add(tokens, context.last_position(sequence) + 1, sequence, output_last=True)
                for sequence, tokens in enumerate(pending)
            ]
            context.decode(batch)
            for sequence, index in enumerate(indices):
                by_device += library.api().llama_get_sampled_token_ith(context.handle, index) >= 0
                token = samplers[sequence].sample(context, index)
                assert token is not None
                chosen[sequence].append(token)
            pending = [[tokens[-1]] for tokens in chosen]
        for sampler in samplers:
            sampler.close()
        assert not context.samplers
        batch.clear()
        batch.add(pending[0], context.last_position(0) + 1, 0, output_last=True)
        context.decode(batch)
        assert context.logits(0).any()
    return [chosen, by_device]


@pytest.mark.parametrize("name", SAME)
def test_the_tokens_are_the_same(spm_model: Model, name: str) -> None:
    params = SAME[name]
    assert unsupported(SamplingParams(**params), spm_model.vocab.n_tokens) is None
    wanted, none = generate(spm_model, params, None)
    assert none == 0
    # attached before the prompts, which are several ubatches, and in the middle of the answers
    for attach_at, steps in ((0, 40), (1, 39), (9, 31)):
        assert generate(spm_model, params, attach_at) == [wanted, 2 * steps]
    if name != "greedy":
        assert wanted[0] != wanted[1]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_the_same_stays_outside(spm_model: Model, name: str) -> None:
    params, why = OTHERS[name]
    assert why in str(unsupported(SamplingParams(**params), spm_model.vocab.n_tokens))


def test_log_probabilities_stay_outside() -> None:
    assert "log-probabilities" in str(unsupported(SamplingParams(), 1000, logprobs=True))


def test_where_it_is_worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "takes_samplers", lambda: False)
    best: dict[str, Any] = {"n_gpu_layers": None, "n_layer": 32, "has_gpu": True, "kv_budget": False, "drafts": False}
    assert worthwhile(**best)
    assert worthwhile(**{**best, "n_gpu_layers": 33})
    for worse in ({"n_gpu_layers": 32}, {"has_gpu": False}, {"kv_budget": True}, {"drafts": True}):
        assert not worthwhile(**{**best, **worse})
    monkeypatch.setattr(kv, "takes_samplers", lambda: True)
    assert worthwhile(**{**best, "kv_budget": True})


def test_a_chain_has_one_place(spm_model: Model) -> None:
    with Context(spm_model, SETTINGS) as context:
        chain, other = SamplerChain().greedy(), SamplerChain().greedy()
        for sequence in (-1, 3):
            with pytest.raises(InvalidRequestError, match="cannot take this chain"):
                chain.attach(context, sequence)
        chain.attach(context, 0)
        with pytest.raises(InvalidRequestError, match="sequence 0 cannot take"):
            other.attach(context, 0)
        with pytest.raises(InvalidRequestError, match="sequence 1 cannot take"):
            chain.attach(context, 1)
        chain.detach()
        chain.detach()
        with pytest.raises(InvalidRequestError, match="cannot take"):
            chain.attach(context, 0)
        other.attach(context, 0)
    other.close()
    chain.close()
    with pytest.raises(UnsupportedError, match="does not let"), Context(spm_model, SETTINGS) as context:
        SamplerChain().attach(context, 0)


def test_chains_that_are_let_go_of(spm_model: Model) -> None:
    with Context(spm_model, SETTINGS) as context:
        SamplerChain().greedy().attach(context, 0)
        gc.collect()
        batch = context.new_batch()
        batch.add(PROMPT, 0, 0, output_last=True)
        context.decode(batch)
        batch.clear()
        batch.add([5, 6, 7], len(PROMPT), 0, output_last=True)
        batch.want(0, 3)
        with pytest.raises(DecodeError, match="at most 2 outputs per sequence"):
            context.decode(batch)


def test_a_batch_that_was_aborted_is_drawn_anew(spm_model: Model) -> None:
    def tokens(*, attach: bool, abort_at: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=3), spm_model.vocab, 256)
        chosen = [5]
        with Context(spm_model, SETTINGS) as context:
            batch = context.new_batch()
            if attach:
                sampler.attach(context, 0)
            for position in range(20):
                batch.clear()
                index = batch.add(chosen[-1:], position, 0, output_last=True)
                if position == abort_at:
                    context.abort.set()
                    with pytest.raises(DecodeAborted):
                        context.decode(batch)
                    context.abort.clear()
                context.decode(batch)
                token = sampler.sample(context, index)
                assert token is not None
                chosen.append(token)
            sampler.close()
        return chosen

    assert tokens(attach=True, abort_at=7) == tokens(attach=False, abort_at=-1)


def generate_with_a_budget(model: Model, params: dict[str, Any], *, attach: bool) -> list[list[int]]:
    """Three sequences whose prompts are read in steps one after the other, while those before them go on."""
    samplers = [Sampler(SamplingParams(**params, seed=seed), model.vocab, 256) for seed in range(3)]
    chosen: list[list[int]] = []
    with Context(model, replace(SETTINGS, kv=KVSettings((60, 40), window=16))) as context:
        batch = context.new_batch()

        def decode(n: int) -> None:
            for _ in range(n):
                batch.clear()
                indices = [
                    batch.add(tokens[-1:], context.last_position(sequence) + 1, sequence, output_last=True)
                    for sequence, tokens in enumerate(chosen)
                ]
                if indices:
                    context.decode(batch)
                for sequence, index in enumerate(indices):
                    token = samplers[sequence].sample(context, index)
                    assert token is not None
                    chosen[sequence].append(token)

        for sequence, sampler in enumerate(samplers):
            context.prompt_begin(sequence, [*PROMPT, *PROMPT, 3 + sequence])
            while not context.prompt_step(sequence, 1).finished:
                decode(1)
            token = sampler.sample(context, -1)
            assert token is not None
            chosen.append([token])
            if attach:
                sampler.attach(context, sequence)
        decode(40)
        for sampler in samplers:
            sampler.close()
    return chosen


@pytest.mark.usefixtures("budgets")
@pytest.mark.parametrize("name", SAME)
def test_the_tokens_are_the_same_with_a_budget(spm_model: Model, name: str) -> None:
    if not kv.takes_samplers():
        pytest.skip("this llama.cpp cuts graphs without regard to samplers")
    wanted = generate_with_a_budget(spm_model, SAME[name], attach=False)
    assert generate_with_a_budget(spm_model, SAME[name], attach=True) == wanted


@pytest.mark.usefixtures("budgets")
def test_not_with_a_budget_and_an_older_library(spm_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "takes_samplers", lambda: False)
    with Context(spm_model, replace(SETTINGS, kv=KVSettings((60, 40), window=16))) as context:
        with pytest.raises(UnsupportedError, match="no samplers within a context that has a KV budget"):
            SamplerChain().greedy().attach(context, 0)


@pytest.mark.parametrize(
    ("version", "takes"),
    [
        (None, False),
        ("0.3.36+ziggurat.4", False),
        ("0.3.36+ziggurat.5", True),
        ("0.3.36+ziggurat.12", True),
        ("x", False),
    ],
)
def test_the_library_that_takes_samplers(version: str | None, takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "probe", lambda: library.LibraryInfo("", "", "", version))
    assert kv.takes_samplers() == takes
