from __future__ import annotations

import math
from typing import Any

import pytest

from ziggurat.runtime.bindings import Context, ContextSettings, Model
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.sampling import SamplingParams, build_chain


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
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="must be"):
        SamplingParams(**values)


def draw(model: Model, params: SamplingParams, count: int = 20) -> list[int]:
    with Context(model, ContextSettings(n_ctx=256, n_threads=1)) as context:
        batch = context.new_batch()
        index = batch.add([1, 5, 9], 0, 0, output_last=True)
        context.decode(batch)
        chain = build_chain(params, model.vocab)
        tokens = [chain.sample(context, index) for _ in range(count)]
        chain.close()
        return tokens


def test_a_seed_repeats_and_another_differs(spm_model: Model) -> None:
    params = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=7)
    assert draw(spm_model, params) == draw(spm_model, params)
    assert draw(spm_model, params) != draw(spm_model, SamplingParams(1.5, 0, 1.0, 0.0, seed=8))


def test_temperature_zero_and_top_k_one_take_the_likeliest(spm_model: Model) -> None:
    greedy = draw(spm_model, SamplingParams(temperature=0), 3)
    assert len(set(greedy)) == 1
    assert draw(spm_model, SamplingParams(temperature=2.0, top_k=1, seed=1), 3) == greedy
    assert draw(spm_model, SamplingParams(temperature=2.0, top_k=0, top_p=1e-6, min_p=0, seed=1), 3) == greedy
    assert draw(spm_model, SamplingParams(temperature=2.0, top_k=0, top_p=1, min_p=1, seed=1), 3) == greedy


def test_seeded_fixes_a_seed_once() -> None:
    seeded = SamplingParams().seeded()
    assert seeded.seed is not None
    assert seeded.seeded() == seeded
