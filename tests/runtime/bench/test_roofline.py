from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import hollow_models, tiny_models
from helpers.hollow_models import Dims
from ziggurat.runtime.errors import InvalidRequestError, UnsupportedError
from ziggurat.runtime.gguf_file import read_gguf
from ziggurat.runtime.plan.roofline import (
    DEVICES,
    LLAMA_CPP_SHARE,
    Demand,
    Device,
    decode_roof,
    most_streams,
    prompt_flops,
    prompt_seconds,
    stage_bytes,
)
from ziggurat.runtime.plan.shapes import SHAPES, config_demand, file_demand, folder_demand, shape_demand

A40 = DEVICES["a40"]
GIB, MIB, KIB = 2**30, 2**20, 2**10
SLACK = 0.02


@pytest.fixture(scope="module")
def pruned() -> Demand:
    """Llama-3-70B without ten of its blocks, at 4.5 bits per weight."""
    return shape_demand("llama-3-70b", blocks=70, bpw=4.5, type_name="q4_k_m")


def rate(demand: Demand, rows: int, streams: int = 1) -> float:
    assert demand.kv is not None
    return decode_roof(demand, A40, (rows,) * demand.kv.n_layer, streams).tokens_per_second


def test_bytes_of_the_pruned_70b(pruned: Demand) -> None:
    one, mean = (1,) * 70, (1024,) * 70
    assert pruned.resident / GIB == pytest.approx(32.5, rel=SLACK)
    assert pruned.row_bytes(one) == 280 * KIB
    assert pruned.row_bytes(one, "q8_0", "q8_0") == 148.75 * KIB
    assert pruned.row_bytes((10_000,) * 70) / GIB == pytest.approx(2.67, rel=SLACK)
    assert pruned.row_bytes(mean) == 280 * MIB


@pytest.mark.parametrize(
    ("rows", "streams", "tokens_per_second"),
    [
        (0, 1, 20.3),
        (10_000, 1, 18.7),
        (1024, 1, 20.1),
        (50_000, 1, 14.3),
        (10_000, 4, 61),
        (1024, 40, 605),
        (1024, 30, 485),
    ],
)
def test_decode_rates_on_an_a40(pruned: Demand, rows: int, streams: int, tokens_per_second: float) -> None:
    assert rate(pruned, rows, streams) == pytest.approx(tokens_per_second, rel=SLACK)


def test_streams_that_fit_an_a40(pruned: Demand) -> None:
    full, kept = (10_000,) * 70, (1024,) * 70
    assert most_streams(pruned, A40, full) == 4
    assert most_streams(pruned, A40, kept) == 40
    assert most_streams(pruned, A40, kept, staged=pruned.row_bytes(full)) == 30
    assert most_streams(pruned, A40, kept, staged=stage_bytes(pruned, 10_000)) == 39  # one layer and hidden states
    assert most_streams(pruned, A40, (0,) * 70) is None
    assert most_streams(pruned, DEVICES["4090"], kept) == 0


@pytest.mark.parametrize(("share", "streams"), [(1.0, 6), (LLAMA_CPP_SHARE, 8)])
def test_streams_that_98_tokens_per_second_take(pruned: Demand, share: float, streams: int) -> None:
    enough = (count for count in range(1, 40) if share * rate(pruned, 1024, count) >= 98.02)
    assert next(enough) == streams


def test_prefill_of_10k_tokens(pruned: Demand) -> None:
    assert prompt_flops(pruned, 10_000) / 1e15 == pytest.approx(1.31, rel=SLACK)
    assert prompt_seconds(pruned, A40, 10_000) == pytest.approx(8.8, rel=SLACK)


@pytest.mark.parametrize(("depth", "gain"), [(8192, 1.20), (16384, 1.43), (32768, 1.89)])
def test_an_8b_gains_at_most(depth: int, gain: float) -> None:
    demand = shape_demand("llama-3-8b", type_name="q4_k_m")
    assert rate(demand, 1024) / rate(demand, depth) == pytest.approx(gain, rel=SLACK)


def test_the_whole_70b_reaches_its_share_of_an_a40() -> None:
    """12.08 tokens/s with a Q4_K_M file were measured by others."""
    whole = shape_demand("llama-3-70b", type_name="q4_k_m")
    assert whole.resident / 1e9 == pytest.approx(42.5, rel=SLACK)
    assert 12.08 / rate(whole, 512) == pytest.approx(LLAMA_CPP_SHARE, rel=SLACK)


