"""A checkpoint planned by its config, against the plan of the GGUF that it becomes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import families
from helpers.plain import plain
from ziggurat.converter.pipeline import convert
from ziggurat.runtime import plan
from ziggurat.runtime.bindings import Context, ContextSettings, Model, measure
from ziggurat.runtime.errors import ModelFileError, UnsupportedError
from ziggurat.runtime.gguf_file import read_gguf
from ziggurat.runtime.plan.checkpoint import FAMILIES, checkpoint_outline
from ziggurat.runtime.plan.file_types import FILE_TYPES

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", [name for name, family in families.FAMILIES.items() if family.causal])
@pytest.mark.parametrize("style", ["classic", "saved"])
def test_a_config_is_planned_like_its_conversion(name: str, style: Any, tmp_path: Path) -> None:
    folder = families.build(name, tmp_path / "model", config=style)
    convert(folder, tmp_path / "m.gguf", plain(threads=1))
    converted = plan.outline(read_gguf(tmp_path / "m.gguf"))
    by_tables = checkpoint_outline(folder, "q4_k_m")
    # without the tensors, as it is before a download
    by_config = checkpoint_outline(write(tmp_path, json.loads((folder / "config.json").read_text())), "q4_k_m")
    settings = ContextSettings(n_ctx=300, n_seq_max=2, n_threads=1)
    with Model(tmp_path / "m.gguf") as model, Context(model, settings) as context:
        kv = sum(buffer.context for buffer in measure(context))
    for outline in (by_tables, by_config):
        for field in ("architecture", "n_embd", "n_ff", "n_vocab", "n_ctx_train", "kv"):
            assert getattr(outline, field) == getattr(converted, field), field
        assert outline.weights.tied == converted.weights.tied
        assert outline.weights.total == pytest.approx(converted.weights.total, rel=0.05)
        assert len(outline.weights.layers) == len(converted.weights.layers)
        planned = plan.plan_memory(outline, settings)
        assert planned.context == sum(planned.kv_per_layer) == kv
        assert planned.total == pytest.approx(plan.plan_memory(converted, settings).total, rel=0.05)
        assert not planned.weights_exact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build("llama_gqa", tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.mark.parametrize("type_name", FILE_TYPES)
def test_the_size_of_each_file_type(type_name: str, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "m.gguf", plain(type=type_name, threads=1))
    converted = plan.outline(read_gguf(tmp_path / "m.gguf")).weights.total
    assert checkpoint_outline(folder, type_name).weights.total == pytest.approx(converted, rel=0.02)
    # weights counted by their tables: float types have nothing to estimate
    if type_name in ("f32", "f16", "bf16"):
        assert checkpoint_outline(folder, type_name).weights.total == converted


def test_published_sizes(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIG)
    # llama.cpp's table for Llama 3 8B: 14.96 GiB in F16, 4.58 GiB in Q4_K_M
    assert checkpoint_outline(path, "f16").weights.total / 2**30 == pytest.approx(14.96, rel=0.001)
    assert checkpoint_outline(path, "q4_k_m").weights.total / 2**30 == pytest.approx(4.58, rel=0.01)
    assert checkpoint_outline(path, "Q4_K_S").weights.total / 2**30 == pytest.approx(4.37, rel=0.01)


def test_the_language_part_of_a_model_that_sees(tmp_path: Path) -> None:
    text = {**CONFIG, "model_type": "gemma3_text", "sliding_window": 512, "head_dim": 256}
    outline = checkpoint_outline(write(tmp_path, {"model_type": "gemma3", "text_config": text}), "f16")
    assert (outline.architecture, outline.weights.tied) == ("gemma3", False)
    assert outline.kv is not None
    assert outline.kv.window[:7] == (512,) * 5 + (0, 512)


def test_several_files_and_blocks_that_are_not_run(tmp_path: Path) -> None:
    path = write(tmp_path, {**CONFIG, "num_hidden_layers": 2})
    header = {"model.layers.0.mlp.up_proj.weight": [32, 64], "model.layers.2.mlp.up_proj.weight": [32, 64]}
    files = {"a.safetensors": header, "b.safetensors": {"model.embed_tokens.weight": [100, 64]}}
    for name, shapes in files.items():
        table = {key: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for key, shape in shapes.items()}
        data = json.dumps({**table, "__metadata__": {}}).encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(data)) + data)
    weight_map = {key: name for name, shapes in files.items() for key in shapes}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights = checkpoint_outline(path, "f16").weights
    assert (weights.layers, weights.input, weights.output) == ((32 * 64 * 2, 0), 100 * 64 * 2, 0)
    (tmp_path / "b.safetensors").unlink()  # not all there: counted by the config again
    assert checkpoint_outline(path, "f16").weights.total > 10**9


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model_type": "mamba"}, UnsupportedError, "type mamba cannot be planned .* llama, mistral"),
        ({"model_type": None}, UnsupportedError, "type None"),
        ({"model_type": ["llama"]}, UnsupportedError, "cannot be planned"),
        ({"hidden_size": None}, ModelFileError, "hidden_size is None; it must be a number"),
        ({"vocab_size": "many"}, ModelFileError, "vocab_size is 'many'"),
        ({"num_hidden_layers": -1}, ModelFileError, "num_hidden_layers is -1"),
        ({"num_attention_heads": 0}, ModelFileError, "makes no sense"),
        ({"num_local_experts": 8}, ModelFileError, "num_experts_per_tok is None"),
    ],
)
def test_configs_that_make_no_sense(change: dict[str, Any], error: type[Exception], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said) as caught:
        checkpoint_outline(write(tmp_path, {**CONFIG, **change}), "f16")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "said"), [(b"[]", "JSON object"), (b"{", "not JSON"), (b"\xff\xfe", "not JSON")])
def test_files_that_are_no_config(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=said):
        checkpoint_outline(tmp_path, "f16")


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        checkpoint_outline(tmp_path, "f16")
    with pytest.raises(UnsupportedError, match="size of a iq1_s file .* f32, f16"):
        checkpoint_outline(write(tmp_path, CONFIG), "iq1_s")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a safetensors file"),
        (struct.pack("<Q", 2**60), "not a safetensors file"),
        (struct.pack("<Q", 10) + b"{", "no JSON object"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "tensor a has no shape"),
        (struct.pack("<Q", 18) + b'{"a": {"shape":1}}', "tensor a has no shape"),
    ],
)
def test_damaged_tensor_tables(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=said):
        checkpoint_outline(write(tmp_path, CONFIG), "f16")


def test_a_checkpoint_is_planned_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ziggurat.runtime.plan import open_planner\n"
        f"with open_planner({str(write(tmp_path, CONFIG))!r}): pass\n"
        "heavy = {'torch', 'transformers', 'llama_cpp', 'ziggurat.converter'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_family_has_a_test() -> None:
    tested = {"gemma3_text" if name == "gemma3" else name for name in families.FAMILIES}
    assert set(FAMILIES) - {"llama"} <= tested
