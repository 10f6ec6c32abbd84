"""Speculation in the engine: what is generated is what would have been without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_models
from helpers.greedy import Answer, agree, answer, shared
from ziggurat.runtime.bindings import Context
from ziggurat.runtime.budget import Budget
from ziggurat.runtime.engine import GenerationRequest, speculation
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.errors import DecodeError
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
POLICY = KVPolicy(Budget(rows=64), window=16, slack=32)


def prompt(count: int, salt: int = 0) -> tuple[int, ...]:
    return tuple(262 + (n * (salt + 3)) % 11 for n in range(count))


def ask(tokens: Sequence[int], n: int, **values: Any) -> GenerationRequest:
    return GenerationRequest(tokens=tuple(tokens), max_tokens=n, logprobs=2, **{"sampling": GREEDY, **values})


def finish(engine: LlamaEngine, request: GenerationRequest) -> Answer:
    return answer(engine.stream(request))


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft as much as there may be, whether it pays on this machine or not."""
    monkeypatch.setattr(speculation, "shares", lambda _paces, limits, _costs, **_: list(limits))


@contextmanager
def serving(path: Path, **values: Any) -> Iterator[LlamaEngine]:
    settings = EngineSettings(n_ctx=512, n_ubatch=64, threads=1, parallel=4, **values)
    with LlamaEngine(path, settings) as engine:
        engine.load()
        yield engine


@pytest.fixture(params=["whole", "budget"])
def kv(request: pytest.FixtureRequest) -> KVPolicy | None:
    if request.param == "whole":
        return None
    request.getfixturevalue("budgets")
    return POLICY


@pytest.mark.parametrize("drafter", ["lookup", "model", "both"])
def test_what_is_generated_is_what_would_have_been(spm_path: Path, kv: KVPolicy | None, drafter: str) -> None:
    # where generated tokens fill the layers, what a sequence keeps depends on its neighbours too
    count = 150 if kv is None else 32
    requests = [ask(prompt(40 + 90 * place, place), count) for place in range(4)]
    with serving(spm_path, kv=kv) as engine:
        alone = [finish(engine, request) for request in requests]
    model = spm_path if drafter != "lookup" else None
    with serving(spm_path, kv=kv, prompt_lookup=drafter != "model", draft_model=model) as engine:
        streams = [engine.stream(request) for request in requests]
        together = [answer(stream) for stream in streams]
    assert shared(alone) > 2 * count
    for found, wanted in zip(together, alone, strict=True):
        assert agree(found, wanted)
        stats = found.end.stats
        assert stats.generated_tokens == len(found.tokens)
        assert 0 < stats.accepted_tokens <= stats.drafted_tokens
        assert stats.decode_steps < stats.generated_tokens - 1


@pytest.mark.usefixtures("budgets")
def test_rows_are_selected_when_they_would_have_been(spm_path: Path) -> None:
    request = ask(prompt(300), 200)
    with serving(spm_path, kv=POLICY) as engine:
        wanted = finish(engine, request)
    with serving(spm_path, kv=POLICY, prompt_lookup=True, draft_max=15) as engine:
        found = finish(engine, request)
    assert wanted.tie > 120
    assert agree(found, wanted)
    assert found.end.stats.evicted_rows == wanted.end.stats.evicted_rows
    assert found.end.stats.accepted_tokens > 0


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.7, seed=3),
        SamplingParams(temperature=0.9, top_k=5, repeat_penalty=1.2, seed=4),
        SamplingParams(temperature=0.8, mirostat=2, seed=5),
    ],
)
def test_a_seed_gives_the_same_text(spm_path: Path, sampling: SamplingParams) -> None:
    request = ask(prompt(120), 60, sampling=sampling)
    with serving(spm_path, type_k="f32", type_v="f32") as engine:
        wanted = finish(engine, request).tokens
    with serving(spm_path, type_k="f32", type_v="f32", draft_model=spm_path) as engine:
        found = finish(engine, request)
    assert found.tokens == wanted
    assert found.end.stats.accepted_tokens > 0


def test_a_request_can_go_without(spm_path: Path) -> None:
    with serving(spm_path, prompt_lookup=True) as engine:
        drafted = finish(engine, ask(prompt(100), 40)).end.stats.drafted_tokens
        assert drafted > 0
        assert finish(engine, ask(prompt(100), 40, speculate=False)).end.stats.drafted_tokens == 0
        assert engine.stats().drafted_tokens == drafted


def test_a_conversation_goes_on_after_drafts(spm_path: Path, kv: KVPolicy | None) -> None:
    first = ask(prompt(200), 30, conversation="c")
    with serving(spm_path, kv=kv) as engine:
        wanted = finish(engine, first)
        second = ask([*prompt(200), *wanted.tokens, *prompt(20, 5)], 30, conversation="c")
        wanted_next = finish(engine, second)
    with serving(spm_path, kv=kv, prompt_lookup=True) as engine:
        assert agree(finish(engine, first), wanted)
        found = finish(engine, second)
    assert found.end.stats.drafted_tokens > 0
    assert found.end.stats.reused_tokens == wanted_next.end.stats.reused_tokens == 200 + 29
    assert agree(found, wanted_next)


def test_a_draft_that_fails_is_no_fault_of_the_request(spm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(spm_path) as engine:
        wanted = finish(engine, ask(prompt(60), 20))
    with serving(spm_path, draft_model=spm_path) as engine:
        drafts = engine._worker.scheduler._drafting.speculation._sources[0].drafter.context  # type: ignore[union-attr]
        original = Context.decode

        def decode(context: Context, batch: Any) -> None:
            if context is drafts:
                raise DecodeError("out of memory", -2)
            original(context, batch)

        monkeypatch.setattr(Context, "decode", decode)
        found = finish(engine, ask(prompt(60), 20))
    assert agree(found, wanted)
    assert found.end.stats.drafted_tokens == 0


def test_tiny_models_can_draft_for_each_other(spm_path: Path, tmp_path: Path) -> None:
    other = tiny_models.write_model(tmp_path / "other.gguf", tiny_models.Shape(n_layer=1))
    with serving(spm_path) as engine:
        wanted = finish(engine, ask(prompt(60), 60))
    with serving(spm_path, draft_model=other) as engine:
        found = finish(engine, ask(prompt(60), 60))
    assert agree(found, wanted)
    assert found.end.stats.drafted_tokens > 0
