"""KV budgets from the engine, the evaluations and the command line, over a cache that keeps everything and the real."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers import whole_cache
from models.exact_copy import CopyModel, write_gguf
from ziggurat.runtime import cli
from ziggurat.runtime.bindings import Batch, Context, KVSettings, Model, Progress, kv
from ziggurat.runtime.budget import Budget, Uniform, parse_budget
from ziggurat.runtime.engine import FinishEvent, GenerationRequest
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.errors import ContextError
from ziggurat.runtime.evaluate.choices import evaluate_choices
from ziggurat.runtime.evaluate.choices_file import DEFAULT_PROMPT, Question
from ziggurat.runtime.evaluate.chunks import cut
from ziggurat.runtime.evaluate.decoder import ChunkDecoder, DecodeSettings
from ziggurat.runtime.evaluate.monitor import Monitor
from ziggurat.runtime.evaluate.text import evaluate_text
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.sampling import SamplingParams

TEXT = "the cat and the hat, an ant in the tent. " * 12
F32 = DecodeSettings(n_batch=128, n_ubatch=32, flash_attention="off", threads=1)
POLICY = KVPolicy(parse_budget("50%"), window=4, sinks=1)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[KVSettings]:
    return whole_cache.install(monkeypatch)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Of every batch that is decoded, the sequence and the number of tokens of its parts."""
    seen: list[list[tuple[int, int]]] = []
    original = Context.decode

    def decode(context: Context, batch: Batch) -> None:
        parts = itertools.groupby(batch._sequences[: len(batch)])
        seen.append([(sequence, len(list(tokens))) for sequence, tokens in parts])
        original(context, batch)

    monkeypatch.setattr(Context, "decode", decode)
    return seen


def finish(engine: LlamaEngine, tokens: Sequence[int], n: int | None) -> FinishEvent:
    *_, last = engine.stream(GenerationRequest(tokens=tuple(tokens), max_tokens=n, sampling=GREEDY))
    assert isinstance(last, FinishEvent)
    return last


# --- the engine


def test_the_context_is_made_for_the_prompt(made: list[KVSettings], spm_path: Path) -> None:
    settings = EngineSettings(n_ctx=600, n_batch=32, threads=1, kv=POLICY, one_shot=True)
    with LlamaEngine(spm_path, settings) as engine:
        info = engine.load()
        assert made == []  # how many rows depends on the prompt
        assert (info.n_ctx, info.kv_unsupported) == (600, None)
        for length, count in ((100, 1), (100, 1), (200, 2), (100, 3)):
            stats = finish(engine, [5] * length, 3).stats
            assert len(made) == count
            assert made[-1].rows == POLICY.rows(2, 600, length)
            assert sum(made[-1].rows) == length
            assert stats.kv_rows_per_layer == made[-1].rows
            assert stats.evicted_rows == sum(length + 2 - rows for rows in made[-1].rows)
            assert (stats.kv_bytes, stats.kv_bytes_peak) == (1230, 1740)
            assert stats.kv_bytes_full == 768 * 2 * 2 * 2 * 16 * 2


def test_one_context_serves_all_prompts_when_it_can(made: list[KVSettings], spm_path: Path) -> None:
    policy = KVPolicy(Budget(rows=64), Uniform())
    with LlamaEngine(spm_path, EngineSettings(n_ctx=600, threads=1, kv=policy)) as engine:
        engine.load()
        assert [budget.rows for budget in made] == [(64, 64)]
        for length in (5, 100):
            finish(engine, [5 + length] * length, 2)
        assert len(made) == 1


def test_a_prompt_is_read_in_steps_and_the_generation_has_no_end(
    made: list[KVSettings], batches: list[list[tuple[int, int]]], spm_path: Path
) -> None:
    with LlamaEngine(spm_path, EngineSettings(n_ctx=250, n_ubatch=32, threads=1, kv=POLICY, one_shot=True)) as engine:
        engine.load()
        # the stand-in's cache has 256 rows, and is full then
        with pytest.raises(ContextError, match="the stand-in refuses"):
            finish(engine, [5] * 250, None)
        assert batches == [[(0, 1)]] * 7  # the prompt is none of them
        assert finish(engine, [5] * 240, 16).reason == "length"


def test_without_a_budget_the_context_is_the_end(spm_path: Path) -> None:
    with LlamaEngine(spm_path, EngineSettings(n_ctx=250, threads=1)) as engine:
        engine.load()
        done = finish(engine, [5] * 245, None)
    assert (done.reason, done.stats.generated_tokens, done.stats.evicted_rows) == ("length", 6, 0)


