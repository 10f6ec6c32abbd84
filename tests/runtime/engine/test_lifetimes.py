"""What stays and what goes on the real library: conversations and their beginnings, engines, and what they held."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_models, unfit_models
from ziggurat.runtime.bindings import Batch, Context, Model
from ziggurat.runtime.budget import Budget
from ziggurat.runtime.engine import FinishEvent, GenerationRequest, Message, TokenEvent
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.errors import ConversationError, EngineClosedError, ModelFileError
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.sampler import Sampler
from ziggurat.runtime.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
POLICY = KVPolicy(Budget(rows=96), window=16, slack=32)


def tokens(count: int, salt: int = 0) -> tuple[int, ...]:
    return tuple(5 + (n * n + 7 * salt + n * salt) % 90 for n in range(count))


def ask(prompt: tuple[int, ...], n: int = 12, **values: Any) -> GenerationRequest:
    return GenerationRequest(tokens=prompt, max_tokens=n, sampling=GREEDY, **values)


def finish(engine: LlamaEngine, request: GenerationRequest) -> tuple[list[int], FinishEvent]:
    *events, last = engine.stream(request)
    assert isinstance(last, FinishEvent)
    return [event.token for event in events if isinstance(event, TokenEvent)], last


@pytest.fixture(params=["whole", "budget"])
def settings(request: pytest.FixtureRequest) -> EngineSettings:
    if request.param == "budget":
        request.getfixturevalue("budgets")
    kv = POLICY if request.param == "budget" else None
    return EngineSettings(n_ctx=512, n_ubatch=64, threads=1, kv=kv, parallel=2, cached=1, queue_limit=4)


@pytest.fixture
def engine(spm_path: Path, settings: EngineSettings) -> Iterator[LlamaEngine]:
    with LlamaEngine(spm_path, settings) as engine:
        engine.load()
        yield engine


def test_a_system_prompt_is_read_once(budgets: None, chat_path: Path) -> None:
    """By the first conversation; every other one begins with a copy, whatever the ones before were about."""
    settings = EngineSettings(n_ctx=768, n_ubatch=64, threads=1, kv=POLICY, parallel=1, cached=1)
    system = Message("system", "You are the man in the hat. " * 2)
    reused = []
    with LlamaEngine(chat_path, settings) as engine:
        engine.load()
        for question in ("the thing in the hat " * 20, "a " * 200, "in the inn " * 30, "hats"):
            request = GenerationRequest(
                messages=(system, Message("user", question)), max_tokens=6, sampling=GREEDY, conversation=question
            )
            answer, done = finish(engine, request)
            reused.append(done.stats.reused_tokens)
    assert reused[0] == 0
    assert reused[1] == reused[2] == reused[3] > 50


def test_nothing_is_left_after_thirty_engines(spm_path: Path, settings: EngineSettings) -> None:
    kinds = (Model, Context, Batch, Sampler, LlamaEngine)

    def alive() -> int:
        gc.collect()
        return sum(type(thing) in kinds for thing in gc.get_objects())

    before, threads = alive(), threading.active_count()
    for count in range(30):
        engine = LlamaEngine(spm_path, settings)
        engine.load()
        stream = engine.stream(ask(tokens(40, count), 3))
        if count % 3:
            assert isinstance(list(stream)[-1], FinishEvent)
        if count % 2:
            engine.close()  # else whoever lets go of it has it closed
        del engine, stream
    assert alive() == before
    assert threading.active_count() == threads


def test_closing_with_many_requests(spm_path: Path, settings: EngineSettings) -> None:
    engine = LlamaEngine(spm_path, settings)
    engine.load()
    endless = SamplingParams(temperature=0, ignore_eos=True)
    requests = [GenerationRequest(tokens=tokens(200, salt), sampling=endless) for salt in range(6)]
    streams = [engine.stream(request) for request in requests]
    next(streams[0])
    engine.close()
    for stream in streams[1:]:
        with pytest.raises(EngineClosedError):
            list(stream)
    stats = engine.stats()
    assert (stats.running, stats.queued, stats.failed) == (0, 0, 6)


def test_an_engine_whose_file_was_missing_loads_when_it_is_there(tmp_path: Path, settings: EngineSettings) -> None:
    path = tmp_path / "late.gguf"
    with LlamaEngine(path, settings) as engine:
        with pytest.raises(ModelFileError):
            engine.load()
        tiny_models.write_model(path)
        engine.load()
        assert finish(engine, ask(tokens(9), 3))[1].reason == "length"


def test_a_conversation_goes_on_from_a_file(engine: LlamaEngine, tmp_path: Path, spm_path: Path) -> None:
    settings = engine._settings
    answer, _ = finish(engine, ask(tokens(300), conversation="a"))
    path = tmp_path / "a.kv"
    n_tokens = engine.save("a", path)
    assert n_tokens == 300 + len(answer) - 1
    kept = engine.kept("a")
    further = ask((*tokens(300), *answer, *tokens(20, 5)), conversation="a")
    wanted, done = finish(engine, further)
    assert done.stats.reused_tokens == n_tokens
    with LlamaEngine(spm_path, settings) as other:
        other.load()
        assert other.restore("b", path) == n_tokens
        again = other.kept("b")
        assert again.tokens == kept.tokens
        assert [layer.tolist() for layer in again.positions] == [layer.tolist() for layer in kept.positions]
        found, done = finish(other, ask(further.tokens or (), conversation="b"))
        assert (found, done.stats.reused_tokens) == (wanted, n_tokens)
        with pytest.raises(ConversationError, match="holds no conversation 'a'"):
            other.save("a", path)


def test_a_conversation_that_runs_is_not_touched(engine: LlamaEngine, tmp_path: Path) -> None:
    finish(engine, ask(tokens(50), conversation="a"))
    engine.save("a", tmp_path / "a.kv")
    endless = SamplingParams(temperature=0, ignore_eos=True)
    running = engine.stream(GenerationRequest(tokens=tokens(60, 1), sampling=endless, conversation="a"))
    next(running)
    with pytest.raises(ConversationError, match="is running a request"):
        engine.save("a", tmp_path / "b.kv")
    with pytest.raises(ConversationError, match="is running a request"):
        engine.restore("a", tmp_path / "a.kv")
    running.cancel()
    list(running)
    assert engine.restore("a", tmp_path / "a.kv") > 50


def test_a_model_that_cannot_go_back_gets_no_drafts(tmp_path: Path) -> None:
    path = unfit_models.write_mamba(tmp_path / "mamba.gguf")
    settings = EngineSettings(n_ctx=256, threads=1, parallel=2, cached=1)
    answers = []
    for prompt_lookup in (False, True):
        with LlamaEngine(path, EngineSettings(**{**vars(settings), "prompt_lookup": prompt_lookup})) as engine:
            engine.load()
            first, _ = finish(engine, ask((5, 6, 7) * 10, 20, conversation="a"))
            second, done = finish(engine, ask(((5, 6, 7) * 10 + (*first, 8)), 5, conversation="a"))
            assert done.stats.reused_tokens == 30 + len(first) - 1
            answers.append((first, second))
            assert engine.stats().prompt_tokens > 0
    assert answers[0] == answers[1]


def test_a_window_that_slid_on_is_not_gone_back_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is given up in the middle: the rows before it that its window overwrote are not used again."""
    shape = tiny_models.Shape(arch="gemma3", n_layer=6, head_dim=32, sliding_window=16)
    path = tiny_models.write_model(tmp_path / "gemma3.gguf", shape)
    original = Context.decode
    start = tokens(100)
    with LlamaEngine(path, EngineSettings(n_ctx=768, n_ubatch=64, threads=1, parallel=1)) as engine:
        engine.load()
        wanted, _ = finish(engine, ask((*start, 20, 21)))
        finish(engine, ask(tokens(9, 2)))
        finish(engine, ask(start, 1))
        long_one = ask((*start, *tokens(600, 3)))

        def decode(context: Context, batch: Batch) -> None:
            if max(batch._positions[: len(batch)]) > 500:
                engine.cancel(long_one.id)
            original(context, batch)

        monkeypatch.setattr(Context, "decode", decode)
        assert finish(engine, long_one)[1].reason == "cancelled"
        assert finish(engine, ask((*start, 20, 21)))[0] == wanted


def test_a_beginning_is_copied_from_a_window_only_while_it_is_there(tmp_path: Path) -> None:
    shape = tiny_models.Shape(arch="gemma3", n_layer=6, head_dim=32, sliding_window=16)
    path = tiny_models.write_model(tmp_path / "gemma3.gguf", shape)
    start = tokens(100)
    endless = SamplingParams(temperature=0, ignore_eos=True)
    with LlamaEngine(path, EngineSettings(n_ctx=768, n_ubatch=64, threads=1, parallel=2)) as engine:
        engine.load()
        wanted, _ = finish(engine, ask((*start, 20, 21)))
        finish(engine, ask(tokens(9, 2)))
        running = engine.stream(GenerationRequest(tokens=(*start, 7, 8), sampling=endless))
        for _ in range(400):
            next(running)
        assert finish(engine, ask((*start, 20, 21)))[0] == wanted
        running.cancel()
