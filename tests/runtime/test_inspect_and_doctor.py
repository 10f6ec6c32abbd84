from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from helpers import tiny_models
from ziggurat.runtime import bindings, cli, command_doctor, hardware
from ziggurat.runtime.bindings import Model
from ziggurat.runtime.command_inspect import tensor_group
from ziggurat.runtime.errors import LibraryError
from ziggurat.runtime.hardware import Gpu


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.run_command(cli.ziggurat, "ziggurat", [str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_inspect_json_agrees_with_the_library(capsys: pytest.CaptureFixture[str], chat_path: Path) -> None:
    report = json.loads(run(capsys, "inspect", chat_path, "--json", "--ctx", "256,4k")[1])
    with Model(chat_path) as model:
        assert report["parameters"] == model.n_params
        assert report["weights_bytes"] == model.n_bytes
        assert report["layers"] == model.n_layer
        assert report["context_length"] == model.n_ctx_train
        assert report["tokenizer"] == {
            "model": "gpt2",
            "pre": "gpt-2",
            "tokens": model.vocab.n_tokens,
            "chat_template": True,
        }
    assert (report["architecture"], report["file_type"], report["bits_per_weight"]) == ("llama", "F32", 32.0)
    assert report["kv"]["bytes_per_token"] == 2 * 2 * 32 * 2
    assert report["kv"]["bytes_at_context"] == {"256": 65536, "4096": 2**20}
    assert sum(group["count"] for group in report["tensors"].values()) == 3 + 9 * 2
    assert report["tensors"]["norm"] == {"count": 5, "parameters": 320, "bytes": 1280, "types": {"F32": 5}}
    assert {"embedding", "attention", "ffn", "norm", "output"} == set(report["tensors"])


def test_inspect_shows_a_table(capsys: pytest.CaptureFixture[str], spm_path: Path) -> None:
    code, out, err = run(capsys, "inspect", spm_path)
    assert (code, err) == (0, "")
    for text in ("architecture", "llama, 2 layers", "no chat template", "attention", "1,024", "4 query, 2 KV, 16 wide"):
        assert text in out


def test_inspect_shows_our_own_metadata_experts_and_odd_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_block_count(2)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_string("ziggurat.version", "0.1.0")
    writer.add_array("ziggurat.pruned_blocks", [3, 4])
    writer.add_file_type(999)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = json.loads(run(capsys, "inspect", path, "--json")[1])
    assert report["ziggurat"] == {"ziggurat.version": "0.1.0", "ziggurat.pruned_blocks": [3, 4]}
    assert (report["kv"], report["file_type"], report["bits_per_weight"]) == (None, "unknown (999)", 0.0)
    out = run(capsys, "inspect", path)[1]
    assert "8, 2 used per token" in out
    assert "no KV cache" in out
    assert "pruned_blocks" in out


def test_inspect_of_a_family_without_plain_rows_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tiny_models.write_model(tmp_path / "m.gguf", tiny_models.Shape(arch="gemma4", sliding_window=64))
    assert "upper estimate" in run(capsys, "inspect", path)[1]


@pytest.mark.parametrize("text", ["", "0", "x", "4k,", "-1", "1e9"])
def test_inspect_refuses_bad_contexts(capsys: pytest.CaptureFixture[str], spm_path: Path, text: str) -> None:
    code, out, err = run(capsys, "inspect", spm_path, f"--ctx={text}")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_inspect_refuses_cache_types_that_do_not_fit(capsys: pytest.CaptureFixture[str], spm_path: Path) -> None:
    code, _, err = run(capsys, "inspect", spm_path, "--cache-type-k", "q8_0")
    assert code == 2
    assert "multiple of 32" in err


def test_inspect_needs_no_library(spm_path: Path) -> None:
    code = (
        "import sys; from ziggurat.runtime.cli import run_command, ziggurat\n"
        f"code = run_command(ziggurat, 'ziggurat', ['inspect', {str(spm_path)!r}])\n"
        "assert code == 0 and 'llama_cpp' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("token_embd.weight", "embedding"),
        ("output.weight", "output"),
        ("output_norm.weight", "norm"),
        ("blk.0.attn_q.weight", "attention"),
        ("blk.0.attn_norm.weight", "norm"),
        ("blk.0.attn_q_norm.weight", "norm"),
        ("blk.3.ffn_down.weight", "ffn"),
        ("blk.3.ffn_down_exps.weight", "experts"),
        ("blk.3.ffn_gate_inp.weight", "experts"),
        ("blk.3.ffn_up_shexp.weight", "experts"),
        ("rope_freqs.weight", "other"),
        ("blk.1.ssm_in.weight", "other"),
    ],
)
def test_tensor_groups(name: str, group: str) -> None:
    assert tensor_group(name) == group


def test_doctor_reports_what_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert (code, err, report["usable"]) == (0, "", True)
    assert report["library"]["patched"] == bindings.probe().patched
    assert report["library"]["devices"]
    assert report["library"]["kv_budgets"] == bindings.kv.available()
    assert report["packages"]["gguf"]
    if not report["library"]["patched"]:
        assert any("except convert and KV budgets" in problem["what"] for problem in report["problems"])
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "llama.cpp" in out


def _pretend(monkeypatch: pytest.MonkeyPatch, **library: Any) -> None:
    found = {
        "path": "/lib",
        "package_version": "0.3.36+ziggurat.2",
        "llama_version": "0",
        "ziggurat_version": "1",
        "patched": True,
        "devices": [],
        "features": {},
        "gpu_offload": False,
        "kv_budgets": True,
        **library,
    }
    monkeypatch.setattr(command_doctor, "_library", lambda: (found, None))
    monkeypatch.setattr(hardware, "nvidia_gpus", list)
    monkeypatch.setattr(hardware, "memory", lambda: (64 * 2**30, 32 * 2**30))
    monkeypatch.setattr(command_doctor, "_version", lambda name: "1")


def test_doctor_shows_long_paths_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/" + "/".join(f"folder{i}" for i in range(30)) + "/libllama.so"
    _pretend(monkeypatch, path=path)
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and path in "".join(out.split())


def test_doctor_with_nothing_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch)
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "patched (ziggurat 1)" in out
    assert "KV budgets" in out
    assert "Nothing is missing." in out


