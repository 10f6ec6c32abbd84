from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from ziggurat.runtime import bindings
from ziggurat.runtime.bindings import Batch, Context, ContextSettings, Model
from ziggurat.runtime.bindings.library import log
from ziggurat.runtime.bindings.log import LogRelay, reason
from ziggurat.runtime.errors import (
    ContextError,
    DecodeAborted,
    EngineClosedError,
    InvalidRequestError,
    ModelLoadError,
    TokenError,
)

TEXTS = [
    "the end, and a man in the hat.",
    "Emoji 👩‍👩‍👧 and 🇧🇷, naïve façade, 日本語, العربية",
    "  two spaces\n\n\ttabs\r\nlines  ",
    "def f(x):\n    return x ** 2  # ¹",
    "\x00\x01 control",
    "\ufeffBOM and \u200bzero width",
]


def settings(**values: object) -> ContextSettings:
    return ContextSettings(**{"n_ctx": 256, "n_threads": 1, **values})  # type: ignore[arg-type]


def test_probe_says_which_library_is_loaded() -> None:
    info = bindings.probe()
    assert info.package_version.startswith("0.3.36")
    assert info.patched == ("+ziggurat" in info.package_version)
    assert Path(info.path).exists()
    devices = bindings.devices()
    assert any(device.kind == "cpu" and device.memory_total > 0 for device in devices)
    assert "CPU" in bindings.system_info()
    # not so for llama.cpp's own answer: a build with RPC always says yes
    assert bindings.supports_gpu_offload() == any(device.kind in ("gpu", "igpu") for device in devices)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_tokens(bpe_model: Model, spm_model: Model, text: str) -> None:
    for model, space in ((bpe_model, ""), (spm_model, " ")):
        tokens = model.vocab.tokenize(text, add_special=False, parse_special=False)
        assert model.vocab.detokenize(tokens) == space + text
        assert b"".join(model.vocab.piece(token) for token in tokens).decode() == space + text


def test_special_tokens(bpe_model: Model, spm_model: Model) -> None:
    vocab = bpe_model.vocab
    text = "<|im_start|>a<|im_end|>"
    parsed = vocab.tokenize(text, add_special=True, parse_special=True)
    assert len(parsed) == 3
    assert len(vocab.tokenize(text, add_special=True, parse_special=False)) > 3
    assert vocab.is_eog(parsed[-1])
    assert vocab.detokenize(parsed) == "a"
    assert vocab.detokenize(parsed, special=True) == text
    assert (vocab.adds_bos, vocab.text_of(vocab.eos)) == (False, "<|im_end|>")
    assert (spm_model.vocab.adds_bos, spm_model.vocab.bos, spm_model.vocab.text_of(1)) == (True, 1, "<s>")
    assert spm_model.vocab.tokenize("a", add_special=True, parse_special=False)[0] == 1


def test_wrong_tokens_and_text_never_reach_the_library(spm_model: Model) -> None:
    n_vocab = spm_model.vocab.n_tokens
    for token in (-1, n_vocab, 10**9):
        with pytest.raises(TokenError, match=f"token {token} at position 1"):
            spm_model.vocab.check([0, token])
        with pytest.raises(TokenError):
            spm_model.vocab.piece(token)
        with pytest.raises(TokenError):
            spm_model.vocab.detokenize([token])
    with pytest.raises(TokenError, match="surrogate"):
        spm_model.vocab.tokenize("a\ud800", add_special=False, parse_special=False)
    with Context(spm_model, settings()) as context:
        batch = context.new_batch()
        batch.add([1, n_vocab], 0, 0, output_last=True)
        with pytest.raises(TokenError):
            context.decode(batch)


def test_batch_limits() -> None:
    batch = Batch(4, n_seq_max=2)
    assert batch.add([1, 2], 0, 1, output_last=True) == 1
    with pytest.raises(ContextError, match="batch of 5"):
        batch.add([1, 2, 3], 2, 1, output_last=False)
    for tokens, sequence in (([], 0), ([1], 2), ([1], -1), ([2**33], 0), ([-1], 0)):
        with pytest.raises(InvalidRequestError):
            batch.add(tokens, 0, sequence, output_last=False)
    assert (len(batch), list(batch.tokens), batch.outputs) == (2, [1, 2], {1})
    batch.clear()
    assert (len(batch), batch.outputs) == (0, set())


def test_logits_only_where_asked_for(spm_model: Model) -> None:
    with Context(spm_model, settings()) as context:
        batch = context.new_batch()
        last = batch.add([1, 2, 3], 0, 0, output_last=True)
        with pytest.raises(InvalidRequestError, match="no logits at index 2"):
            context.logits(last)
        context.decode(batch)
        assert context.logits(last).shape == (spm_model.vocab.n_tokens,)
        with pytest.raises(InvalidRequestError):
            context.logits(0)
        assert context.last_position(0) == 2


def test_sequences_in_one_batch_do_not_see_each_other(spm_model: Model) -> None:
    alone = []
    for tokens in ([1, 40, 50], [1, 260, 262, 270]):
        with Context(spm_model, settings()) as context:
            batch = context.new_batch()
            index = batch.add(tokens, 0, 0, output_last=True)
            context.decode(batch)
            alone.append(context.logits(index))
    with Context(spm_model, settings(n_seq_max=2)) as context:
        batch = context.new_batch()
        first = batch.add([1, 40, 50], 0, 0, output_last=True)
        second = batch.add([1, 260, 262, 270], 0, 1, output_last=True)
        context.decode(batch)
        for index, expected in ((first, alone[0]), (second, alone[1])):
            np.testing.assert_allclose(context.logits(index), expected, atol=1e-3)
        assert context.n_ctx_allocated == 256  # per sequence, not shared out
        assert context.remove(0)
        assert (context.last_position(0), context.last_position(1)) == (-1, 3)


