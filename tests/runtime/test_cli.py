from __future__ import annotations

import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from helpers.command import Ziggurat
from helpers.fake_engine import FakeEngine
from ziggurat.runtime import cli, command_run
from ziggurat.runtime.bindings import kv
from ziggurat.runtime.bindings.library import PATCHED_REMEDY
from ziggurat.runtime.engine import GenerationRequest
from ziggurat.runtime.errors import LibraryError

CONTRACT_STATS = {
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
}


def child(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ziggurat.runtime", *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **options})


# --- the group


def test_help_lists_the_commands_and_imports_none() -> None:
    code = (
        "import sys; from ziggurat.runtime.cli import run_command, ziggurat\n"
        "run_command(ziggurat, 'ziggurat', ['--help'])\n"
        "heavy = 'llama_cpp torch transformers numpy gguf jinja2 rich psutil'\n"
        "assert not set(heavy.split()) & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    for name in ("run", "inspect", "doctor", "convert"):
        assert f"\n  {name} " in done.stdout
        assert cli._SUMMARIES[name] in done.stdout


@pytest.mark.parametrize("name", ["run", "inspect", "doctor"])
def test_summaries_are_the_commands_own_subject(ziggurat: Ziggurat, name: str) -> None:
    code, out, _ = ziggurat(name, "--help")
    assert code == 0
    assert out.startswith(f"Usage: ziggurat {name}")


def test_version(ziggurat: Ziggurat) -> None:
    assert ziggurat("--version") == (0, f"ziggurat {importlib.metadata.version('ziggurat')}\n", "")


def test_unknown_commands_and_options(ziggurat: Ziggurat) -> None:
    assert "No such command 'walk'" in ziggurat.fails("walk", code=2)
    assert "ziggurat run --help" in ziggurat.fails("run", "--nonsense", code=2)
    assert "MODEL" in ziggurat.fails("run", code=2)


def test_commands_of_other_packages_are_found_and_their_errors_shown(
    ziggurat: Ziggurat, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TheirError(Exception):
        exit_code = 3

    @click.command(help="Breaks.")
    @click.argument("how")
    def other(how: str) -> None:
        raise {"theirs": TheirError("no\nroom"), "bug": KeyError("x"), "stop": KeyboardInterrupt()}[how]

    def load() -> click.Command:
        return other

    def missing() -> click.Command:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    entries = [
        SimpleNamespace(name="other", load=load, value="x"),
        SimpleNamespace(name="convert", load=missing, value="y"),
        SimpleNamespace(name="odd", load=lambda: 5, value="z:z"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    monkeypatch.delenv("ZIGGURAT_DEBUG", raising=False)
    assert "no room" in ziggurat.fails("other", "theirs", code=3)
    assert "KeyError: 'x' (a bug in Ziggurat" in ziggurat.fails("other", "bug", code=1)
    assert ziggurat("other", "stop")[0] == 130
    assert "needs the Python package torch" in ziggurat.fails("convert", code=1)
    assert "z:z of odd is not a command" in ziggurat.fails("odd", code=1)
    with pytest.raises(KeyError):
        ziggurat("--debug", "other", "bug")
    assert "Breaks." in ziggurat("--help")[1]


# --- run


def test_run_streams_text_and_nothing_else_to_stdout(ziggurat: Ziggurat, spm_path: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    code, out, err = ziggurat("run", spm_path, "the man", "--raw", "-n", 9, "--temp", 0, "--stats", stats, "--ctx", 300)
    assert code == 0
    assert out.endswith("\n")
    assert err.count("\n") == 1
    assert "9 generated" in err
    figures = json.loads(stats.read_text())
    assert set(figures) >= CONTRACT_STATS
    assert (figures["generated_tokens"], figures["evicted_rows"], figures["finish_reason"]) == (9, 0, "length")
    assert figures["kv_bytes"] == figures["kv_bytes_peak"] == figures["kv_bytes_full"] == 512 * 2 * 2 * 2 * 16 * 2
    assert figures["kv_rows_per_layer"] == [figures["prompt_tokens"]] * 2
    assert list(tmp_path.iterdir()) == [stats]
    assert ziggurat("run", spm_path, "the man", "--raw", "-n", 9, "--temp", 0)[1] == out


def test_stats_go_into_a_pipe_and_behind_a_link(spm_path: Path, tmp_path: Path) -> None:
    """A file renamed onto /dev/stdout or a link would take its place."""
    (tmp_path / "link").symlink_to("figures.json")
    for target, shown in ("/dev/stdout", True), (tmp_path / "link", False):
        process = child("run", spm_path, "ab", "-n", 1, "--temp", 0, "--threads", 1, "--stats", target)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert ("kv_rows_per_layer" in out) == shown
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "figures.json").read_text())["generated_tokens"] <= 1


def test_run_without_a_template_says_so_and_goes_on(ziggurat: Ziggurat, spm_path: Path) -> None:
    raw = ziggurat("run", spm_path, "the", "--raw", "-n", 4, "--temp", 0)
    code, out, err = ziggurat("run", spm_path, "the", "-n", 4, "--temp", 0)
    assert (code, out) == (0, raw[1])
    assert err.splitlines()[0] == "ziggurat: the model has no chat template; the prompt is given as it is (--raw)"
    assert "--system needs a chat template" in ziggurat.fails("run", spm_path, "a", "--raw", "--system", "b", code=2)


def test_run_uses_the_template_and_the_system_message(ziggurat: Ziggurat, chat_path: Path) -> None:
    chat = ziggurat("run", chat_path, "Hi", "--system", "Be brief.", "-n", 6, "--temp", 0)
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    raw = ziggurat("run", chat_path, text, "--raw", "-n", 6, "--temp", 0)
    assert chat[0] == raw[0] == 0
    assert chat[1] == raw[1]
    assert chat[1] != ziggurat("run", chat_path, "Hi", "-n", 6, "--temp", 0)[1]


def test_every_flag_of_the_contract(ziggurat: Ziggurat, chat_path: Path, tmp_path: Path) -> None:
    arguments = (
        "-n 5 --ctx 256 --ubatch 16 --kv-policy none --cache-type-k q8_0 --cache-type-v q4_0 --temp 0.9 --top-k 20"
    )
    arguments += " --top-p 0.9 --min-p 0.1 --seed 11 --threads 1 --gpu-layers 0"
    stats = [tmp_path / "a.json", tmp_path / "b.json"]
    outs = [ziggurat("run", chat_path, "Hi", "--raw", *arguments.split(), "--stats", path) for path in stats]
    assert outs[0][0] == 0
    assert outs[0][1] == outs[1][1]
    figures = json.loads(stats[0].read_text())
    assert (figures["seed"], figures["n_ctx"]) == (11, 256)
    assert figures["kv_bytes"] == 256 * 2 * (34 + 18)


@pytest.mark.parametrize("command", ["run", "eval", "plan"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--kv-policy pyramid", "--kv-policy: says how to keep a budget, and there is none; add --kv-budget"),
        ("--kv-schedule uniform --kv-window 16", "--kv-schedule, --kv-window: says how to keep a budget"),
        ("--kv-budget 512 --kv-policy none", "--kv-budget: --kv-policy none keeps every row"),
        ("--kv-budget 20", "--kv-budget 20: has no room for the window (32) and the sinks (4): give at least 36"),
        ("--kv-budget many", "--kv-budget many: give a number of rows above 0, or a part of the prompt such as 12%"),
        ("--kv-budget 99 --kv-window 0", "'--kv-window'"),
    ],
)
def test_contradictions_about_the_cache_are_one_line(
    ziggurat: Ziggurat, spm_path: Path, command: str, flags: str, message: str
) -> None:
    arguments = {"run": [spm_path, "a"], "eval": [spm_path, "--text", spm_path], "plan": [spm_path]}[command]
    assert message in ziggurat.fails(command, *arguments, *flags.split(), code=2)


@pytest.mark.parametrize("command", ["run", "eval"])
def test_a_budget_with_a_library_that_has_none_names_the_remedy(
    ziggurat: Ziggurat, spm_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise LibraryError(f"this llama.cpp keeps every KV row: {PATCHED_REMEDY}")

    monkeypatch.setattr(kv, "require", missing)
    rest = ["a", "--raw"] if command == "run" else ["--text", spm_path]
    message = ziggurat.fails(command, spm_path, *rest, "--kv-budget", "12%", code=1)
    assert "keeps every KV row: for KV budgets install the patched library: pip install" in message


@pytest.mark.parametrize("budget", ["0", "-5", "101%", "many", "1.5", "%", "nan%"])
def test_a_malformed_budget_is_a_mistake_of_its_own(ziggurat: Ziggurat, spm_path: Path, budget: str) -> None:
    assert f"--kv-budget {budget}: give" in ziggurat.fails("run", spm_path, "a", "--kv-budget", budget, code=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temp -1", "temperature is -1.0"),
        ("--temp nan", "temperature is nan"),
        ("--top-k -1", "top-k is -1"),
        ("--top-p 0", "top-p is 0.0"),
        ("--min-p 2", "min-p is 2.0"),
        ("--seed -3", "seed is -3"),
        ("-n 0", "-n 0"),
        ("-n x", "'-n'"),
        ("--ctx 0", "'--ctx'"),
        ("--ctx 99999999999", "is beyond"),
        ("--ubatch 0", "'--ubatch'"),
        ("--threads 0", "'--threads'"),
        ("--gpu-layers -1", "'--gpu-layers'"),
        ("--cache-type-k q2_k", "'--cache-type-k'"),
        ("--cache-type-k q8_0", "--cache-type-k q8_0 needs heads of a multiple of 32 values, this model's have 16"),
        ("--cache-type-v q4_0", "--cache-type-v q4_0 needs heads"),
        ("--stats /nonexistent/x.json", "its folder does not exist"),
        ("--stats /proc/x.json", "cannot be written"),
        ("--stop=", "stop string is empty"),
    ],
)
def test_bad_values_are_one_line(ziggurat: Ziggurat, spm_path: Path, flags: str, message: str) -> None:
    code, _, err = ziggurat("run", spm_path, "the", "--raw", *flags.split())
    assert code != 0
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("ziggurat: error: ")


def test_bad_models_are_one_line(ziggurat: Ziggurat, spm_path: Path, tmp_path: Path) -> None:
    text, cut, empty = tmp_path / "text.gguf", tmp_path / "cut.gguf", tmp_path / "empty.gguf"
    text.write_text("not a model")
    cut.write_bytes(spm_path.read_bytes()[:-1000])
    empty.touch()
    for command in (["run", "{}", "a"], ["inspect", "{}"], ["inspect", "{}", "--json"]):
        for path, message in (
            (tmp_path / "none.gguf", "no such file"),
            (tmp_path, "is a folder"),
            (text, "is not a GGUF file"),
            (cut, "truncated"),
            (empty, "is empty"),
        ):
            error = ziggurat.fails(*(part.format(path) for part in command), code=1)
            assert message in error
            assert str(path) in error


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "stdin is empty"),
        (b" \n\t", "stdin is empty"),
        (b"ok \xff\xfe", "stdin is not valid UTF-8: byte 0xff at 3"),
    ],
)
def test_bad_stdin(
    ziggurat: Ziggurat, spm_path: Path, data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert message in ziggurat.fails("run", spm_path, "-", code=2)


def test_a_prompt_from_stdin_and_bad_prompts(
    ziggurat: Ziggurat, spm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("naïve 日本\r\n".encode())))
    piped = ziggurat("run", spm_path, "-", "--raw", "-n", 5, "--temp", 0)
    assert piped[0] == 0
    assert piped[1] == ziggurat("run", spm_path, "naïve 日本", "--raw", "-n", 5, "--temp", 0)[1]
    assert "PROMPT is empty" in ziggurat.fails("run", spm_path, "", code=2)
    assert "PROMPT is not valid UTF-8" in ziggurat.fails("run", spm_path, "\udcff", code=2)


def test_a_prompt_longer_than_the_context_names_both(ziggurat: Ziggurat, spm_path: Path) -> None:
    message = ziggurat.fails("run", spm_path, "b" + " b" * 99, "--raw", "--ctx", 64, code=2)
    assert "201 tokens and the context 64: raise --ctx to at least 202" in message


def test_generate_takes_any_engine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine(["One \x1b[31m", "line."])
    fake.load()
    request = GenerationRequest(prompt="x")
    assert command_run.generate(fake, request).reason == "stop"
    assert capsys.readouterr().out == "One \x1b[31mline.\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    command_run.generate(fake, request)
    assert capsys.readouterr().out == "One [31mline.\n"  # a terminal would have obeyed
    fake.close()


# --- as processes


def test_run_starts_without_torch_and_transformers(spm_path: Path) -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'tokenizers', 'safetensors', 'huggingface_hub'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from ziggurat.runtime.cli import main\n"
        f"main(['run', {str(spm_path)!r}, 'the', '--raw', '-n', '3'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 generated" in done.stderr


def test_interrupting_a_generation(spm_path: Path) -> None:
    process = child("run", spm_path, "the", "--raw", "--ctx", "65536", "--temp", "0", "--threads", "1")
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        started = time.perf_counter()
        process.stdout.read()
        errors = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert time.perf_counter() - started < 5


def test_a_reader_that_leaves_is_no_error(spm_path: Path) -> None:
    process = child("run", spm_path, "the", "--raw", "--ctx", "65536", "--temp", "0", "--threads", "1")
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        os.read(process.stdout.fileno(), 10)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert errors == ""


def test_output_in_an_encoding_without_the_characters(spm_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    flags = "--raw -n 20 --temp 5 --top-k 0 --seed 1 --threads 1"
    process = child("run", spm_path, "日本", *flags.split(), env=environment)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out


def test_verbose_shows_the_librarys_log(spm_path: Path) -> None:
    process = child("run", spm_path, "the", "--raw", "-n", "2", "--verbose")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "n_ctx_train" in errors