def test_many_streams_are_bound_by_computing() -> None:
    demand = shape_demand("llama-3-8b", bpw=4.5, type_name="q4_k_m")
    few, many = (decode_roof(demand, A40, (0,) * 32, streams) for streams in (1, 1000))
    assert (few.bound, many.bound) == ("memory", "compute")
    assert many.tokens_per_second == pytest.approx(149.7e12 / (2 * (demand.layers + demand.output)))
    free = Device("x", "x", A40.bandwidth, A40.memory, None, "")
    assert decode_roof(demand, free, (0,) * 32, 1000).bound == "memory"
    assert prompt_seconds(demand, free, 1024, n_ubatch=512) == pytest.approx(2 * demand.step / A40.bandwidth)


def test_prompts_behind_others_add_up() -> None:
    demand = shape_demand("llama-3-8b", type_name="q4_0")
    once = 2 * demand.output  # logits of the last token
    parts = prompt_flops(demand, 300) + prompt_flops(demand, 700, 300) - once
    assert prompt_flops(demand, 1000) == pytest.approx(parts, rel=1e-12)


def test_windows_bound_what_is_read(tmp_path: Path) -> None:
    shape = tiny_models.Shape(arch="gemma2", sliding_window=64)
    demand = file_demand(tiny_models.write_model(tmp_path / "m.gguf", shape))
    assert demand.rows(1000) == (64, 1000)
    assert demand.rows(1000, (500, 300)) == (64, 300)
    assert demand.rows(10) == (10, 10)
    each = 2 * 4 * 2 * 16  # per row: K and V of every query head
    assert demand.attention((64, 1000)) == each * 1064
    pairs = sum(min(n, 64) for n in range(1, 101)) + 100 * 101 / 2
    assert prompt_flops(demand, 100) == 200 * demand.layers + 2 * demand.output + each * pairs


def test_a_file_and_its_config_agree(tmp_path: Path) -> None:
    dims = Dims(n_layer=3, type="Q8_0")
    file = file_demand(hollow_models.write_model(tmp_path / "m.gguf", dims))
    config = {
        "model_type": "llama",
        "hidden_size": dims.n_embd,
        "intermediate_size": dims.n_ff,
        "num_hidden_layers": 3,
        "num_attention_heads": dims.n_head,
        "num_key_value_heads": 2,
        "head_dim": dims.head_dim,
        "vocab_size": dims.n_vocab,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = folder_demand(tmp_path, type_name="q8_0")
    assert (said.layers, said.output, said.n_embd) == (file.layers, file.output, file.n_embd)
    assert said.step == pytest.approx(file.step, rel=1e-3)  # vectors
    assert said.resident == pytest.approx(file.resident, rel=1e-3)
    assert file.resident - file.step == dims.n_embd * dims.n_vocab * 34 // 32  # the embedding
    assert said.row_bytes((5,) * 3) == file.row_bytes((5,) * 3)


def test_tied_embeddings_are_read_as_the_output(tmp_path: Path) -> None:
    demand = file_demand(hollow_models.write_model(tmp_path / "m.gguf", Dims(tied=True)))
    assert demand.step == demand.resident
    assert demand.output == 512 * 4096
    config = {**SHAPES["llama-3-8b"], "tie_word_embeddings": True}
    tied = config_demand("x", config, bpw=8, type_name="q8_0")
    assert (tied.output, tied.resident - tied.step) == (4096 * 128256, 32 * 2 * 4096)  # vectors stay out of a step


def test_experts_are_read_as_tokens_choose_them(tmp_path: Path) -> None:
    dims = Dims(n_layer=2, n_expert=8, n_expert_used=2)
    file = read_gguf(hollow_models.write_model(tmp_path / "m.gguf", dims))
    demand = file_demand(file.path)
    experts = sum(tensor.n_bytes for tensor in file.tensors if "_exps" in tensor.name)
    assert demand.experts == experts > 0
    assert demand.weights_read(1) == pytest.approx(demand.step + experts / 4)
    assert demand.weights_read(2) == pytest.approx(demand.step + experts * (1 - 0.75**2))
    assert demand.weights_read(1000) == pytest.approx(demand.step + experts)
    whole = sum(t.n_elements for t in file.tensors if "_exps" in t.name)
    dense = sum(t.n_elements for t in file.tensors if t.name.startswith("blk") and len(t.shape) > 1) - whole
    assert demand.layers == dense + whole // 4


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(InvalidRequestError, match="no shape 'gpt-5'; take one of llama-3-8b"):
        shape_demand("gpt-5", type_name="q4_0")
    with pytest.raises(InvalidRequestError, match="has 80 blocks; 81 of them"):
        shape_demand("llama-3-70b", blocks=81, type_name="q4_0")
    with pytest.raises(UnsupportedError, match="q4_k_x"):
        shape_demand("llama-3-70b", type_name="q4_k_x")
    mixture = {**SHAPES["llama-3-8b"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    with pytest.raises(UnsupportedError, match=r"experts .* give the .gguf"):
        config_demand("x", mixture, type_name="q4_0")
    with pytest.raises(UnsupportedError, match="type None"):
        config_demand("x", {}, type_name="q4_0")