def test_a_model_that_cannot_have_a_budget_keeps_every_row(
    made: list[KVSettings], spm_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kv, "unsupported", lambda _model: "it has sliding windows")
    with LlamaEngine(spm_path, EngineSettings(n_ctx=250, threads=1, kv=POLICY)) as engine:
        assert engine.load().kv_unsupported == "it has sliding windows"
        done = finish(engine, [5] * 100, 4)
    assert made == []
    assert done.stats.kv_rows_per_layer == (100, 100)
    assert done.stats.kv_bytes == done.stats.kv_bytes_full
    arguments = ["run", spm_path, "the", "--raw", "-n", 2, "--kv-budget", "50%", "--threads", 1]
    assert cli.run_command(cli.ziggurat, "ziggurat", [str(argument) for argument in arguments]) == 0
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "ziggurat: no KV budget, every row is kept: it has sliding windows"
    assert len(err) == 2


def test_a_budget_of_another_number_of_layers_is_not_made(made: list[KVSettings], spm_model: Model) -> None:
    with Context(spm_model, F32.context(256, 256, 1)) as context:
        assert not context.kv_active
    assert made == []


# --- evaluations


def test_perplexity_is_measured_after_the_prompt(
    made: list[KVSettings], batches: list[list[tuple[int, int]]], spm_model: Model
) -> None:
    chunks = cut(spm_model.vocab, TEXT, 33, 5)
    results = []
    for settings in (F32, replace(F32, kv=POLICY)):
        batches.clear()  # those of the last are looked at
        with ChunkDecoder(spm_model, chunks, settings, Monitor()) as decoder:
            results.append(evaluate_text(decoder, chunks, Monitor()))
    np.testing.assert_allclose(results[0].scores.nll, results[1].scores.nll, atol=2e-3)
    assert [budget.rows for budget in made] == [POLICY.rows(2, 33, 16)]
    # three chunks at once, then two: the first half of each is a prompt, the rest single tokens
    groups = [[(sequence, 16) for sequence in range(count)] for count in (3, 2)]
    prompts = [batch for batch in batches if batch[0][1] > 1]
    assert prompts == groups
    singles = [batch for batch in batches if batch[0][1] == 1]
    assert singles == [[(s, 1) for s in range(count)] for count in (3, 2) for _ in range(chunks.rows_per_chunk)]


def test_perplexity_with_fewer_tokens_a_batch_than_a_chunk(made: list[KVSettings], spm_model: Model) -> None:
    chunks = cut(spm_model.vocab, TEXT, 64, 3)
    nll = []
    for settings in (replace(F32, kv=POLICY), replace(F32, kv=POLICY, n_batch=10, n_ubatch=10)):
        with ChunkDecoder(spm_model, chunks, settings, Monitor()) as decoder:
            nll.append(evaluate_text(decoder, chunks, Monitor()).scores.nll)
    np.testing.assert_allclose(*nll, atol=2e-3)


def test_choices_are_read_after_their_prompt(
    made: list[KVSettings], batches: list[list[tuple[int, int]]], spm_model: Model
) -> None:
    questions = [
        Question("what is in the hat", ("a cat", "an ant and the tent", "b"), 1),
        Question("and the", ("end", "the the the the"), 0, continues=True),
        Question("the cat sat in the tent and then the cat sat in the hat " * 3, ("a", "the", "hat"), 2),
    ]
    results = []
    for settings in (F32, replace(F32, kv=POLICY, n_batch=64)):
        batches.clear()
        results.append(evaluate_choices(spm_model, questions, settings, Monitor(), DEFAULT_PROMPT).log_likelihoods)
    for plain, budget in zip(*results, strict=True):
        assert budget == pytest.approx(plain, abs=4e-3)
    assert len(made) == 1
    for batch in batches:
        assert len({sequence for sequence, _ in batch}) == len(batch)  # never two parts of one sequence


