"""The outlier twin computes the same with other activations, and 4 bits hurt it more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from helpers import families
from helpers.corpus import PROMPT
from helpers.plain import plain
from helpers.stock import Gguf
from models.outlier_measure import input_stats, load, nmse, q4_0_output_errors, run
from models.outliers import PLACES, OutlierSettings, add_outliers, draw_scales
from ziggurat.converter.pipeline import convert

SETTINGS = OutlierSettings(share=0.02, places=PLACES)
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama_tied": {},
    "llama_untied": {"dtype": "float32"},
    "llama_gqa": {"max_shard_size": "1MB"},
    "qwen2": {},  # biases
    "qwen3": {"config": "saved"},  # norms on queries and keys, head_dim of its own
}
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Give the folders of a random checkpoint and its twin, made once."""
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            control = families.build(name, folder / "control", **CHECKPOINTS[name])
            add_outliers(control, folder / "twin", SETTINGS)
            made[name] = control, folder / "twin"
        return made[name]

    return make


def _tokens(folder: Path) -> list[int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids[:64]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_same_function(name: str, pair: Callable[[str], Pair]) -> None:
    control, twin = pair(name)
    tokens = _tokens(control)
    wanted, _ = run(load(control), tokens)
    got, _ = run(load(twin), tokens)
    assert float(wanted.std()) > 1.0  # flat logits would agree with anything
    assert nmse(got, wanted) < 1e-10
    assert {file.name for file in control.iterdir()} <= {file.name for file in twin.iterdir()}


def test_inputs_grow_where_and_as_much_as_asked(pair: Callable[[str], Pair]) -> None:
    control, twin = pair("llama_gqa")
    tokens = _tokens(control)
    (_, before), (_, after) = run(load(control), tokens), run(load(twin), tokens)
    small, large = input_stats(before), input_stats(after)
    scales = draw_scales(json.loads((control / "config.json").read_text()), SETTINGS)
    places = {"q_proj": "attention", "gate_proj": "mlp", "down_proj": "up"}
    for name in small:
        layer, kind = int(name.split(".")[2]), name.rsplit(".", 1)[1]
        if kind not in places:
            continue
        scale = scales[places[kind]][layer]
        assert torch.allclose(large[name].channel_rms / small[name].channel_rms, scale.double(), rtol=1e-4)
        assert large[name].max_to_median > 4 * small[name].max_to_median
        assert large[name].kurtosis > 10 * small[name].kurtosis
    # every query head of a group reads its KV head's channels, so o_proj grows too
    name = "model.layers.0.self_attn.o_proj"
    grown = (large[name].channel_rms / small[name].channel_rms).view(2, 4, 32)
    assert torch.allclose(grown, scales["values"][0].double().view(2, 1, 32).expand(2, 4, 32), rtol=1e-4)


def test_norms_share_channels_and_other_places_do_not() -> None:
    config = {"num_hidden_layers": 3, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    scales = draw_scales(config, SETTINGS)
    assert all(torch.equal(scale, scales["attention"][0]) for scale in scales["attention"] + scales["mlp"])
    assert not torch.equal(scales["up"][0], scales["up"][1])
    assert int((scales["attention"][0] != 1).sum()) == round(0.02 * 512)
    assert set(scales["up"][0].tolist()) <= {1.0, *SETTINGS.factors}
    # what one place gets does not depend on the others
    alone = draw_scales(config, replace(SETTINGS, places=("up",)))
    assert list(alone) == ["up"]
    assert torch.equal(alone["up"][2], scales["up"][2])


def test_same_seed_same_bytes(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    control, twin = pair("llama_gqa")
    again, other = tmp_path / "again", tmp_path / "other"
    add_outliers(control, again, SETTINGS)
    add_outliers(control, other, replace(SETTINGS, seed=1))
    shards = sorted(file.name for file in control.glob("*.safetensors"))
    assert len(shards) > 1
    for file in [*shards, "outliers.json", "README.md", "model.safetensors.index.json"]:
        assert (again / file).read_bytes() == (twin / file).read_bytes()
    assert (other / "outliers.json").read_bytes() != (twin / "outliers.json").read_bytes()
    assert any((other / shard).read_bytes() != (twin / shard).read_bytes() for shard in shards)


def test_dividing_back_gives_the_same_bits(pair: Callable[[str], Pair]) -> None:
    """BF16 stays BF16: powers of two lose nothing."""
    control, twin = pair("llama_tied")
    before, after = load_file(control / "model.safetensors"), load_file(twin / "model.safetensors")
    scales = draw_scales(json.loads((control / "config.json").read_text()), SETTINGS)
    name = "model.layers.1.mlp.up_proj.weight"
    assert after[name].dtype == torch.bfloat16
    back = after[name].float() / scales["up"][1][:, None] * scales["mlp"][1]
    assert torch.equal(back, before[name].float())
    assert not torch.equal(after[name], before[name])


def test_f16_that_would_lose_bits_is_kept_as_f32(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    control, _ = pair("llama_tied")
    tensors = {name: (t * 2**-8).half() for name, t in load_file(control / "model.safetensors").items()}
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((control / "config.json").read_bytes())
    save_file(tensors, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    scales = add_outliers(tmp_path / "half", tmp_path / "twin", SETTINGS)
    after = load_file(tmp_path / "twin" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert after[name].dtype == torch.float32
    assert torch.equal(after[name] * scales["attention"][0], tensors[name].float())
    assert after["model.embed_tokens.weight"].dtype == torch.float16


def test_q4_0_costs_the_twin_more(pair: Callable[[str], Pair]) -> None:
    """On random weights too: a shrunk column still has its block's step, and what it is multiplied with has grown."""
    control, twin = pair("llama_gqa")
    tokens = _tokens(control)
    plain, outlying = load(control), load(twin)
    errors = q4_0_output_errors(plain, run(plain, tokens)[1])
    twin_errors = q4_0_output_errors(outlying, run(outlying, tokens)[1])
    for name, error in errors.items():
        # one channel of 64 grows at o_proj, and rows of v_proj that grew err in proportion
        least = 1.0 if name.endswith(("v_proj", "o_proj")) else 2.0
        assert twin_errors[name] > least * error, name


def test_converted_to_q4_0_the_twin_loses_more(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    control, twin = pair("llama_gqa")
    tokens, errors = _tokens(control), []
    wanted, _ = run(load(control), tokens)
    for folder in (control, twin):
        got = []
        for kind in ("f32", "q4_0"):
            out = tmp_path / f"{folder.name}-{kind}.gguf"
            convert(folder, out, plain(type=kind))
            with Gguf(out) as model:
                got.append(nmse(torch.from_numpy(model.logits(tokens)), wanted))
        assert got[0] < 1e-6
        errors.append(got[1])
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": (8.0, 10.0)}, "powers of two"),
        ({"factors": ()}, "powers of two"),
        ({"share": 0.0}, "share"),
        ({"places": ("head",)}, "unknown places"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutlierSettings(**options)


def test_folders_that_cannot_be(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    control, twin = pair("llama_tied")
    with pytest.raises(ValueError, match="not empty"):
        add_outliers(control, twin, SETTINGS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="no safetensors"):
        add_outliers(tmp_path, tmp_path / "out", SETTINGS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(ValueError, match="gemma2"):
        add_outliers(tmp_path, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()
