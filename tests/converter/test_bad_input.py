"""Every bad input gives one line that names the problem and the way out, a non-zero exit and no file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from helpers.plain import PLAIN_FLAGS
from ziggurat.converter.cli import convert, main

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def folder(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoiled."""
    return Path(shutil.copytree(checkpoint("llama_tied", dtype="float32"), tmp_path / "model.hf"))


def run(*args: object) -> Result:
    return CliRunner().invoke(convert, [str(a) for a in args])


def refused(result: Result, *words: str) -> None:
    lines = result.stderr.strip().splitlines()
    assert result.exit_code != 0
    assert lines[-1].startswith("convert: error: ")
    assert "Traceback" not in result.output and len(lines) == 1
    for word in words:
        assert word in lines[-1]


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensor(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[arg-type]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path):
    yield
    assert not list(tmp_path.rglob("*.gguf"))
    assert not list(tmp_path.rglob("*.part"))


def test_missing_folder(tmp_path: Path) -> None:
    refused(run(tmp_path / "nowhere", tmp_path / "out.gguf"), "nowhere", "does not exist")


def test_a_gguf_as_input(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"GGUF" + bytes(100))
    refused(run(path, tmp_path / "out.gguf"), "is a GGUF file already")


def test_another_file_as_input(tmp_path: Path) -> None:
    path = tmp_path / "model.txt"
    path.write_text("hello")
    refused(run(path, tmp_path / "out.gguf"), "is a file")