def test_eval_reports_the_budget(
    made: list[KVSettings], chat_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, report = tmp_path / "text.txt", tmp_path / "report.json"
    questions = tmp_path / "q.json"
    text.write_text(TEXT * 2)
    questions.write_text(json.dumps([{"question": "the hat", "choices": ["a", "an ant"], "answer": 0}]))
    arguments = ["eval", chat_path, "--text", text, "--against", chat_path, "--ctx", 400, "--choices", questions]
    arguments += ["--needle", "--needle-lengths", "350,400", "--needle-depths", "0.5", "--needle-facts", 1]
    arguments += ["--needle-trials", 1, "--answer-tokens", 3, "--batch", 32, "--json", report, "--threads", 1]
    arguments += ["--kv-budget", "60%", "--kv-policy", "snapkv", "--kv-window", 8]
    assert cli.run_command(cli.ziggurat, "ziggurat", [str(argument) for argument in arguments]) == 0
    assert capsys.readouterr().err == ""
    figures = json.loads(report.read_text())
    assert figures["kv"]["budget"] == "60%"
    assert (figures["kv"]["schedule"], figures["kv"]["score"], figures["kv"]["window"]) == ("uniform", "snapkv", 8)
    assert figures["kv_rows_per_layer"] == [120, 120]  # 60 % of 200 tokens
    assert figures["kl_divergence"] == pytest.approx(0, abs=1e-4)
    assert figures["choices"]["items"] == 1
    assert figures["needle"]["trials"] == 2
    # text, choices, and a context for each length of document
    assert [len(budget.rows) for budget in made] == [2] * 4
    assert made[-1].rows[0] == round((400 - 3) * 0.6)


def test_eval_says_once_that_a_model_cannot(
    made: list[KVSettings],
    spm_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv, "unsupported", lambda _model: "it has sliding windows")
    text, questions, report = tmp_path / "text.txt", tmp_path / "q.json", tmp_path / "report.json"
    text.write_text(TEXT)
    questions.write_text(json.dumps([{"question": "the hat", "choices": ["a", "an ant"], "answer": 0}]))
    arguments = ["eval", spm_path, "--text", text, "--ctx", 64, "--choices", questions, "--json", report]
    arguments += ["--kv-budget", "60%", "--threads", 1]
    assert cli.run_command(cli.ziggurat, "ziggurat", [str(argument) for argument in arguments]) == 0
    assert capsys.readouterr().err == "ziggurat: no KV budget, every row is kept: it has sliding windows\n"
    assert made == []
    assert not {"kv", "kv_rows_per_layer"} & set(json.loads(report.read_text()))


# --- run


def test_run_shows_what_the_budget_did(
    made: list[KVSettings], spm_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "stats.json"
    arguments = ["run", spm_path, "the cat " * 60, "--raw", "-n", 5, "--temp", 0, "--stats", stats, "--threads", 1]
    arguments += ["--kv-budget", "50%", "--kv-window", 16, "--kv-sinks", 2, "--kv-prefill", "chunked", "--ctx", 500]
    arguments += ["--kv-score", "random", "--kv-schedule", "pyramid"]
    assert cli.run_command(cli.ziggurat, "ziggurat", [str(argument) for argument in arguments]) == 0
    figures = json.loads(stats.read_text())
    (budget,) = made
    assert (budget.window, budget.sinks, budget.prefill, budget.score) == (16, 2, "chunked", "random")
    assert figures["kv_rows_per_layer"] == list(budget.rows)
    assert sum(budget.rows) == figures["prompt_tokens"]
    assert figures["evicted_rows"] == 2 * (figures["prompt_tokens"] + 4) - sum(budget.rows)
    (line,) = capsys.readouterr().err.splitlines()
    low, high = budget.rows[1], budget.rows[0]
    assert f"| {high} to {low} rows a layer, {figures['evicted_rows']} evicted |" in line
    assert "while the prompt was read" in line


# --- with a library that has budgets


@pytest.mark.usefixtures("budgets")
def test_figures_are_the_librarys(spm_path: Path) -> None:
    with LlamaEngine(spm_path, EngineSettings(n_ctx=600, n_ubatch=64, threads=1, kv=POLICY, one_shot=True)) as engine:
        info = engine.load()
        for length in (300, 120, 300):
            stats = finish(engine, [5 + n % 90 for n in range(length)], 4).stats
            rows = POLICY.rows(2, 600, length)
            assert stats.kv_rows_per_layer == rows
            assert stats.evicted_rows == 2 * (length + 3) - sum(rows) - 2 * 3
            assert stats.kv_bytes < stats.kv_bytes_full == 768 * 2 * 2 * 2 * 16 * 2
            assert stats.kv_bytes < stats.kv_bytes_peak
        short = finish(engine, [5] * 3, 4).stats
        assert (short.kv_rows_per_layer, short.evicted_rows) == ((3, 3), 0)
    assert info.kv_bytes > 0


@pytest.mark.usefixtures("budgets")
def test_a_generation_goes_on_beyond_the_context(spm_path: Path) -> None:
    with LlamaEngine(spm_path, EngineSettings(n_ctx=250, threads=1, kv=POLICY)) as engine:
        engine.load()
        done = finish(engine, [5 + n % 90 for n in range(250)], 700)
    assert (done.reason, done.stats.generated_tokens) == ("length", 700)
    assert done.stats.evicted_rows > 1000


@pytest.mark.usefixtures("budgets")
def test_a_prompt_that_is_cancelled_leaves_the_engine_as_it_was(
    spm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerationRequest(tokens=tuple(5 + n % 90 for n in range(2000)), max_tokens=8, sampling=GREEDY)
    policy = KVPolicy(Budget(rows=64))
    with LlamaEngine(spm_path, EngineSettings(n_ctx=2048, n_ubatch=16, threads=1, kv=policy)) as engine:
        engine.load()
        wanted = [event for event in engine.stream(request) if not isinstance(event, FinishEvent)]
        original, seen = Context.prompt_step, []

        def cancelled(context: Context, sequence: int, max_steps: int) -> Progress:
            seen.append(engine.stats().prompt_progress)
            if len(seen) == 20:
                engine.cancel(request.id)
            return original(context, sequence, max_steps)

        with monkeypatch.context() as patch:
            patch.setattr(Context, "prompt_step", cancelled)
            *events, last = engine.stream(request)
        assert isinstance(last, FinishEvent)
        assert (events, last.reason) == ([], "cancelled")
        assert (last.stats.kv_rows_per_layer, last.stats.evicted_rows) == ((), 0)
        assert seen[0] == 0.0
        assert len(set(seen)) == 20  # 125 ubatches in each of two layers
        assert seen[-1] == pytest.approx(19 / 250)
        assert engine.stats().prompt_progress is None
        again = [event for event in engine.stream(request) if not isinstance(event, FinishEvent)]
    assert again == wanted


@pytest.mark.usefixtures("budgets")
def test_a_model_that_copies_finds_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, report = tmp_path / "copy.gguf", tmp_path / "r.json"
    write_gguf(CopyModel(context=2048), path)
    right = {}
    for preset in ("pyramid", "streaming"):
        arguments = ["eval", path, "--needle", "--needle-form", "tokens", "--needle-lengths", 1500]
        arguments += ["--needle-facts", 6, "--needle-trials", 1, "--needle-depths", "0.2,0.5", "--json", report]
        # the last token asks for the first of four, and pooling keeps those beside it
        arguments += [
            "--ubatch",
            64,
            "--threads",
            1,
            "--kv-budget",
            64,
            "--kv-policy",
            preset,
            "--kv-pool",
            9,
            "--kv-pool-type",
            "avg",
        ]
        assert cli.run_command(cli.ziggurat, "ziggurat", [str(argument) for argument in arguments]) == 0
        right[preset] = json.loads(report.read_text())["needle"]["accuracy"]
    assert right == {"pyramid": 1.0, "streaming": 0.0}


@pytest.mark.usefixtures("budgets")
def test_what_is_evicted_shows_in_perplexity_and_choices(spm_model: Model) -> None:
    chunks = cut(spm_model.vocab, TEXT, 160, 2)
    questions = [Question("the cat sat in the tent and then the cat sat in the hat " * 3, ("a", "the hat"), 1)]
    nll, likelihoods = [], []
    for budget in (None, "100%", "30%"):
        policy = None if budget is None else replace(POLICY, budget=parse_budget(budget), slack=100)
        settings = replace(F32, kv=policy, n_batch=160)
        with ChunkDecoder(spm_model, chunks, settings, Monitor()) as decoder:
            nll.append(evaluate_text(decoder, chunks, Monitor()).scores.nll)
        result = evaluate_choices(spm_model, questions, settings, Monitor(), DEFAULT_PROMPT)
        likelihoods.append(result.log_likelihoods[0])
    np.testing.assert_allclose(nll[0], nll[1], atol=4e-3)
    assert np.abs(nll[0] - nll[2]).max() > 0.05
    assert likelihoods[1] == pytest.approx(likelihoods[0], abs=4e-3)
    # the prompt was read whole either way: only what comes after its last token can differ
    assert likelihoods[2][0] == pytest.approx(likelihoods[0][0], abs=4e-3)
    assert likelihoods[2][1] != pytest.approx(likelihoods[0][1], abs=0.02)


@pytest.mark.usefixtures("budgets")
def test_windows_beyond_the_context_are_one_line(spm_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", spm_path, "the", "--raw", "--ctx", 256, "--kv-budget", 900, "--kv-window", 700]
    assert cli.run_command(cli.ziggurat, "ziggurat", [str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ziggurat: error: ")
    assert err.count("\n") == 1
    assert "a window of 700 tokens" in err


@pytest.mark.usefixtures("budgets")
def test_an_interrupt_ends_a_prompt_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    write_gguf(CopyModel(context=65536), path)
    code = (
        "import sys; from ziggurat.runtime.cli import main\n"
        f"main(['run', {str(path)!r}, '-', '--raw', '--ctx', '65536', '--kv-budget', '64', '--ubatch', '16',"
        " '--threads', '1', '--verbose'])\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write("a b c d e f g h " * 2000)
        process.stdin.close()
        for line in process.stderr:
            if "stage" in line and "hidden" in line:  # the context is there, and the prompt comes next
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        started = time.perf_counter()
        errors = process.stderr.read()
        assert process.stdout.read() == ""
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert time.perf_counter() - started < 10
