from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest

from helpers import tiny_models
from helpers.tiny_models import Shape
from ziggurat.runtime import plan
from ziggurat.runtime.bindings import Context, ContextSettings, Model, measure
from ziggurat.runtime.errors import ModelFileError, UnsupportedError
from ziggurat.runtime.gguf_file import read_gguf

SHAPES = {
    "grouped": Shape(head_dim=32, n_head=4, n_head_kv=2, n_layer=3),
    "one KV head": Shape(head_dim=64, n_head=2, n_head_kv=1),
    "head size of its own": Shape(arch="qwen3", head_dim=32, n_head=6, n_head_kv=3, n_layer=2),
    "heads by layer": Shape(arch="deci", head_dim=32, n_layer=3, n_head=(4, 4, 4), n_head_kv=(4, 1, 2)),
    "sliding, five of six": Shape(arch="gemma3", head_dim=32, n_layer=8, sliding_window=300),
    "sliding, every other": Shape(arch="gemma2", head_dim=32, n_layer=5, sliding_window=100),
}


@pytest.fixture(scope="module", params=list(SHAPES))
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "model.gguf"
    return tiny_models.write_model(path, SHAPES[request.param])


@pytest.mark.parametrize(
    ("n_ctx", "n_ubatch", "n_seq", "type_k", "type_v"),
    [
        (100, 512, 1, "f16", "f16"),
        (5000, 64, 1, "bf16", "q8_0"),
        (3000, 512, 3, "q4_0", "q4_0"),
        (2048, 2048, 2, "q8_0", "f16"),
    ],
)
def test_kv_bytes_are_what_the_library_allocates(
    planned: Path, n_ctx: int, n_ubatch: int, n_seq: int, type_k: str, type_v: str
) -> None:
    shape = plan.kv_shape(read_gguf(planned))
    assert shape.exact
    settings = ContextSettings(
        n_ctx=n_ctx, n_ubatch=n_ubatch, n_seq_max=n_seq, type_k=type_k, type_v=type_v, n_threads=1
    )
    with Model(planned) as model, Context(model, settings) as context:
        log = "\n".join(context.log_lines)
        rows = plan.rows_per_layer(shape, n_ctx, n_ubatch=context.n_ubatch)
        assert context.n_ctx_allocated == plan.padded(n_ctx)
        allocated = sum(buffer.context for buffer in measure(context))
    caches = re.findall(r"\(\s*(\d+) cells,\s*(\d+) layers.*K \((\w+)\).*V \((\w+)\)", log)
    cells = sorted(int(count) for count, layers, *_ in caches for _ in range(int(layers)))
    assert cells == sorted(rows)
    assert {(k, v) for _, _, k, v in caches} == {(type_k, type_v)}
    per_layer = plan.kv_bytes_per_layer(
        shape, n_ctx, type_k=type_k, type_v=type_v, n_seq=n_seq, n_ubatch=min(n_ubatch, n_seq * plan.padded(n_ctx))
    )
    assert sum(per_layer) == allocated
    assert len(per_layer) == shape.n_layer


@pytest.mark.parametrize("name", ["grouped", "heads by layer", "sliding, every other"])
def test_kv_bytes_without_flash_attention(name: str, tmp_path: Path) -> None:
    path = tiny_models.write_model(tmp_path / "m.gguf", SHAPES[name])
    settings = ContextSettings(n_ctx=700, n_seq_max=2, flash_attention="off", n_threads=1)
    with Model(path) as model, Context(model, settings) as context:
        allocated = sum(buffer.context for buffer in measure(context))
    assert plan.kv_bytes(plan.kv_shape(read_gguf(path)), 700, n_seq=2, flash_attention=False) == allocated


def test_known_models() -> None:
    llama_70b = plan.KVShape((64,) * 70, (8,) * 70, 128, 128, (0,) * 70, 8192)
    assert sum(plan.bytes_per_token(llama_70b)) == 280 * 1024
    assert sum(plan.bytes_per_token(llama_70b, "q8_0", "q8_0")) == 148.75 * 1024
    assert plan.kv_bytes(llama_70b, 1024) == 280 * 2**20


def test_a_cache_type_that_does_not_fit_the_heads_is_refused_by_name() -> None:
    shape = plan.KVShape((4,), (4,), 16, 16, (0,), 512)
    with pytest.raises(UnsupportedError, match=r"--cache-type-k q8_0 .* multiple of 32 .* have 16"):
        plan.check_cache_types(shape, "q8_0", "f16")
    with pytest.raises(UnsupportedError, match="--cache-type-v q4_0"):
        plan.check_cache_types(shape, "f16", "q4_0")
    plan.check_cache_types(shape, "bf16", "f16")
    with pytest.raises(UnsupportedError, match="a row here has 24"):
        plan.row_bytes(24, "q8_0")


def _metadata(path: Path, **values: int) -> Path:
    writer = gguf.GGUFWriter(path, "mamba")
    for key, value in values.items():
        writer.add_uint32(f"mamba.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_models_without_attention_or_layers(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no attention heads"):
        plan.kv_shape(read_gguf(_metadata(tmp_path / "a.gguf", block_count=2)))
    with pytest.raises(ModelFileError, match="block count"):
        plan.kv_shape(read_gguf(_metadata(tmp_path / "b.gguf")))


def test_rows_held_never_exceed_what_a_layer_has() -> None:
    assert plan.rows_held(plan.KVShape((1, 1), (1, 1), 8, 8, (0, 100), 512), 700, (1024, 256)) == (700, 256)
