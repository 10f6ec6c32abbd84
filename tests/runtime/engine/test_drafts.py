"""Speculation in the engine: what is generated is what would have been without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_models
from ziggurat.runtime.bindings import Context
from ziggurat.runtime.budget import Budget
from ziggurat.runtime.engine import FinishEvent, GenerationRequest, TokenEvent
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.errors import DecodeError
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.sampling import SamplingParams

POLICY = KVPolicy(Budget(rows=64), window=16, slack=32)


def prompt(count: int, salt: int = 0) -> tuple[int, ...]:
    return tuple(262 + (n * (salt + 3)) % 11 for n in range(count))


def ask(tokens: Sequence[int], n: int, **values: Any) -> GenerationRequest:
    sampling = values.pop("sampling", SamplingParams(temperature=0))
    return GenerationRequest(tokens=tuple(tokens), max_tokens=n, sampling=sampling, **values)


def finish(engine: LlamaEngine, request: GenerationRequest) -> tuple[list[int], FinishEvent]:
    *events, last = engine.stream(request)
    assert isinstance(last, FinishEvent)
    return [event.token for event in events if isinstance(event, TokenEvent)], last


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


SAMPLINGS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, seed=3),
    SamplingParams(temperature=0.9, top_k=5, repeat_penalty=1.2, seed=4),
    SamplingParams(temperature=0.8, mirostat=2, seed=5),
)


@pytest.mark.parametrize("drafter", ["lookup", "model", "both"])
def test_what_is_generated_is_what_would_have_been(spm_path: Path, kv: KVPolicy | None, drafter: str) -> None:
    requests = [ask(prompt(40 + 90 * place, place), 150, sampling=how) for place, how in enumerate(SAMPLINGS)]
    with serving(spm_path, kv=kv) as engine:
        alone = [finish(engine, request)[0] for request in requests]
    how: dict[str, Any] = {
        "prompt_lookup": drafter != "model",
        "draft_model": spm_path if drafter != "lookup" else None,
    }
    with serving(spm_path, kv=kv, **how) as engine:
        streams = [engine.stream(request) for request in requests]
        together = [list(stream) for stream in streams]
    for events, tokens in zip(together, alone, strict=True):
        last = events[-1]
        assert isinstance(last, FinishEvent)
        assert [event.token for event in events if isinstance(event, TokenEvent)] == tokens
        assert last.stats.generated_tokens == len(tokens)
    ends = [events[-1].stats for events in together if isinstance(events[-1], FinishEvent)]
    assert sum(end.accepted_tokens for end in ends) > 0
    assert all(end.accepted_tokens <= end.drafted_tokens for end in ends)
    assert ends[0].decode_steps < ends[0].generated_tokens - 1


def test_a_request_can_go_without(spm_path: Path) -> None:
    with serving(spm_path, prompt_lookup=True) as engine:
        drafted = finish(engine, ask(prompt(100), 40))[1].stats.drafted_tokens
        assert drafted > 0
        assert finish(engine, ask(prompt(100), 40, speculate=False))[1].stats.drafted_tokens == 0
        assert engine.stats().drafted_tokens == drafted


def test_a_conversation_goes_on_after_drafts(spm_path: Path, kv: KVPolicy | None) -> None:
    def turns(engine: LlamaEngine) -> list[list[int]]:
        first = finish(engine, ask(prompt(200), 30, conversation="c"))[0]
        text = [*prompt(200), *first, *prompt(20, 5)]
        second, last = finish(engine, ask(text, 30, conversation="c"))
        assert last.stats.reused_tokens == 200 + 29
        return [first, second]

    with serving(spm_path, kv=kv) as engine:
        wanted = turns(engine)
    with serving(spm_path, kv=kv, prompt_lookup=True) as engine:
        assert turns(engine) == wanted


def test_a_draft_that_fails_is_no_fault_of_the_request(spm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(spm_path) as engine:
        wanted = finish(engine, ask(prompt(60), 20))[0]
    with serving(spm_path, draft_model=spm_path) as engine:
        drafts = engine._worker.scheduler._drafting._drafter.context  # type: ignore[union-attr]
        original = Context.decode

        def decode(context: Context, batch: Any) -> None:
            if context is drafts:
                raise DecodeError("out of memory", -2)
            original(context, batch)

        monkeypatch.setattr(Context, "decode", decode)
        found, last = finish(engine, ask(prompt(60), 20))
    assert (found, last.stats.drafted_tokens) == (wanted, 0)


def test_tiny_models_can_draft_for_each_other(spm_path: Path, tmp_path: Path) -> None:
    other = tiny_models.write_model(tmp_path / "other.gguf", tiny_models.Shape(n_layer=1))
    with serving(spm_path) as engine:
        wanted = finish(engine, ask(prompt(60), 60))[0]
    with serving(spm_path, draft_model=other) as engine:
        assert finish(engine, ask(prompt(60), 60))[0] == wanted
