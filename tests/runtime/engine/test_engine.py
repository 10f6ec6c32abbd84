from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_models
from helpers.fake_engine import FakeEngine
from ziggurat.runtime.bindings import Context, ContextSettings, Model
from ziggurat.runtime.engine import Engine, Event, FinishEvent, GenerationRequest, Message, TokenEvent
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.errors import (
    ContextError,
    DecodeError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    MemoryShortageError,
    ModelFileError,
    ModelLoadError,
    PromptTooLongError,
    TemplateError,
    TokenError,
    UnsupportedError,
)
from ziggurat.runtime.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
Decode = Callable[[Context, Any], None]


def ask(prompt: str = "the man and", n: int | None = 12, **values: Any) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, max_tokens=n, **{"sampling": GREEDY, **values})


def collect(stream: Iterator[Event]) -> tuple[str, list[int], FinishEvent]:
    events = list(stream)
    *tokens, last = events
    assert isinstance(last, FinishEvent)
    assert all(isinstance(event, TokenEvent) for event in tokens)
    text = "".join(event.text for event in events)
    return text, [event.token for event in tokens if isinstance(event, TokenEvent)], last


@pytest.fixture
def on_decode(monkeypatch: pytest.MonkeyPatch) -> Callable[[Decode], None]:
    """Call a function before every decode."""
    original = Context.decode

    def install(before: Decode) -> None:
        def decode(context: Context, batch: Any) -> None:
            before(context, batch)
            original(context, batch)

        monkeypatch.setattr(Context, "decode", decode)

    return install


