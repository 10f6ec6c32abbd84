from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import tiny_models
from models.exact_copy import CopyModel, write_gguf
from ziggurat.runtime import cli, eval_parts
from ziggurat.runtime.evaluate import reference

CONTRACT = {"perplexity", "kl_divergence", "top1_agreement", "kl_p99", "tokens", "reference_perplexity"}
TEXT = "the cat and the hat, an ant in the tent. " * 12

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        words = [str(argument) for argument in arguments]
        code = cli.run_command(cli.ziggurat, "ziggurat", ["eval", *words, "--threads", "1"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def refused(run: Run, *arguments: object) -> str:
    """Run what must fail, and return its one line."""
    code, out, err = run(*arguments)
    assert code != 0
    assert out == ""
    assert err.startswith("ziggurat: error: ")
    assert err.count("\n") == 1
    return err


def test_text_against_another_model(run: Run, spm_path: Path, text: Path, tmp_path: Path) -> None:
    other = tiny_models.write_model(tmp_path / "other.gguf", seed=1)
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    code, out, err = run(spm_path, "--text", text, "--ctx", 64, "--against", other, "--json", report, "--plot", plot)
    assert (code, err) == (0, "")
    figures = json.loads(report.read_text())
    assert set(figures) >= CONTRACT
    assert all(isinstance(figures[key], float | int) for key in CONTRACT)
    assert figures["tokens"] == figures["chunks"] * 31
    assert figures["kl_divergence"] > 0
    assert f"{figures['perplexity']:.4f}" in out
    assert "KL divergence" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_without_a_reference_there_is_no_divergence(run: Run, spm_path: Path, text: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert run(spm_path, "--text", text, "--ctx", 64, "--chunks", 2, "--json", report)[0] == 0
    figures = json.loads(report.read_text())
    assert figures["chunks"] == 2
    assert not {"kl_divergence", "reference_perplexity", "reference"} & set(figures)


def test_saved_logits_are_a_reference(run: Run, spm_path: Path, text: Path, tmp_path: Path) -> None:
    saved, report = tmp_path / "saved", tmp_path / "report.json"
    assert run(spm_path, "--text", text, "--ctx", 64, "--save-logits", saved)[0] == 0
    assert run(spm_path, "--text", text, "--ctx", 64, "--against", saved, "--json", report)[0] == 0
    figures = json.loads(report.read_text())
    assert figures["kl_divergence"] == pytest.approx(0, abs=1e-4)
    assert figures["reference_perplexity"] == pytest.approx(figures["perplexity"], rel=1e-4)
    assert figures["top1_agreement"] == 1.0


def test_a_folder_goes_through_the_converter(
    run: Run, spm_path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    commands = []

    def convert(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        Path(command[5]).write_bytes(spm_path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(reference.subprocess, "run", convert)
    report = tmp_path / "report.json"
    code, _out, err = run(spm_path, "--text", text, "--ctx", 64, "--against", folder, "--json", report)
    assert code == 0
    assert "converting" in err
    assert commands[0][3:5] == ["convert", str(folder)]
    assert commands[0][6:] == ["--type", "f32"]
    assert not Path(commands[0][5]).exists()
    figures = json.loads(report.read_text())
    assert figures["kl_divergence"] == 0.0
    assert figures["reference"] == str(folder)


def test_a_folder_that_cannot_be_converted(run: Run, spm_path: Path, text: Path, tmp_path: Path) -> None:
    assert "no readable config.json" in refused(run, spm_path, "--text", text, "--against", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    code, _out, err = run(spm_path, "--text", text, "--against", tmp_path)
    assert code == 1
    assert "cannot be converted (" in err.splitlines()[-1] and err.count("error:") == 1


def test_choices(run: Run, spm_path: Path, tmp_path: Path) -> None:
    path, report, plot = tmp_path / "q.jsonl", tmp_path / "r.json", tmp_path / "p.png"
    item = json.dumps({"question": "the hat", "choices": ["a", "an ant"], "answer": 0})
    path.write_text("\n".join([item] * 5))
    code, out, _err = run(
        spm_path, "--choices", path, "--limit", 3, "--choices-items", "--json", report, "--plot", plot
    )
    assert code == 0
    figures = json.loads(report.read_text())["choices"]
    assert figures["items"] == len(figures["by_item"]) == 3
    assert figures["accuracy"] in (0.0, 1.0)  # the same question three times
    assert "3 questions" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_needle(run: Run, chat_path: Path, tmp_path: Path) -> None:
    report, plot = tmp_path / "r.json", tmp_path / "p.png"
    grid = ("--needle-lengths", "350,400", "--needle-depths", "0,50%,1", "--needle-facts", "1,2")
    code, out, err = run(
        chat_path, "--needle", *grid, "--needle-trials", 1, "--answer-tokens", 2, "--json", report, "--plot", plot
    )
    assert (code, err) == (0, "")
    figures = json.loads(report.read_text())["needle"]
    assert figures["trials"] == len(figures["by_trial"]) == 2 * 3 * 2
    assert [one["facts"] for one in figures["grids"]] == [1, 2]
    assert "2 facts, one asked" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_model_that_copies_exactly_finds_every_token(run: Run, tmp_path: Path) -> None:
    path, report = tmp_path / "copy.gguf", tmp_path / "r.json"
    write_gguf(CopyModel(context=2048), path)
    grid = ("--needle-lengths", "300,700", "--needle-facts", "1,6", "--needle-trials", 1)
    assert run(path, "--needle", "--needle-form", "tokens", *grid, "--json", report)[0] == 0
    figures = json.loads(report.read_text())["needle"]
    assert (figures["accuracy"], figures["trials"]) == (1.0, 20)


def test_generated_documents_are_deterministic_jsonl(run: Run, spm_path: Path, tmp_path: Path) -> None:
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    common = ("--needle-lengths", "300", "--needle-facts", "2", "--needle-form", "tokens", "--needle-trials", 2)
    for path, seed in ((one, 1), (two, 1), (other, 2)):
        code, out, _err = run(spm_path, "--generate-needle", path, *common, "--seed", seed)
        assert (code, out) == (0, "")
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    documents = [json.loads(line) for line in one.read_text().splitlines()]
    assert len(documents) == 5 * 2
    for document in documents:
        assert len(document["prompt_tokens"]) + len(document["answer"]) == document["length"] == 300
    facts = tmp_path / "facts"
    assert run(spm_path, "--generate-needle", facts, "--raw", "--needle-lengths", "2k", "--needle-trials", 1)[0] == 0
    document = json.loads(facts.read_text().splitlines()[0])
    assert f"The code of {document['key']} is {document['answer']}." in document["prompt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: there is nothing to evaluate"),
        (b" \n\n", "is empty"),
        (b"abc\xff", "is not UTF-8 text (byte 0xff at 3)"),
        ("the cat".encode("utf-16-le"), "is not UTF-8 text (byte 0x00 at 1)"),
        (b"a", "has 2 tokens and one chunk takes 512: give a longer text"),
        (b"the cat and the hat", "or a --ctx of at most"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_texts_that_cannot_be_evaluated(
    run: Run, spm_path: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in refused(run, spm_path, "--text", path)


def test_bad_requests(run: Run, spm_path: Path, chat_path: Path, text: Path, tmp_path: Path) -> None:
    def says(message: str, *arguments: object) -> None:
        assert message in refused(run, *arguments)

    says("there is nothing to evaluate", spm_path)
    says("--against belongs to --text", spm_path, "--needle", "--against", chat_path)
    says("--needle-lengths belongs to --needle", spm_path, "--text", text, "--needle-lengths", "512")
    says("--limit belongs to --choices", spm_path, "--text", text, "--limit", 3)
    says("missing.gguf", tmp_path / "missing.gguf", "--text", text)
    says("missing: does not exist", spm_path, "--text", text, "--against", tmp_path / "missing")
    says("another vocabulary", spm_path, "--text", text, "--ctx", 64, "--against", chat_path)
    says("text.txt", spm_path, "--text", text, "--ctx", 64, "--against", text)  # neither GGUF nor logits
    says("its folder does not exist", spm_path, "--text", text, "--json", tmp_path / "no" / "x.json")
    says("is a folder", spm_path, "--text", text, "--plot", tmp_path)
    says("cannot be written", spm_path, "--text", text, "--json", "/proc/report.json")
    says("is a device", spm_path, "--text", text, "--json", "/dev/null")
    says("--json", spm_path, "--text", text, "--json", spm_path)
    says("--plot", spm_path, "--text", text, "--json", tmp_path / "x", "--plot", tmp_path / "x")
    says("nothing to draw", spm_path, "--generate-needle", tmp_path / "x", "--plot", tmp_path / "y", "--raw")
    says("has no chat template", spm_path, "--needle")
    says("the model was trained for 1024 tokens", chat_path, "--needle", "--needle-lengths", "512,2k")
    says("--ctx is 600 tokens", chat_path, "--needle", "--needle-lengths", "1k", "--ctx", 600)
    says("no room for 6 facts", chat_path, "--needle", "--needle-lengths", "64")
    says("--needle-lengths x", chat_path, "--needle", "--needle-lengths", "x")
    says("--needle-depths 2", chat_path, "--needle", "--needle-depths", "2")
    says("a fact needs {key} and {value}", chat_path, "--needle", "--needle-fact", "nothing")
    says("no {question}", spm_path, "--choices", text, "--choices-prompt", "x")
    says("text.txt: line 1 is not valid JSON", spm_path, "--choices", text)


def test_cache_types_must_fit_model_and_reference(run: Run, chat_path: Path, text: Path, tmp_path: Path) -> None:
    narrow = tiny_models.write_model(tmp_path / "narrow.gguf", tokens=tiny_models.bpe_tokens())
    asked = ["--text", text, "--ctx", 64, "--cache-type-k", "q8_0"]
    expected = f"{narrow}: --cache-type-k q8_0 needs heads of a multiple of 32 values, this model's have 16"
    assert expected in refused(run, narrow, *asked)
    assert expected in refused(run, chat_path, *asked, "--against", narrow)


def test_a_mistake_in_one_part_is_named_before_another_is_measured(
    run: Run, chat_path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_parts, "measure_text", lambda *_: pytest.fail("was measured"))
    assert "--needle-lengths" in refused(run, chat_path, "--text", text, "--needle", "--needle-lengths", "9k")
    assert "missing" in refused(run, chat_path, "--text", text, "--choices", tmp_path / "missing")


def test_few_tokens_a_batch_and_many_choices(run: Run, spm_path: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"question": "the cat?", "choices": ["a hat", "a tent", "an end"], "answer": 0}]))
    outputs = [run(spm_path, "--choices", questions, "--batch", size)[:2] for size in (1, 2048)]
    assert outputs[0][0] == 0
    assert outputs[0] == outputs[1]


def test_chunks_beyond_the_trained_context_are_announced(run: Run, tmp_path: Path) -> None:
    path = tiny_models.write_model(tmp_path / "short.gguf", tiny_models.Shape(n_ctx=32))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    code, _out, err = run(path, "--text", text, "--ctx", 64, "--chunks", 1)
    assert code == 0
    assert err == "ziggurat: chunks of 64 tokens exceed the 32 that the model was trained for\n"


def test_a_missing_matplotlib_is_named_before_the_work(
    run: Run, spm_path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(eval_parts, "measure_text", lambda *_: pytest.fail("was measured"))
    message = refused(run, spm_path, "--text", text, "--plot", tmp_path / "x.png")
    assert "--plot needs matplotlib: pip install 'ziggurat[plot]'" in message


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys; from ziggurat.runtime.cli import run_command, ziggurat\n"
        "run_command(ziggurat, 'ziggurat', ['eval', '--help'])\n"
        "heavy = 'llama_cpp torch transformers numpy matplotlib gguf jinja2'\n"
        "assert not set(heavy.split()) & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--against" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_cleanly(spm_path: Path, tmp_path: Path, number: signal.Signals) -> None:
    text, saved, report = tmp_path / "long.txt", tmp_path / "saved", tmp_path / "r.json"
    text.write_text(TEXT * 2000)
    arguments = [spm_path, "--text", text, "--ctx", 512, "--save-logits", saved, "--json", report, "--threads", 1]
    command = [sys.executable, "-m", "ziggurat.runtime", "eval", *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(path.name.startswith(".saved") for path in tmp_path.iterdir()):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err.strip()) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]
