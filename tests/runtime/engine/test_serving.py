"""Many requests at once on the real library, each against the same request alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.greedy import Answer, agree, answer, shared
from ziggurat.runtime import device_sampling
from ziggurat.runtime.bindings import Context
from ziggurat.runtime.budget import Budget
from ziggurat.runtime.engine import FinishEvent, GenerationRequest, TokenEvent
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.errors import QueueFullError, RequestTimeoutError
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.sampler import Sampler
from ziggurat.runtime.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
POLICY = KVPolicy(Budget(rows=96), window=16, slack=32)


def tokens(count: int, salt: int = 0) -> tuple[int, ...]:
    return tuple(5 + (n * n + 7 * salt + n * salt) % 90 for n in range(count))


def ask(prompt: tuple[int, ...], n: int = 12, **values: Any) -> GenerationRequest:
    return GenerationRequest(tokens=prompt, max_tokens=n, **{"sampling": GREEDY, **values})


def finish(engine: LlamaEngine, request: GenerationRequest) -> tuple[list[int], FinishEvent]:
    *events, last = engine.stream(request)
    assert isinstance(last, FinishEvent)
    return [event.token for event in events if isinstance(event, TokenEvent)], last


@pytest.fixture(params=["whole", "budget"])
def kv(request: pytest.FixtureRequest) -> KVPolicy | None:
    if request.param == "whole":
        return None
    request.getfixturevalue("budgets")
    return POLICY


@pytest.fixture
def engine(spm_path: Path, kv: KVPolicy | None) -> Iterator[LlamaEngine]:
    settings = EngineSettings(n_ctx=768, n_ubatch=64, threads=1, kv=kv, parallel=4, cached=1, queue_limit=20)
    with LlamaEngine(spm_path, settings) as engine:
        engine.load()
        yield engine


def test_eight_requests_get_what_each_gets_alone(engine: LlamaEngine) -> None:
    lengths = (300, 5, 90, 700, 1, 140, 260, 33)
    requests = [ask(tokens(length, salt), 20, logprobs=2) for salt, length in enumerate(lengths)]
    alone = [
        answer(engine.stream(replace(request, reread=True, id=str(place)))) for place, request in enumerate(requests)
    ]
    streams = [engine.stream(request) for request in requests]
    together = [answer(stream) for stream in streams]
    assert all(map(agree, together, alone))
    assert shared(alone) > 100
    stats = engine.stats()
    assert (stats.finished, stats.running, stats.queued, stats.failed) == (16, 0, 0, 0)
    assert all(0 < slot.kv_bytes == slot.rows * 2 * 2 * 16 * 2 for slot in stats.slots[:4])
    assert stats.decode_tokens_per_second > 0 < stats.prefill_tokens_per_second
    assert stats.kv_bytes <= stats.kv_bytes_allocated <= stats.kv_bytes_planned <= 1.05 * stats.kv_bytes_allocated


def test_the_same_prompt_is_read_once_for_all_that_wait(engine: LlamaEngine) -> None:
    """With a budget its rows are evicted, so that only a copy at its very end goes on as it does."""
    request = ask(tokens(400, 1), 20, logprobs=2)
    streams = [engine.stream(replace(request, id=name)) for name in "abc"]
    together = [answer(stream) for stream in streams]
    assert sorted(each.end.stats.reused_tokens for each in together) == [0, 400, 400]
    alone = answer(engine.stream(replace(request, reread=True, id="d")))
    assert all(agree(each, alone) for each in together) and alone.tie > 10


def test_short_prompts_together_get_what_each_gets_alone(engine: LlamaEngine) -> None:
    requests = [ask(tokens(length, salt), 12, logprobs=2) for salt, length in enumerate((9, 17, 30, 12))]
    alone = [answer(engine.stream(replace(each, reread=True, id=str(n)))) for n, each in enumerate(requests)]
    streams = [engine.stream(request) for request in requests]
    assert all(map(agree, [answer(stream) for stream in streams], alone))


def test_a_second_turn_reads_only_what_is_new(engine: LlamaEngine, kv: KVPolicy | None) -> None:
    first = tokens(400)
    first_answer, done = finish(engine, ask(first, conversation="a"))
    assert done.stats.reused_tokens == 0
    assert (done.stats.evicted_rows > 0) == (kv is not None)
    second = (*first, *first_answer, *tokens(30, 3))
    _, done = finish(engine, ask(second, conversation="a"))
    assert done.stats.reused_tokens == 400 + len(first_answer) - 1  # the last one was chosen and never computed
    again = answer(engine.stream(ask(second, conversation="a", reread=True, logprobs=2)))
    assert again.end.stats.reused_tokens == (len(second) - 1 if kv is None else 0)
    assert agree(again, answer(engine.stream(ask(second, reread=True, logprobs=2))))


def test_another_question_about_the_same_text(engine: LlamaEngine, kv: KVPolicy | None) -> None:
    """What was kept for one question does not serve another; where all is kept the text is not read again."""
    text = tokens(400)
    finish(engine, ask((*text, 7, 8, 9)))
    found = answer(engine.stream(ask((*text, 20, 21), logprobs=2)))
    assert found.end.stats.reused_tokens == (400 if kv is None else 0)
    assert agree(found, answer(engine.stream(ask((*text, 20, 21), reread=True, logprobs=2))))


def test_a_short_text_serves_every_question(engine: LlamaEngine) -> None:
    text = tokens(60)
    finish(engine, ask((*text, 7, 8, 9), 4))
    _, done = finish(engine, ask((*text, 20, 21), 4))
    assert done.stats.reused_tokens == 60
    assert done.stats.evicted_rows == 0


def test_requests_beyond_the_queue_are_refused(engine: LlamaEngine) -> None:
    streams = [engine.stream(ask(tokens(300, salt), 50)) for salt in range(24)]
    with pytest.raises(QueueFullError, match="20 requests are waiting") as refused:
        engine.stream(ask(tokens(3)))
    assert refused.value.retry_after_s > 0
    assert engine.stats().refused == 1
    for stream in streams:
        stream.cancel()
    ends = [list(stream)[-1] for stream in streams]
    assert all(isinstance(end, FinishEvent) and end.reason == "cancelled" for end in ends)
    assert finish(engine, ask(tokens(3), 2))[1].reason == "length"


def test_metadata_are_told(engine: LlamaEngine) -> None:
    metadata = engine.load().metadata
    assert metadata["general.architecture"] == "llama"
    assert all(isinstance(value, (str, int, float)) for value in metadata.values())


def test_a_request_that_takes_too_long_is_ended(engine: LlamaEngine) -> None:
    endless = SamplingParams(temperature=0, ignore_eos=True)
    with pytest.raises(RequestTimeoutError, match="longer than the 0.05 s"):
        list(engine.stream(ask(tokens(300), 10**6, sampling=endless, timeout_s=0.05)))
    assert finish(engine, ask(tokens(3), 2))[1].reason == "length"


def test_cancelling_some_leaves_the_others_alone(engine: LlamaEngine) -> None:
    wanted = answer(engine.stream(ask(tokens(200, 1), 30, reread=True, logprobs=2)))
    stays = engine.stream(ask(tokens(200, 1), 30, reread=True, logprobs=2))
    others = [engine.stream(ask(tokens(500, salt), 200)) for salt in (2, 3, 4)]
    next(iter(others[0]))
    for other in others:
        other.cancel()
    assert agree(answer(stays), wanted)
    assert [list(other)[-1].reason for other in others] == ["cancelled"] * 3  # type: ignore[union-attr]


def test_many_threads_get_what_they_asked_for(engine: LlamaEngine) -> None:
    prompts = [tokens(20 + 30 * salt, salt) for salt in range(8)]
    requests = [ask(prompt, 8, reread=True, logprobs=2) for prompt in prompts]
    wanted = [answer(engine.stream(request)) for request in requests]
    found: dict[int, Answer] = {}

    def call(place: int) -> None:
        found[place] = answer(engine.stream(requests[place]))

    threads = [threading.Thread(target=call, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(agree(found[place], wanted[place]) for place in range(8))


def test_samplers_can_be_where_the_logits_are(
    engine: LlamaEngine, kv: KVPolicy | None, spm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; here the device is the CPU."""
    samplings = [GREEDY, SamplingParams(seed=1), SamplingParams(seed=2, top_k=5, repeat_penalty=1.2)]
    requests = [ask(tokens(80, salt), 80, sampling=how) for salt, how in enumerate(samplings)]
    wanted = [finish(engine, request)[0] for request in requests]
    attached = []
    original = Sampler.attach

    def attach(sampler: Sampler, context: Context, sequence: int) -> None:
        attached.append(sampler.params)
        original(sampler, context, sequence)

    monkeypatch.setattr(Sampler, "attach", attach)
    monkeypatch.setattr(device_sampling, "worthwhile", lambda **_values: True)
    settings = EngineSettings(n_ctx=768, n_ubatch=64, threads=1, kv=kv, parallel=4)
    with LlamaEngine(spm_path, settings) as other:
        other.load()
        streams = [other.stream(request) for request in requests]
        found = [[event.token for event in stream if isinstance(event, TokenEvent)] for stream in streams]
    assert found == wanted
    assert len(attached) == 2  # penalties are on the CPU