def test_a_batch_has_room_for_every_sequence(spm_model: Model) -> None:
    with Context(spm_model, settings(n_batch=4, n_ubatch=4, n_seq_max=6)) as context:
        assert context.n_batch == 6
        batch = context.new_batch()
        for sequence in range(6):
            batch.add([5], 0, sequence, output_last=True)
        context.decode(batch)
        assert context.output_logits().shape[0] == 6


def test_a_full_context_is_an_error_and_stays_usable(spm_model: Model) -> None:
    with Context(spm_model, settings()) as context:
        batch = context.new_batch()
        batch.add([5] * 256, 0, 0, output_last=False)
        context.decode(batch)
        batch.clear()
        batch.add([5], 256, 0, output_last=True)
        with pytest.raises(ContextError, match="no room for 1 tokens in a context of 256"):
            context.decode(batch)
        context.clear()
        batch.clear()
        context.decode(_one(batch))


def _one(batch: Batch) -> Batch:
    batch.add([1], 0, 0, output_last=True)
    return batch


def test_the_abort_flag_stops_a_batch(spm_model: Model) -> None:
    with Context(spm_model, settings()) as context:
        batch = _one(context.new_batch())
        context.abort.set()
        assert context.abort.is_set
        with pytest.raises(DecodeAborted):
            context.decode(batch)
        context.abort.clear()
        context.clear()
        context.decode(batch)


def test_the_abort_flag_is_seen_from_another_thread(spm_model: Model) -> None:
    with Context(spm_model, settings(n_ctx=32768, n_batch=32768, n_ubatch=256)) as context:
        batch = context.new_batch()
        batch.add([7] * 32768, 0, 0, output_last=True)
        timer = threading.Timer(0.2, context.abort.set)
        timer.start()
        with pytest.raises(DecodeAborted):  # undisturbed it takes half a minute
            context.decode(batch)
        timer.join()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_ctx": 0}, "n_ctx is 0"),
        ({"n_ubatch": 0}, "n_ubatch is 0"),
        ({"n_batch": 2**32 + 1}, "n_batch is 4294967297; it can be at most"),
        ({"n_ctx": 2**31}, "is beyond"),
        ({"type_k": "q2_k"}, "cache type 'q2_k' is unknown"),
        ({"type_v": "q8_0", "flash_attention": "off"}, "needs flash attention"),
        ({"flash_attention": "maybe"}, "auto, on or off"),
    ],
)
def test_context_settings_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        settings(**values)


def test_the_librarys_reason_for_a_refusal_is_given(spm_model: Model, tmp_path: Path, spm_path: Path) -> None:
    with pytest.raises(ContextError, match="K cache type q8_0 with block size 32 does not divide"):
        Context(spm_model, settings(type_k="q8_0"))  # heads of 16
    other = tmp_path / "other.gguf"
    other.write_bytes(spm_path.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.fun_up"))
    with pytest.raises(ModelLoadError, match=r"other\.gguf: .*blk\.1\.ffn_up"):
        Model(other)


def test_a_load_can_be_stopped_and_its_errors_come_through(spm_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="was stopped"):
        Model(spm_path, progress=lambda _fraction: False)

    def fail(_fraction: float) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Model(spm_path, progress=fail)
    seen: list[float] = []
    Model(spm_path, progress=lambda fraction: seen.append(fraction) or True).close()
    assert seen[-1] == pytest.approx(1.0)


def test_closing_a_model_closes_its_contexts(spm_path: Path) -> None:
    model = Model(spm_path)
    context = Context(model, settings())
    model.close()
    model.close()
    context.close()
    for use in (lambda: model.n_layer, lambda: context.clear(), lambda: context.n_batch):
        with pytest.raises(EngineClosedError):
            use()


def test_loading_a_hundred_times_leaks_nothing(spm_path: Path) -> None:
    process = psutil.Process()
    before = 0
    for round_number in range(100):
        with Model(spm_path) as model:
            Context(model, settings(n_ctx=4096))
        if round_number == 20:
            gc.collect()
            before = process.memory_info().rss
    gc.collect()
    assert process.memory_info().rss - before < 4 * 2**20


def test_model_properties(bpe_model: Model, spm_model: Model) -> None:
    assert (bpe_model.n_layer, bpe_model.n_head, bpe_model.n_head_kv, bpe_model.n_ctx_train) == (2, 2, 1, 1024)
    assert bpe_model.n_bytes == bpe_model.n_params * 4
    assert bpe_model.generates_text
    assert "llama" in bpe_model.description
    assert bpe_model.chat_template is not None
    assert spm_model.chat_template is None


def test_the_log_is_relayed_and_captured(caplog: pytest.LogCaptureFixture, spm_path: Path) -> None:
    with caplog.at_level(logging.DEBUG, "ziggurat.runtime.llama_cpp"), log.capture() as lines:
        Model(spm_path).close()
    assert any("n_ctx_train" in line for _, line in lines)
    assert "n_ctx_train" in caplog.text
    assert caplog.records[0].levelno <= logging.INFO


def test_continued_lines_are_joined_and_reasons_cleaned() -> None:
    relay = LogRelay()
    with relay.capture() as lines:
        for level, text in (
            (2, b"load: .."),
            (5, b".. done\n"),
            (1, b"debug\n"),
            (4, b"f_g: error loading model: h_i: no\n"),
        ):
            relay.receive(level, text, None)
    assert lines == [(2, "load: .... done"), (4, "f_g: error loading model: h_i: no")]
    assert reason(lines, "") == "no"
    assert reason([], "fallback") == "fallback"
    with relay.capture() as nothing:
        relay.receive(4, None, None)
    assert nothing == []