def test_no_config(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    refused(run(folder, tmp_path / "out.gguf"), "config.json")


def test_damaged_config(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(run(folder, tmp_path / "out.gguf"), "config.json", "JSON")


def test_truncated_safetensors(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(run(folder, tmp_path / "out.gguf"), "model.safetensors is truncated", "download it again")


def test_safetensors_cut_in_the_header(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refused(run(folder, tmp_path / "out.gguf"), "truncated")


def header(folder: Path, content: bytes, length: int | None = None) -> None:
    size = len(content) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + content + bytes(16))


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 99_999_999, 1000])
def test_a_header_longer_than_the_file(folder: Path, tmp_path: Path, length: int) -> None:
    header(folder, b"{}", length)
    refused(run(folder, tmp_path / "out.gguf"), "model.safetensors is truncated or no safetensors file")


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": ', b"\xff{}", b"[" * 100_000], ids=range(5))
def test_a_header_that_is_no_table(folder: Path, tmp_path: Path, content: bytes) -> None:
    header(folder, content)
    refused(run(folder, tmp_path / "out.gguf"), "model.safetensors has a damaged header", "download it again")


@pytest.mark.parametrize(
    "entry",
    [
        5,
        {"dtype": "F32", "shape": [4]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
    ],
    ids=range(8),
)
def test_a_damaged_entry(folder: Path, tmp_path: Path, entry: object) -> None:
    header(folder, json.dumps({"some.weight": entry}).encode())
    refused(run(folder, tmp_path / "out.gguf"), "the entry of tensor some.weight is damaged")


@pytest.mark.parametrize("dtype", ["F4", ["F32"]], ids=["unknown", "list"])
def test_an_unknown_type_of_numbers(folder: Path, tmp_path: Path, dtype: object) -> None:
    header(folder, json.dumps({"some.weight": {"dtype": dtype, "shape": [4], "data_offsets": [0, 16]}}).encode())
    refused(run(folder, tmp_path / "out.gguf"), "tensor some.weight has the type")


def test_tensors_that_overlap(folder: Path, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header(folder, json.dumps({"one.weight": entry, "other.weight": entry}).encode())
    refused(run(folder, tmp_path / "out.gguf"), "one.weight and other.weight overlap")


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_does_not_fit_its_shards(folder: Path, tmp_path: Path) -> None:
    names = {name: "model.safetensors" for name in load_file(folder / "model.safetensors")}
    write_index(folder, {**names, "model.layers.9.mlp.up_proj.weight": "model.safetensors"})
    refused(run(folder, tmp_path / "out.gguf"), "model.layers.9.mlp.up_proj.weight", "in no file")
    del names["model.norm.weight"]
    write_index(folder, names)
    refused(run(folder, tmp_path / "out.gguf"), "holds tensor model.norm.weight", "does not list")
    write_index(folder, {})
    refused(run(folder, tmp_path / "out.gguf"), "no weight_map")


def test_missing_shard(folder: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(run(folder, tmp_path / "out.gguf"), "model-00001-of-00002.safetensors is missing")


def test_shard_outside_the_folder(folder: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(run(folder, tmp_path / "out.gguf"), "outside the folder")


def test_tensor_of_a_wrong_shape(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensor(folder, lambda t: t.update({name: t[name][:, :256].copy()}))  # type: ignore[index]
    refused(run(folder, tmp_path / "out.gguf"), "blk.1.ffn_down.weight", "shape")


def test_a_tensor_that_no_llama_has(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.foo.weight"
    edit_tensor(folder, lambda t: t.update({name: t["model.norm.weight"].copy()}))  # type: ignore[attr-defined]
    refused(run(folder, tmp_path / "out.gguf"), f"no place for tensor {name} in LlamaForCausalLM")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1}, ["model.layers.1.", "number of layers?"]),
        ({"num_hidden_layers": 3}, ["blk.2.attn_norm.weight", "not found", "config.json"]),
        ({"hidden_size": 512}, ["token_embd.weight", "wrong shape", "config.json"]),
        ({"num_attention_heads": 7}, ["its tensors", "shape"]),
        ({"num_attention_heads": 0}, ["its tensors", "ZeroDivisionError"]),
        ({"num_hidden_layers": "two"}, ["its tensors", "TypeError"]),
        ({"vocab_size": 100}, ["more tokens than the vocab_size in config.json"]),
        ({"vocab_size": 5000}, ["token_embd.weight", "wrong shape", "5000"]),
    ],
    ids=str,
)
def test_a_configuration_of_other_weights(
    folder: Path, tmp_path: Path, changes: dict[str, object], words: list[str]
) -> None:
    edit(folder / "config.json", **changes)
    refused(run(folder, tmp_path / "out.gguf"), *words)


def test_a_number_of_layers_beyond_all_sense(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=10**9)
    refused(run(folder, tmp_path / "out.gguf"), "num_hidden_layers = 1000000000", "not of these weights")


def test_a_vision_encoder(folder: Path, tmp_path: Path) -> None:
    text = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", architectures=["CLIPModel"], text_config=text, vision_config={"hidden_size": 8})
    refused(run(folder, tmp_path / "out.gguf"), "CLIPModel is not known")


def test_libraries_warnings_are_not_the_users(folder: Path, tmp_path: Path) -> None:
    """transformers warns when it reads this text model's configuration as that of a vision-language model."""
    edit(folder / "config.json", architectures=["LlavaForConditionalGeneration"], model_type="llava")
    refused(run(folder, tmp_path / "out.gguf", *PLAIN_FLAGS), "config.json")


def test_a_value_that_no_gguf_can_hold(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"top_k": "many"}))
    refused(run(folder, tmp_path / "out.gguf"), "general.sampling.top_k = 'many'")


def test_missing_tensor(folder: Path, tmp_path: Path) -> None:
    edit_tensor(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))  # type: ignore[arg-type,return-value]
    refused(run(folder, tmp_path / "out.gguf"), "blk.1.ffn_up.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("type_name", ["q4_k_m", "q8_0", "bf16"])
def test_non_finite_weights(folder: Path, tmp_path: Path, value: float, type_name: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, object]) -> None:
        tensors[name][3, 7] = value  # type: ignore[index]

    edit_tensor(folder, spoil)
    result = run(folder, tmp_path / "out.gguf", "--type", type_name, *PLAIN_FLAGS)
    assert result.exit_code == 1
    assert "blk.1.ffn_up.weight has NaN or infinite values" in result.stderr.splitlines()[-1]


def test_missing_tokenizer(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(run(folder, tmp_path / "out.gguf"), "no tokenizer")


def test_damaged_tokenizer(folder: Path, tmp_path: Path) -> None:
    path = folder / "tokenizer.json"
    text = path.read_text()
    for content in ("{}", text[: len(text) // 2]):
        path.write_text(content)
        refused(run(folder, tmp_path / "out.gguf"), str(path), "copy the file again")


def test_unknown_pre_tokenizer(folder: Path, tmp_path: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"[a-z]+|\s+"}
    path.write_text(json.dumps(content))
    refused(run(folder, tmp_path / "out.gguf"), "pre-tokenizer", "--pre")


def test_pre_tokenizer_by_name(folder: Path, tmp_path: Path) -> None:
    """A name that llama.cpp does not know is found out before any weight is touched."""
    refused(run(folder, tmp_path / "out.gguf", "--pre", "no-such-thing"), "no pre-tokenizer 'no-such-thing'", "--pre")


def test_pre_tokenizer_where_there_is_none(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    refused(run(checkpoint("llama_untied"), tmp_path / "out.gguf", "--pre", "qwen2"), "'llama'", "leave --pre out")


@pytest.mark.parametrize("option", ["--name", "--pre"])
@pytest.mark.parametrize("value", ["", " ", "\udcff"], ids=["empty", "blank", "bytes"])
def test_names_that_are_none(folder: Path, tmp_path: Path, option: str, value: str) -> None:
    refused(run(folder, tmp_path / "out.gguf", option, value), f"{option} is empty or no text")


def test_unknown_architecture(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", architectures=["NoSuchModelForCausalLM"])
    refused(run(folder, tmp_path / "out.gguf"), "NoSuchModelForCausalLM")


def test_no_architecture(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", architectures=None)
    refused(run(folder, tmp_path / "out.gguf"), "architecture")


def test_pickle_only(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(run(folder, tmp_path / "out.gguf"), "pickled", "safetensors")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_custom_code_is_refused_and_never_run(folder: Path, tmp_path: Path, file: str) -> None:
    marker = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (folder / "modeling_own.py").write_text(code)
    (folder / "configuration_own.py").write_text(code)
    edit(folder / file, auto_map={"AutoConfig": "configuration_own.C", "AutoTokenizer": ["modeling_own.T", None]})
    refused(run(folder, tmp_path / "out.gguf"), "auto_map", "--ignore-code")
    out = tmp_path / "ignored.bin"
    assert run(folder, out, "--ignore-code", "--type", "bf16").exit_code == 0
    assert out.exists() and not marker.exists()


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "no-such-method"])
def test_unknown_quantization(folder: Path, tmp_path: Path, method: str) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(run(folder, tmp_path / "out.gguf"), repr(method))


@pytest.mark.parametrize("type_name", ["iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "q2_k_s", "iq1_s"])
def test_types_that_need_an_importance_matrix(folder: Path, tmp_path: Path, type_name: str) -> None:
    refused(run(folder, tmp_path / "out.gguf", "--type", type_name, *PLAIN_FLAGS), "importance matrix", "--imatrix")


def test_unreadable_importance_matrix(folder: Path, tmp_path: Path) -> None:
    refused(run(folder, tmp_path / "out.gguf", "--imatrix", tmp_path / "none"), "does not exist")
    refused(run(folder, tmp_path / "out.gguf", "--imatrix", tmp_path), "is a folder")
    legacy = tmp_path / "legacy.dat"
    legacy.write_bytes(bytes(64))
    refused(run(folder, tmp_path / "out.gguf", "--imatrix", legacy), "legacy")


def test_output_exists(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    out.write_text("precious")
    refused(run(folder, out), "--force")
    assert out.read_text() == "precious"


def test_output_folder_missing(folder: Path, tmp_path: Path) -> None:
    refused(run(folder, tmp_path / "no" / "out.gguf"), "does not exist")


def test_report_in_a_missing_folder(folder: Path, tmp_path: Path) -> None:
    refused(run(folder, tmp_path / "out.gguf", "--report", tmp_path / "no" / "report.json"), "does not exist")


def test_report_is_a_folder(folder: Path, tmp_path: Path) -> None:
    refused(run(folder, tmp_path / "out.gguf", "--report", tmp_path), "is a folder")


def test_report_in_the_output(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(folder, tmp_path / "out.gguf", "--report", "out.gguf"), "cannot be the report as well")


def test_output_in_place_of_the_weights(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    refused(run(folder, folder / "model.safetensors", "--force"), "is a part of the checkpoint")
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_number_of_threads(folder: Path, tmp_path: Path, number: str) -> None:
    result = run(folder, tmp_path / "out.gguf", "--threads", number)
    assert result.exit_code == 2 and "--threads" in result.stderr


def test_output_is_a_folder(folder: Path, tmp_path: Path) -> None:
    refused(run(folder, tmp_path), "is a folder")


def test_output_is_a_device_or_a_pipe(folder: Path, tmp_path: Path) -> None:
    """A file renamed onto one, /dev/null say, would take it away from everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused(run(folder, pipe, "--force"), "is no regular file")
    assert pipe.is_fifo()


def test_names_longer_than_file_systems_take(folder: Path, tmp_path: Path) -> None:
    refused(run(folder, tmp_path / ("x" * 300)), "File name too long")
    refused(run("x" * 300, tmp_path / "out.gguf"), "File name too long")


def test_output_folder_read_only(folder: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    refused(run(folder, closed / "out.gguf"), "read-only")


def test_output_on_a_file_system_that_takes_no_files(folder: Path) -> None:
    refused(run(folder, "/proc/self/task/out.gguf"), "/proc/self/task")


def test_too_little_space_is_seen_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(run(folder, tmp_path / "out.gguf"), "MB free", "make room")


NOT_INSTALLED = "convert: error: {} is not installed: `pip install 'ziggurat[convert]'`"


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_installed_without_what_every_conversion_imports(folder: Path, tmp_path: Path, missing: str) -> None:
    """`pip install ziggurat` alone runs models; the line says what converting them needs."""
    code = f"import sys; sys.modules[{missing!r}] = None; from ziggurat.converter.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "out.gguf")], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [NOT_INSTALLED.format(missing)]


@pytest.mark.parametrize("missing", ["sentencepiece", "huggingface_hub"])
def test_installed_without_what_some_conversions_import(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    result = run("owner/name" if missing == "huggingface_hub" else folder, tmp_path / "out.gguf")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [NOT_INSTALLED.format(missing)]


def test_unknown_type(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out.gguf", "--type", "q4_z")
    assert result.exit_code == 2 and "q4_z" in result.stderr


def test_a_wrong_call_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], [folder], [folder, tmp_path / "out.gguf", "--type", "q4_z"], ["--nonsense"]):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2
        assert line.startswith("convert: error: ") and line.endswith("convert --help)")


def test_a_wrong_call_of_the_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ziggurat.converter", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("convert: error: ")


def test_python_files_of_a_checkpoint_are_never_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when it is the current folder, where Python would look for modules first."""
    ran = tmp_path / "ran"
    for name in ("ctypes", "numpy", "llama_cpp", "subprocess", "typing_extensions"):
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.chdir(folder)
    result = run(".", tmp_path / "out.gguf", *PLAIN_FLAGS)
    (tmp_path / "out.gguf").unlink()
    assert result.exit_code == 0 and not ran.exists()