def test_whatever_is_asked_of_a_token_it_is_what_it_is_alone(engine: LlamaEngine) -> None:
    """Seeds, penalties, stop strings, grammars and logprobs, at once; and one among them that is cancelled."""
    warm = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    requests = [
        ask(tokens(90, 1), 30, sampling=SamplingParams(**warm, seed=7)),
        ask(tokens(90, 1), 30, sampling=SamplingParams(**warm, seed=8), logprobs=3),
        ask(tokens(300, 2), 30, sampling=SamplingParams(temperature=0.8, repeat_penalty=1.3, seed=9)),
        ask(tokens(50, 3), 30, sampling=SamplingParams(temperature=0, grammar='root ::= "the " [a-c]{3,9}')),
        ask(tokens(20, 4), 30, sampling=SamplingParams(temperature=0.9, mirostat=2, seed=4)),
        ask(tokens(120, 5), 30, stop=("a", "he", "t")),
        ask(tokens(33, 6), 30, logprobs=0),
        ask(tokens(700, 7), 4),
    ]

    def results(events: list[Any]) -> tuple[Any, ...]:
        *made, last = events
        chances = [event.logprobs.chosen.logprob for event in made if event.logprobs is not None]
        text = "".join(event.text for event in events)
        return [event.token for event in made], text, last.reason, chances

    alone = [results(list(engine.stream(replace(request, id=f"alone {n}", reread=True)))) for n, request in
             enumerate(requests)]  # fmt: skip
    gone = engine.stream(ask(tokens(200, 8), 10**6))
    streams = [engine.stream(replace(request, reread=True)) for request in requests]
    gone.cancel()
    for stream, wanted in zip(streams, alone, strict=True):
        *exact, chances = results(list(stream))
        assert exact == list(wanted[:3])
        assert chances == pytest.approx(wanted[3], abs=2e-3)  # batches of other sizes round otherwise
    list(gone)
