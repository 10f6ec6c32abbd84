from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from helpers import hollow_models, tiny_models
from helpers.hollow_models import Dims
from ziggurat.runtime import bindings, cli, hardware, sizes
from ziggurat.runtime.bindings import Context, ContextSettings, Model, measure
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.errors import InvalidRequestError, MemoryShortageError
from ziggurat.runtime.hardware import Gpu

GiB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine whose memory the test decides, without a GPU."""
    has: dict[str, Any] = {"memory": (64 * GiB, 32 * GiB), "swap": 0, "gpus": []}
    monkeypatch.setattr(hardware, "memory", lambda: has["memory"])
    monkeypatch.setattr(hardware, "swap", lambda: has["swap"])
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: has["gpus"])
    return has


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.run_command(cli.ziggurat, "ziggurat", [str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_plan_json_is_what_a_context_takes(
    capsys: pytest.CaptureFixture[str], chat_path: Path, machine: dict[str, Any]
) -> None:
    code, out, err = run(
        capsys, "plan", chat_path, "--json", "--ctx", 600, "--parallel", 3, "--cache-type-k", "q8_0", "--memory", "1MiB"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    settings = ContextSettings(n_ctx=600, n_seq_max=3, type_k="q8_0", n_threads=1)
    with Model(chat_path) as model, Context(model, settings) as context:
        real = measure(context)
        vocab = model.vocab.n_tokens
    planned = report["plan"]
    assert planned["kv_bytes"] == sum(planned["kv_bytes_per_layer"]) == sum(buffer.context for buffer in real)
    assert planned["compute_bytes"] == sum(buffer.compute for buffer in real)
    assert planned["output_bytes"] == 3 * vocab * 4
    assert (planned["ctx"], planned["ctx_allocated"], planned["parallel"]) == (600, 768, 3)
    assert planned["measured"] and planned["weights_exact"] and planned["kv_exact"]
    assert planned["total_bytes"] == sum(device["total"] for device in planned["devices"])
    assert report["fits"]["memory_bytes"] == 2**20
    assert report["machine"]["shortage"] is None


def test_more_conversations_than_a_batch_has_tokens(
    capsys: pytest.CaptureFixture[str], spm_path: Path, machine: dict[str, Any]
) -> None:
    code, out, err = run(capsys, "plan", spm_path, "--json", "--ctx", 256, "--batch", 8, "--ubatch", 8)
    assert (code, err) == (0, "")
    assert json.loads(out)["fits"]["conversations"] == 256


def test_plan_shows_a_table(capsys: pytest.CaptureFixture[str], spm_path: Path, machine: dict[str, Any]) -> None:
    code, out, err = run(capsys, "plan", spm_path, "--memory", "8GiB")
    assert (code, err) == (0, "")
    for text in (
        "One conversation of 1,024 tokens",
        "KV rows",
        "256.00 KiB",
        "2 x 128.00 KiB",
        "Into 8.00 GiB fit 256",
    ):
        assert text in out
    assert "estimate" not in out
    out = run(capsys, "plan", spm_path, "--estimate", "--parallel", 2)[1]
    assert "2 conversations of 1,024 tokens" in out
    assert "compute buffers are an estimate" in out
    assert "Into 32.00 GiB" in out  # what is free


def test_plan_with_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path, machine: dict[str, Any]) -> None:
    path = hollow_models.write_model(tmp_path / "m.gguf", Dims(n_embd=2048, n_ff=8192, n_vocab=32000))
    machine["gpus"] = [Gpu("a", "8.6", GiB, GiB)]
    report = json.loads(run(capsys, "plan", path, "--estimate", "--gpu-layers", 99, "--json")[1])
    host, gpu = report["plan"]["devices"]
    assert (gpu["device"], report["fits"]["memory_bytes"]) == ("GPU", GiB)
    assert report["fits"]["conversations"] > 0
    machine["gpus"] = [Gpu("a", "8.6", GiB, 1000)]
    out = run(capsys, "plan", path, "--estimate", "--gpu-layers", 99)[1]
    assert "GPU" in out and "1000 B are free" in out


def test_plan_of_a_family_without_plain_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, machine: dict[str, Any]
) -> None:
    path = tiny_models.write_model(tmp_path / "m.gguf", tiny_models.Shape(arch="gemma4", sliding_window=64))
    out = " ".join(run(capsys, "plan", path, "--estimate")[1].split())
    assert "KV by layer is an upper estimate" in out


def test_plan_of_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path, machine: dict[str, Any]) -> None:
    config = {"model_type": "gpt2", "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        report = json.loads(run(capsys, "plan", path, "--json", "--type", "f16")[1])
        assert (report["architecture"], report["plan"]["ctx"]) == ("gpt2", 512)
        assert not report["plan"]["weights_exact"] and not report["plan"]["measured"]
    assert "not converted yet" in run(capsys, "plan", tmp_path)[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory", "much"], "'much' is not a size"),
        (["--type", "q8_0"], "--type is for checkpoints"),
        (["--ctx", "0"], "--ctx"),
        (["--parallel", "257"], "--parallel"),
        (["--cache-type-k", "q8_0"], "multiple of 32"),
        (["--cache-type-v", "q8_0", "--flash-attention", "off"], "needs flash attention"),
    ],
)
def test_wrong_wishes_are_one_line(
    capsys: pytest.CaptureFixture[str], spm_path: Path, options: list[str], said: str, machine: dict[str, Any]
) -> None:
    code, out, err = run(capsys, "plan", spm_path, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_what_fits_is_told_in_words(
    capsys: pytest.CaptureFixture[str], spm_path: Path, machine: dict[str, Any]
) -> None:
    def told(memory: str) -> str:
        return " ".join(run(capsys, "plan", spm_path, "--estimate", "--ctx", 512, "--memory", memory)[1].split())

    assert "fits no conversation of this context" in told("1")
    assert "fit 256 conversations of this context, the most the library runs;" in told("32GiB")


def test_wrong_files_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, machine: dict[str, Any]) -> None:
    damaged = hollow_models.write_model(tmp_path / "m.gguf", Dims(n_head=8, n_head_kv=3))
    (tmp_path / "no.gguf").write_bytes(b"GGML")
    for path, said in ((damaged, "GGML_ASSERT"), (tmp_path / "no.gguf", "not a GGUF"), (tmp_path / "x", "no such")):
        code, out, err = run(capsys, "plan", path)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert said in err


def test_inspect_says_what_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path, machine: dict[str, Any]) -> None:
    path = hollow_models.write_model(tmp_path / "m.gguf", Dims())
    contexts = json.loads(run(capsys, "inspect", path, "--json", "--ctx", "4k,64k")[1])["memory"]["contexts"]
    small, large = (row["total_bytes"] for row in contexts)
    assert [row["total_bytes"] - row["kv_bytes"] - row["compute_bytes"] - row["output_bytes"] for row in contexts] == [
        json.loads(run(capsys, "inspect", path, "--json")[1])["weights_bytes"]
    ] * 2
    machine["memory"] = (64 * GiB, small)
    machine["gpus"] = [Gpu("a", "8.6", GiB, large)]
    memory = json.loads(run(capsys, "inspect", path, "--json", "--ctx", "4k,64k")[1])["memory"]
    assert [(row["fits_memory"], row["fits_gpu"]) for row in memory["contexts"]] == [(True, True), (False, True)]
    assert (memory["available_bytes"], memory["gpu_free_bytes"]) == (small, large)
    out = run(capsys, "inspect", path, "--ctx", "4k,64k")[1]
    assert "yes" in out and "no" in out and "estimate" in out


def test_a_start_warns_when_memory_is_short(
    spm_path: Path, machine: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings = EngineSettings(n_ctx=512, threads=1)
    with caplog.at_level(logging.WARNING, "ziggurat.runtime.engine.memory_check"):
        with LlamaEngine(spm_path, settings) as engine:
            engine.load()
        assert not caplog.records
        machine["memory"] = (64 * GiB, 1000)
        with LlamaEngine(spm_path, settings) as engine:
            engine.load()
    (record,) = caplog.records
    assert "1000 B are free" in record.getMessage()
    assert str(spm_path) in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize("asked", [True, False])
def test_a_start_is_refused_when_it_can_never_work(
    spm_path: Path, machine: dict[str, Any], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ziggurat.runtime.engine import memory_check

    if not asked:  # as with a stock library
        monkeypatch.setattr(memory_check, "can_measure", lambda: False)
    machine["memory"] = (1000, 900)
    with LlamaEngine(spm_path, EngineSettings(n_ctx=512, threads=1)) as engine:
        with pytest.raises(MemoryShortageError, match=r"a context of 512 tokens .* this machine has 1000 B"):
            engine.load()
    machine["swap"] = GiB
    with LlamaEngine(spm_path, EngineSettings(n_ctx=512, threads=1)) as engine:
        engine.load()


def test_plan_with_a_stock_library(
    capsys: pytest.CaptureFixture[str], spm_path: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ziggurat.runtime.plan import planner

    monkeypatch.setattr(planner, "can_measure", lambda: False)
    assert not json.loads(run(capsys, "plan", spm_path, "--json")[1])["plan"]["measured"]


def test_a_cache_too_large_to_simulate_is_estimated(spm_path: Path) -> None:
    from ziggurat.runtime.plan import open_planner

    with open_planner(spm_path) as planner:
        assert planner.plan(ContextSettings(n_ctx=2**20, n_seq_max=4)).measured
        assert not planner.plan(ContextSettings(n_ctx=2**20, n_seq_max=5)).measured
    assert bindings.can_measure()


@pytest.mark.parametrize(
    ("text", "size"),
    [("48GiB", 48 * GiB), ("33GB", 33 * 10**9), ("1.5 mib", 3 * 2**19), ("1000", 1000), ("2kB", 2000), ("0", 0)],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert sizes.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "48G", "GiB", "-1", "1e9", "48iB", "48 apples", "5B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not a size"):
        sizes.parse_bytes(text)