def test_doctor_names_each_problem_and_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, patched=False, package_version="0.4.0")
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: [Gpu("NVIDIA A40", "8.6", 48 * 2**30, 40 * 2**30)])
    monkeypatch.setattr(hardware, "memory", lambda: (8 * 2**30, 2**30))
    monkeypatch.setattr(command_doctor, "_version", lambda name: None if name == "torch" else "1")
    report = json.loads(run(capsys, "doctor", "--json")[1])
    remedies = {problem["what"].split(":")[0]: problem["remedy"] for problem in report["problems"]}
    assert len(remedies) == 5
    assert all(remedies.values())
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "NVIDIA A40, compute capability 8.6" in out
    assert "ZIGGURAT_CUDA=on" in out
    assert "convert needs torch" in out
    gpus = [Gpu("a", "9.0", 2**30, 2**30), Gpu("b", "8.9", 2**30, 2**30)]
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: gpus)
    assert "ZIGGURAT_CUDA=89,90 pip" in run(capsys, "doctor")[1]


def test_doctor_names_patches_without_budgets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, kv_budgets=False)
    (problem,) = json.loads(run(capsys, "doctor", "--json")[1])["problems"]
    assert problem["what"] == "these patches are too old for KV budgets"
    assert problem["remedy"] == "pip install --force-reinstall ./patches"


def test_doctor_without_a_library_fails_and_still_tells_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise LibraryError("the Python package llama_cpp is not installed")

    monkeypatch.setattr(bindings, "probe", missing)
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (1, "")
    assert "cannot be loaded" in out
    assert "pip install ./patches" in out
    assert "memory" in out
    assert not json.loads(run(capsys, "doctor", "--json")[1])["usable"]


def test_a_missing_package_and_a_broken_library_are_told_apart() -> None:
    code = (
        "import sys, types\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'llama_cpp': raise {error}\n"
        "sys.meta_path.insert(0, Block())\n"
        "from ziggurat.runtime.cli import main\n"
        "main(['{command}', *{arguments}])\n"
    )
    for error, message in (
        ("ModuleNotFoundError('no', name='llama_cpp')", "llama_cpp is not installed"),
        ("RuntimeError('libcuda.so.1: cannot open')", "cannot be loaded (libcuda.so.1: cannot open)"),
    ):
        source = code.format(error=error, command="doctor", arguments=[])
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert message in done.stdout.replace("\n", " ")
        assert done.stderr == ""


def test_nvidia_smi_is_parsed_and_its_faults_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None)
    assert hardware.nvidia_gpus() == []
    for script, expected in (
        (
            "echo 'NVIDIA A40, 8.6, 46068, 45000'; echo 'odd, line'",
            [Gpu("NVIDIA A40", "8.6", 46068 * 2**20, 45000 * 2**20)],
        ),
        ("exit 9", []),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert hardware.nvidia_gpus() == expected
