"""A converted model computes what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from helpers.corpus import PROMPT
from helpers.families import FAMILIES, reference
from helpers.stock import Gguf, nmse

TOKENS = 56
CAUSAL = [name for name, family in FAMILIES.items() if family.causal]
# How far a router's choice must be from a tie: rounding moves router logits (of size 6 here) by less than this.
MARGIN = {"f32": 1e-3, "f16": 3e-2}
LIMIT = {"f32": 1e-6, "f16": 1e-4}


def _error(folder: Path, converted: Path, type_name: str) -> float:
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids[:TOKENS]
    wanted = reference(folder, tokens)
    clear = wanted.clear(MARGIN[type_name])
    assert clear >= TOKENS // 2, "a tie in the routing comes too early for this test to say anything: change the seed"
    with Gguf(converted) as model:
        got = model.logits(tokens)
    assert float(wanted.logits.std()) > 1.0  # flat logits would agree with anything
    return nmse(got[:clear], wanted.logits[:clear].numpy())


@pytest.mark.parametrize("type_name", ["f32", "f16"])
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_those_of_transformers(
    name: str, type_name: str, checkpoint: Callable[..., Path], gguf: Callable[[Path, str], Path]
) -> None:
    folder = checkpoint(name)
    assert _error(folder, gguf(folder, type_name), type_name) < LIMIT[type_name]


@pytest.mark.parametrize("name", CAUSAL)
def test_config_as_transformers_5_saves_it(
    name: str, checkpoint: Callable[..., Path], gguf: Callable[[Path, str], Path]
) -> None:
    folder = checkpoint(name, config="saved")
    assert _error(folder, gguf(folder, "f32"), "f32") < LIMIT["f32"]


def test_float32_checkpoint(checkpoint: Callable[..., Path], gguf: Callable[[Path, str], Path]) -> None:
    folder = checkpoint("llama_gqa", dtype="float32")
    assert _error(folder, gguf(folder, "f32"), "f32") < LIMIT["f32"]


def test_sharded_checkpoint_gives_the_same_file(
    checkpoint: Callable[..., Path], gguf: Callable[[Path, str], Path]
) -> None:
    whole, sharded = checkpoint("qwen2"), checkpoint("qwen2", max_shard_size="1MB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert gguf(sharded, "bf16").read_bytes() == gguf(whole, "bf16").read_bytes()