def reference(path: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens one by one, with nothing but a context and an argmax."""
    out: list[int] = []
    with Model(path) as model, Context(model, ContextSettings(n_ctx=512, n_threads=1)) as context:
        batch = context.new_batch()
        tokens, position = prompt, 0
        for _ in range(count):
            batch.clear()
            index = batch.add(tokens, position, 0, output_last=True)
            context.decode(batch)
            position += len(tokens)
            tokens = [int(context.logits(index).argmax())]
            out += tokens
    return out


def test_greedy_equals_a_plain_loop_and_repeats(engine: LlamaEngine, spm_path: Path, spm_model: Model) -> None:
    prompt = [1, *spm_model.vocab.tokenize("the man and", add_special=False, parse_special=True)]
    text, tokens, done = collect(engine.stream(ask(n=40)))
    assert tokens == reference(spm_path, prompt, 40)
    assert text == spm_model.vocab.detokenize(tokens)
    assert collect(engine.stream(ask(n=40)))[:2] == (text, tokens)
    assert collect(engine.stream(replace(ask(n=40), prompt=None, tokens=tuple(prompt), id="t")))[1] == tokens
    assert (done.reason, done.stats.generated_tokens, done.stats.prompt_tokens) == ("length", 40, len(prompt))


def test_a_prompt_in_chunks_equals_one_in_whole(spm_path: Path) -> None:
    prompt, tokens = "the man and the hat, " * 12, []
    for n_batch, n_ubatch in ((2048, 512), (32, 32), (7, 3)):
        settings = EngineSettings(n_ctx=512, n_batch=n_batch, n_ubatch=n_ubatch, threads=1)
        with LlamaEngine(spm_path, settings) as engine:
            engine.load()
            tokens.append(collect(engine.stream(ask(prompt)))[1])
    assert tokens[0] == tokens[1] == tokens[2]


def test_seeds_repeat_and_are_reported(engine: LlamaEngine) -> None:
    hot = SamplingParams(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0)
    _, first, done = collect(engine.stream(ask(n=30, sampling=hot)))
    assert done.stats.seed is not None
    again = replace(hot, seed=done.stats.seed)
    assert collect(engine.stream(ask(n=30, sampling=again)))[1] == first
    assert collect(engine.stream(ask(n=30, sampling=replace(hot, seed=done.stats.seed ^ 1))))[1] != first


def test_stats_have_the_contracts_keys(engine: LlamaEngine) -> None:
    done = collect(engine.stream(ask(n=5)))[2]
    stats = done.stats.as_json()
    assert {
        "prompt_tokens",
        "generated_tokens",
        "prompt_tokens_per_second",
        "decode_tokens_per_second",
        "time_to_first_token_s",
        "kv_bytes",
        "kv_bytes_peak",
        "kv_bytes_full",
        "kv_rows_per_layer",
        "evicted_rows",
    } <= set(stats)
    assert stats["kv_bytes"] == stats["kv_bytes_full"] == 512 * 2 * 2 * (2 * 16) * 2
    assert stats["kv_rows_per_layer"] == [stats["prompt_tokens"]] * 2
    assert stats["decode_tokens_per_second"] > 0 < stats["prompt_tokens_per_second"]
    assert 0 < stats["time_to_first_token_s"] < 10


def test_stop_strings_across_tokens(engine: LlamaEngine) -> None:
    text, tokens, _ = collect(engine.stream(ask(n=40)))
    middle = len(text) // 2
    stop = text[middle : middle + 5]  # of several tokens
    cut, used, done = collect(engine.stream(ask(n=40, stop=("never", stop))))
    assert cut == text[: text.index(stop)]
    assert done.reason == "stop"
    assert len(used) < len(tokens)


def test_characters_split_over_tokens_are_never_shown_in_halves(chat_path: Path) -> None:
    with LlamaEngine(chat_path, EngineSettings(n_ctx=512, threads=1)) as engine:
        engine.load()
        request = ask("é日", 200, sampling=SamplingParams(temperature=5.0, top_k=0, top_p=1, min_p=0, seed=3))
        events = list(engine.stream(request))
    # random bytes: most are no UTF-8; each piece of text alone must be what the whole decodes to
    with Model(chat_path) as model:
        data = b"".join(model.vocab.piece(event.token) for event in events if isinstance(event, TokenEvent))
    assert "".join(event.text for event in events) == data.decode("utf-8", errors="replace")


def test_generation_ends_at_an_end_token(tmp_path: Path, spm_path: Path) -> None:
    with LlamaEngine(spm_path, EngineSettings(n_ctx=512, threads=1)) as engine:
        engine.load()
        tokens = collect(engine.stream(ask(n=10)))[1]
    content = spm_path.read_bytes().replace(  # make the fifth token the end token
        b"tokenizer.ggml.eos_token_id\x04\x00\x00\x00\x02\x00\x00\x00",
        b"tokenizer.ggml.eos_token_id\x04\x00\x00\x00" + tokens[4].to_bytes(4, "little"),
    )
    path = tmp_path / "ends.gguf"
    path.write_bytes(content)
    with LlamaEngine(path, EngineSettings(n_ctx=512, threads=1)) as engine:
        engine.load()
        _, ended, done = collect(engine.stream(ask(n=10)))
    assert ended == tokens[: tokens.index(tokens[4])]
    assert (done.reason, done.stats.generated_tokens) == ("stop", len(ended))


def test_the_context_fills_to_the_last_row_and_no_further(spm_path: Path) -> None:
    with LlamaEngine(spm_path, EngineSettings(n_ctx=20, threads=1)) as engine:
        assert engine.load().n_ctx == 20  # the library pads it to 256; the caller gets what was asked for
        _, tokens, done = collect(engine.stream(ask("a b c", None)))
        assert (done.reason, done.stats.prompt_tokens + len(tokens)) == ("length", 21)
        exact = GenerationRequest(tokens=(5,) * 20, sampling=GREEDY)
        _, tokens, done = collect(engine.stream(exact))
        assert (done.reason, len(tokens)) == ("length", 1)
        with pytest.raises(PromptTooLongError, match="21 tokens and the context 20") as caught:
            engine.stream(GenerationRequest(tokens=(5,) * 21))
        assert (caught.value.n_prompt, caught.value.n_ctx) == (21, 20)


def test_requests_are_checked_before_they_are_queued(engine: LlamaEngine) -> None:
    with pytest.raises(TokenError, match="token 1000000000"):
        engine.stream(GenerationRequest(tokens=(1_000_000_000,)))
    with pytest.raises(TemplateError, match="no chat template"):
        engine.stream(GenerationRequest(messages=(Message("user", "a"),)))
    for values in (
        {},
        {"prompt": ""},
        {"prompt": "a", "tokens": (1,)},
        {"messages": ()},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "stop": ("",)},
    ):
        with pytest.raises(InvalidRequestError):
            GenerationRequest(**values)  # type: ignore[arg-type]
    assert collect(engine.stream(ask()))[2].reason == "length"


def test_cancel_in_mid_prompt(engine: LlamaEngine, on_decode: Callable[[Decode], None]) -> None:
    request = ask("the man " * 100)
    on_decode(lambda context, batch: engine.cancel(request.id) and None)  # the abort flag is up while it computes
    text, tokens, done = collect(engine.stream(request))
    assert (text, tokens, done.reason) == ("", [], "cancelled")
    assert done.stats.generated_tokens == 0
    assert collect(engine.stream(ask()))[2].reason == "length"  # the next request is not cancelled with it
    assert engine.stats().cancelled == 1


def test_cancel_in_mid_decode_keeps_the_text_so_far(engine: LlamaEngine) -> None:
    expected = collect(engine.stream(ask(n=400)))[1]
    stream = engine.stream(ask(n=400))
    head = [next(stream) for _ in range(5)]
    stream.cancel()
    rest = list(stream)
    last = rest[-1]
    assert isinstance(last, FinishEvent)
    tokens = [event.token for event in head + rest if isinstance(event, TokenEvent)]
    assert tokens == expected[: len(tokens)]
    if last.reason != "length":  # a fast machine may have finished
        assert last.reason == "cancelled"
        assert len(tokens) < 400


def test_cancel_of_a_queued_request_and_of_an_unknown_one(engine: LlamaEngine) -> None:
    first, second = engine.stream(ask(n=300)), ask(n=300)
    waiting = engine.stream(second)
    assert engine.stats().running + engine.stats().queued == 2
    assert engine.cancel(second.id)
    first.cancel()
    assert collect(waiting)[2].reason == "cancelled"
    collect(first)
    assert not engine.cancel(second.id)
    assert not engine.cancel("nobody")


def test_an_abandoned_stream_frees_the_engine(engine: LlamaEngine) -> None:
    stream = engine.stream(ask(n=400))
    next(stream)
    del stream
    gc.collect()
    started = time.perf_counter()
    collect(engine.stream(ask(n=2)))
    assert time.perf_counter() - started < 5
    assert engine.stats().running == 0


def test_faults_end_one_request_and_not_the_engine(engine: LlamaEngine, on_decode: Callable[[Decode], None]) -> None:
    faults = [ContextError("no room"), ValueError("a bug")]

    def fail(context: Context, batch: Any) -> None:
        if faults and len(batch) == 1:  # while decoding
            raise faults.pop(0)

    expected = collect(engine.stream(ask()))[1]
    on_decode(fail)
    with pytest.raises(ContextError, match="no room"):
        list(engine.stream(ask()))
    with pytest.raises(EngineError, match="ValueError: a bug"):
        list(engine.stream(ask()))
    assert collect(engine.stream(ask()))[1] == expected
    assert engine.stats().failed == 2


def test_a_real_failure_of_the_library_is_one_requests_error(
    engine: LlamaEngine, on_decode: Callable[[Decode], None]
) -> None:
    def corrupt(context: Context, batch: Any) -> None:
        if len(batch) == 1:
            batch._positions[0] = 5  # not the next position: the library refuses the batch

    expected = collect(engine.stream(ask()))[1]
    on_decode(corrupt)
    with pytest.raises(DecodeError, match="decoding 1 tokens failed"):
        list(engine.stream(ask()))
    on_decode(lambda context, batch: None)
    assert collect(engine.stream(ask()))[1] == expected
    assert engine.stats().failed == 1


def test_closing_during_a_generation(spm_path: Path) -> None:
    engine = LlamaEngine(spm_path, EngineSettings(n_ctx=4096, threads=1))
    engine.load()
    running, queued = engine.stream(ask(n=4000)), engine.stream(ask())
    next(running)
    engine.close()
    engine.close()
    for stream in (running, queued):
        with pytest.raises(EngineClosedError):
            list(stream)
    with pytest.raises(EngineClosedError):
        engine.stream(ask())
    with pytest.raises(EngineClosedError):
        engine.load()
    assert not engine.stats().loaded
    assert not any(thread.name == "ziggurat-engine" for thread in threading.enumerate())


def test_before_load(spm_path: Path) -> None:
    engine = LlamaEngine(spm_path)
    with pytest.raises(EngineError, match="call load"):
        engine.stream(ask())
    engine.close()


def test_load_describes_the_model_and_is_idempotent(chat_path: Path) -> None:
    seen: list[float] = []
    with LlamaEngine(chat_path, EngineSettings(threads=1)) as engine:
        info = engine.load(seen.append)
        assert engine.load() is info
    assert info.n_ctx == info.n_ctx_train == 1024
    assert info.has_chat_template
    assert info.kv_bytes == 1024 * 2 * 2 * 32 * 2
    assert seen


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (EngineSettings(type_k="q8_0"), UnsupportedError, "--cache-type-k q8_0 needs heads of a multiple of 32"),
        (EngineSettings(n_ctx=2**31), InvalidRequestError, "is beyond"),
        (EngineSettings(n_ctx=2**30), MemoryShortageError, "lower --ctx"),
    ],
)
def test_a_failed_load_can_be_tried_again(
    spm_path: Path, settings: EngineSettings, error: type[Exception], message: str
) -> None:
    engine = LlamaEngine(spm_path, settings)
    for _ in range(2):
        with pytest.raises(error, match=message):
            engine.load()
    engine.close()
    with pytest.raises(ModelFileError):
        LlamaEngine(spm_path.with_name("none.gguf")).load()


def test_an_interrupted_load_leaves_the_engine_as_it_was(spm_path: Path) -> None:
    def interrupt(_fraction: float) -> None:
        raise KeyboardInterrupt

    with LlamaEngine(spm_path, EngineSettings(threads=1)) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.load(interrupt)
        assert not engine.stats().loaded
        engine.load()
        assert collect(engine.stream(ask()))[2].reason == "length"


def test_quantized_rows_work_where_heads_allow(chat_path: Path) -> None:
    sizes = {}
    for kind in ("f16", "bf16", "q8_0", "q4_0"):
        with LlamaEngine(chat_path, EngineSettings(n_ctx=512, type_k=kind, type_v=kind, threads=1)) as engine:
            sizes[kind] = engine.load().kv_bytes
            assert len(collect(engine.stream(ask(n=8)))[1]) == 8
    assert sizes["f16"] == sizes["bf16"] == sizes["q8_0"] * 64 // 34 == sizes["q4_0"] * 64 // 18


def test_eight_callers_get_what_each_gets_alone(engine: LlamaEngine) -> None:
    prompts = [f"{word} and the" for word in ("a", "man", "hat", "in", "an", "he", "end", "sun")]
    alone = [collect(engine.stream(ask(prompt)))[0] for prompt in prompts]
    together: dict[str, str] = {}

    def call(prompt: str) -> None:
        together[prompt] = collect(engine.stream(ask(prompt)))[0]

    threads = [threading.Thread(target=call, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[prompt] for prompt in prompts] == alone
    assert engine.stats().finished == 16


def test_async_callers(engine: LlamaEngine) -> None:
    async def text_of(prompt: str) -> str:
        return "".join([event.text async for event in engine.stream(ask(prompt))])

    async def both() -> list[str]:
        return await asyncio.gather(text_of("the man"), text_of("a hat"))

    expected = [collect(engine.stream(ask(prompt)))[0] for prompt in ("the man", "a hat")]
    assert asyncio.run(both()) == expected


def test_a_conversation_goes_through_the_template(chat_path: Path) -> None:
    with LlamaEngine(chat_path, EngineSettings(n_ctx=512, threads=1)) as engine:
        engine.load()
        chat = GenerationRequest(messages=(Message("user", "Hi"),), max_tokens=6, sampling=GREEDY)
        raw = ask("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", 6)
        assert collect(engine.stream(chat))[1] == collect(engine.stream(raw))[1]


def test_control_tokens_can_be_shown(chat_path: Path) -> None:
    with LlamaEngine(chat_path, EngineSettings(n_ctx=512, threads=1)) as engine:
        assert engine.load().chat_template == tiny_models.CHATML
        (mark,) = engine.tokenize("<|im_start|>", parse_special=True)
        sampling = SamplingParams(temperature=0, logit_bias={mark: 100.0})
        request = GenerationRequest(prompt="Hi", max_tokens=2, sampling=sampling)
        assert collect(engine.stream(request))[0] == ""
        shown = replace(request, shown=("<|im_start|>", "no token"), id="shown")
        assert collect(engine.stream(shown))[0] == "<|im_start|>" * 2


def test_exit_with_a_running_generation_is_clean(spm_path: Path) -> None:
    code = (
        "from ziggurat.runtime.engine.llama_engine import *\n"
        "from ziggurat.runtime.engine import GenerationRequest\n"
        f"e = LlamaEngine({str(spm_path)!r}, EngineSettings(n_ctx=8192, threads=1)); e.load()\n"
        "s = e.stream(GenerationRequest(prompt='the')); next(s); print('ok')\n"
    )
    for _ in range(3):  # the order of what is freed at exit is a race that one run may win
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_models_that_do_not_generate_are_refused(spm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "generates_text", False)
    with pytest.raises(UnsupportedError, match="does not generate text"):
        LlamaEngine(spm_path).load()


def test_an_unknown_architecture_is_the_librarys_refusal(tmp_path: Path, spm_path: Path) -> None:
    path = tmp_path / "unknown.gguf"
    path.write_bytes(spm_path.read_bytes().replace(b"llama", b"xlama"))
    with pytest.raises(ModelLoadError, match="unknown model architecture: 'xlama'"):
        LlamaEngine(path).load()


def test_the_fake_engine_is_an_engine() -> None:
    fake: Engine = FakeEngine(["Hel", "lo"])
    with pytest.raises(EngineError):
        fake.stream(ask())
    assert fake.load().n_ctx == 4096
    text, _, done = collect(fake.stream(ask("x", None)))
    assert (text, done.reason, done.stats.generated_tokens) == ("Hello", "stop", 2)
    assert collect(fake.stream(ask("x", 1)))[2].reason == "length"
    slow = FakeEngine(["a"] * 1000, delay=0.01)
    slow.load()
    request = ask("x", None)
    stream = slow.stream(request)
    next(stream)
    assert slow.cancel(request.id)
    assert collect(stream)[2].reason == "cancelled"

    def broken(_request: GenerationRequest) -> Iterator[str]:
        yield "a"
        raise ContextError("no room")

    failing = FakeEngine(broken)
    failing.load()
    with pytest.raises(ContextError):
        list(failing.stream(ask()))
    failing.close()
    with pytest.raises(EngineClosedError):
        failing.stream(ask())
