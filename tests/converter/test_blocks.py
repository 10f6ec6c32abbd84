"""Decoder blocks one at a time give the hidden states that transformers gives with the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.deep import build_deep, hidden_states, load, random_tokens
from helpers.families import FAMILIES
from helpers.stock import nmse
from ziggurat.converter import families
from ziggurat.converter.blocks import Blocks
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.errors import CheckpointError, ConvertError, UnsupportedModelError

CAUSAL = [name for name, family in FAMILIES.items() if family.causal]


@pytest.mark.parametrize("name", CAUSAL)
def test_hidden_states_and_logits_are_those_of_transformers(name: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(name)
    ids = random_tokens(2, 40).ids  # longer than the sliding windows
    wanted, logits = hidden_states(load(folder), ids)
    blocks = Blocks(open_checkpoint(folder))
    hidden = blocks.embed(torch.from_numpy(ids).long())
    assert torch.equal(hidden, wanted[0])
    for index in range(blocks.n_layer):
        hidden = blocks.block(index)(hidden)
        assert nmse(hidden.numpy(), wanted[index + 1].numpy()) < 1e-10
    assert blocks.n_layer == len(wanted) - 1
    got = blocks.head(hidden)
    assert got.shape == logits.shape == (2, 40, blocks.n_vocab)
    assert nmse(got.numpy(), logits.numpy()) < 1e-9


def test_every_tested_architecture_is_in_the_table() -> None:
    assert {FAMILIES[name].model.__name__ for name in CAUSAL} == set(families.FAMILIES)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_blocks_that_differ_by_index(name: str, tmp_path: Path) -> None:
    """Sliding windows in turns: a block computed as another one's neighbour would show."""
    folder = build_deep(tmp_path / "model", 7, name)
    ids = random_tokens(1, 48).ids
    wanted, _ = hidden_states(load(folder), ids)
    blocks = Blocks(open_checkpoint(folder))
    for index in range(7):
        assert nmse(blocks.block(index)(wanted[index]).numpy(), wanted[index + 1].numpy()) < 1e-10
    local, whole = blocks.block(0), blocks.block(5 if name == "gemma3" else 1)
    whole.layer.load_state_dict(local.layer.state_dict())  # the same weights, another pattern
    assert nmse(whole(wanted[3]).numpy(), local(wanted[3]).numpy()) > 1e-6


def test_batches_of_several_shapes(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("mistral")
    model, blocks = load(folder), Blocks(open_checkpoint(folder))
    block = blocks.block(0)
    for sequences, positions in ((2, 16), (1, 16), (3, 7), (2, 16)):
        ids = random_tokens(sequences, positions).ids
        wanted, _ = hidden_states(model, ids)
        got = block(blocks.embed(torch.from_numpy(ids).long()))
        assert nmse(got.numpy(), wanted[1].numpy()) < 1e-10


def test_one_block_in_memory(checkpoint: Callable[..., Path]) -> None:
    """The model has no weights of its own, and a block that is dropped takes its weights with it."""
    blocks = Blocks(open_checkpoint(checkpoint("llama_gqa")))
    matrices = [p for p in blocks._model.parameters() if p.dim() > 1]
    assert all(p.is_meta for p in matrices)
    first = blocks.block(0)
    assert all(not p.is_meta for p in first.layer.parameters())
    assert all(p.is_meta for p in blocks._layers[0].parameters() if p.dim() > 1)


def test_bfloat16_computation(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("gemma3")
    ids = random_tokens(1, 24).ids
    wanted, _ = hidden_states(load(folder), ids)
    blocks = Blocks(open_checkpoint(folder), dtype="bfloat16")
    hidden = blocks.embed(torch.from_numpy(ids).long())
    for index in range(blocks.n_layer):
        hidden = blocks.block(index)(hidden)
    assert hidden.dtype == torch.bfloat16
    assert 1e-8 < nmse(hidden.float().numpy(), wanted[-1].numpy()) < 1e-2


def _changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of a checkpoint with other tensors."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_checkpoint_of_a_base_model(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """GPT-2's own repository has no `transformer.` before its names, and keeps masks that are computed today."""

    def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        return {name.removeprefix("transformer."): value for name, value in tensors.items()} | mask

    source = checkpoint("gpt2")
    tokens = torch.from_numpy(random_tokens(1, 12).ids).long()
    outputs = []
    for folder in (source, _changed(source, tmp_path / "bare", bare)):
        blocks = Blocks(open_checkpoint(folder))
        outputs.append(blocks.block(0)(blocks.embed(tokens)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("name", "tensor", "value", "message"),
    [
        ("llama_gqa", "model.layers.0.mlp.up_proj.weight", None, "no tensor model.layers.0.mlp.up_proj.weight"),
        ("llama_gqa", "model.layers.0.mlp.up_proj.weight", (256, 512), r"has the shape \[256, 512\]"),
        ("llama_gqa", "model.layers.0.self_attn.q_proj.bias", (256,), "has no place in transformers'"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight", None, "holds 3 experts"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", None, "block_sparse_moe.gate.weight"),
        ("gpt2", "transformer.wpe.weight", None, "no tensor transformer.wpe.weight"),
        ("gpt2", "transformer.wte.weight", None, "no tensor transformer.wte.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, tensor: str, value: tuple[int, ...] | None, message: str
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if value is None:
            del tensors[tensor]
            return tensors
        return {**tensors, tensor: torch.zeros(value)}

    folder = _changed(checkpoint(name), tmp_path / "changed", change)
    with pytest.raises(CheckpointError, match=message) as refusal:
        Blocks(open_checkpoint(folder)).block(0)
    assert "\n" not in str(refusal.value)


def _with_config(source: Path, target: Path, **entries: object) -> Path:
    folder = _changed(source, target, lambda tensors: tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    return folder


def test_other_architectures_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = _with_config(checkpoint("llama_gqa"), tmp_path / "other", architectures=["FalconForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="FalconForCausalLM.*--no-awq --no-imatrix.*table of families"):
        Blocks(open_checkpoint(folder))


def test_model_type_of_another_family_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = _with_config(checkpoint("llama_gqa"), tmp_path / "other", architectures=["MistralForCausalLM"])
    with pytest.raises(CheckpointError, match="names MistralForCausalLM, its model_type belongs to LlamaForCausalLM"):
        Blocks(open_checkpoint(folder))


def test_quantized_checkpoints_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = _with_config(checkpoint("llama_gqa"), tmp_path / "fp8", quantization_config=quantization)
    with pytest.raises(UnsupportedModelError, match="cannot be calibrated: it is quantized"):
        Blocks(open_checkpoint(folder))


def test_ids_beyond_the_embedding_are_refused(checkpoint: Callable[..., Path]) -> None:
    blocks = Blocks(open_checkpoint(checkpoint("llama_gqa")))
    with pytest.raises(CheckpointError, match=f"the id {blocks.n_vocab}, the embedding has {blocks.n_vocab} rows"):
        blocks.embed(torch.tensor([[1, blocks.n_vocab]]))


@pytest.mark.parametrize("device", ["tpu", "mps:0", "cuda"])
def test_devices_that_are_not_there(checkpoint: Callable[..., Path], device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConvertError, match="device"):
        Blocks(open_checkpoint(checkpoint("llama_gqa")), device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3")
    ids = random_tokens(2, 24).ids
    wanted, _ = hidden_states(load(folder), ids)
    blocks = Blocks(open_checkpoint(folder), device="cuda")
    hidden = blocks.block(0)(blocks.embed(torch.from_numpy(ids).long()))
    assert nmse(hidden.cpu().numpy(), wanted[1].numpy()) < 1e-6
