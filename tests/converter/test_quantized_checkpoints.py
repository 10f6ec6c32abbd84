"""Checkpoints that are quantized already: turned back into the floats they stand for, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ziggurat.converter.cli import convert as command
from ziggurat.converter.pipeline import ConvertSettings, convert

Tensors = dict[str, torch.Tensor]
Float = npt.NDArray[np.float32]
# A matrix as its method stores it, endings to tensors, and the floats it stands for, computed here on their own.
Packed = tuple[Tensors, Float]

GROUP = 64


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llama_gqa", dtype="float32"), tmp_path / "quantized" / "model"))


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def quantize(folder: Path, pack: Callable[[tuple[int, ...], np.random.Generator], Packed], config: Any) -> Path:
    """Quantize the linear layers of a checkpoint; give a checkpoint in floats that stands for the same."""
    rng = np.random.default_rng(7)
    twin = Path(shutil.copytree(folder, folder.parent.parent / "floats" / "model"))
    floats = load_file(folder / "model.safetensors")
    stored: Tensors = {}
    for name, weight in floats.items():
        if not is_linear(name):
            stored[name] = weight
            continue
        parts, floats[name] = (packed := pack(tuple(weight.shape), rng))[0], torch.from_numpy(packed[1])
        assert parts and floats[name].shape == weight.shape
        stored.update({name.removesuffix("weight") + ending: tensor for ending, tensor in parts.items()})
    save_file(floats, twin / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, config)
    return twin


def configure(folder: Path, quantization: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))


def pack_bits(codes: npt.NDArray[Any], bits: int, axis: int) -> torch.Tensor:
    """Put 32 / bits neighbours along an axis into one int32, the first in the lowest bits."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    per_word = 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_word)])
    codes = codes.reshape(*codes.shape[:-1], -1, per_word)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    words = np.bitwise_or.reduce(codes << shifts, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def scales_like(shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float16]:
    return rng.uniform(0.001, 0.02, shape).astype(np.float16)


def same(folder: Path, twin: Path) -> None:
    """Both give the same file: names, shapes, permutations and every bit of every tensor."""
    out, wanted = folder.parent / "out.gguf", folder.parent / "wanted.gguf"
    convert(folder, out, ConvertSettings(type="f32"))
    convert(twin, wanted, ConvertSettings(type="f32"))
    assert out.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize(
    ("bits", "form", "ordered"),
    [(4, None, True), (4, "gptq", False), (4, "gptq_v2", False), (2, "gptq_v2", True), (8, "gptq", False)],
)
def test_gptq(folder: Path, bits: int, form: str | None, ordered: bool) -> None:
    """W[o, i] = scale[g(i), o] (q[i, o] - zero[g(i), o]); the first format stores its zero points less one."""

    def pack(shape: tuple[int, ...], rng: np.random.Generator) -> Packed:
        rows, columns = shape
        groups = np.arange(columns) // GROUP
        if not ordered:  # as with desc_act: every column names its group
            rng.shuffle(groups)
        codes = rng.integers(0, 2**bits, (columns, rows))
        zeros = rng.integers(1, 2**bits, (columns // GROUP, rows))
        scales = scales_like(zeros.shape, rng)
        floats = scales[groups].astype(np.float32) * (codes - zeros[groups]).astype(np.float32)
        parts = {
            "qweight": pack_bits(codes, bits, 0),
            "qzeros": pack_bits(zeros - (form != "gptq_v2"), bits, 1),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
        return parts, np.ascontiguousarray(floats.T)

    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": not ordered, "sym": False}
    if form is not None:
        config["checkpoint_format"] = form
    same(folder, quantize(folder, pack, config))


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_compressed_tensors_packed_integers(folder: Path, bits: int, symmetric: bool) -> None:
    def pack(shape: tuple[int, ...], rng: np.random.Generator) -> Packed:
        rows, columns = shape
        codes = rng.integers(0, 2**bits, shape)
        scales = scales_like((rows, columns // GROUP), rng)
        zeros = np.full(scales.shape, 2 ** (bits - 1))
        parts = {
            "weight_packed": pack_bits(codes, bits, 1),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor(shape),
        }
        if not symmetric:
            zeros = rng.integers(0, 2**bits, scales.shape)
            parts["weight_zero_point"] = pack_bits(zeros, bits, 0)
        centred = (codes - np.repeat(zeros, GROUP, 1)).astype(np.float32)
        return parts, centred * np.repeat(scales, GROUP, 1).astype(np.float32)

    weights = {"type": "int", "num_bits": bits, "group_size": GROUP, "strategy": "group", "symmetric": symmetric}
    same(folder, quantize(folder, pack, compressed("pack-quantized", **weights)))


def to_fp8(values: Float) -> tuple[torch.Tensor, Float]:
    stored = torch.from_numpy(values).to(torch.float8_e4m3fn)
    return stored, stored.float().numpy()


def test_compressed_tensors_fp8_by_channel(folder: Path) -> None:
    def pack(shape: tuple[int, ...], rng: np.random.Generator) -> Packed:
        stored, values = to_fp8(rng.normal(0, 60, shape).astype(np.float32))
        scale = torch.from_numpy(rng.uniform(0.001, 0.02, (shape[0], 1))).to(torch.bfloat16)
        return {"weight": stored, "weight_scale": scale}, values * scale.float().numpy()

    weights = {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False}
    same(folder, quantize(folder, pack, compressed("float-quantized", **weights)))


def test_compressed_tensors_int8_by_channel(folder: Path) -> None:
    def pack(shape: tuple[int, ...], rng: np.random.Generator) -> Packed:
        codes = rng.integers(-127, 128, shape).astype(np.int8)
        scale = torch.from_numpy(rng.uniform(0.001, 0.02, (shape[0], 1)).astype(np.float32))
        return {"weight": torch.from_numpy(codes), "weight_scale": scale}, codes.astype(np.float32) * scale.numpy()

    weights = {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}
    same(folder, quantize(folder, pack, compressed("int-quantized", **weights)))


@pytest.mark.parametrize("block", [(128, 128), (96, 80)], ids=["even", "uneven"])
def test_fp8_by_block(folder: Path, block: tuple[int, int]) -> None:
    def pack(shape: tuple[int, ...], rng: np.random.Generator) -> Packed:
        stored, values = to_fp8(rng.normal(0, 60, shape).astype(np.float32))
        blocks = tuple(-(-n // size) for n, size in zip(shape, block, strict=True))
        scale = rng.uniform(0.001, 0.02, blocks).astype(np.float32)
        full = np.kron(scale, np.ones(block, np.float32))[: shape[0], : shape[1]]
        return {"weight": stored, "weight_scale_inv": torch.from_numpy(scale)}, values * full

    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    same(folder, quantize(folder, pack, config))


def test_fp8_with_one_scale(folder: Path) -> None:
    def pack(shape: tuple[int, ...], rng: np.random.Generator) -> Packed:
        stored, values = to_fp8(rng.normal(0, 60, shape).astype(np.float32))
        return {"weight": stored, "weight_scale_inv": torch.tensor(0.0123)}, values * np.float32(0.0123)

    same(folder, quantize(folder, pack, {"quant_method": "fp8", "activation_scheme": "static"}))


def refused(folder: Path, *words: str) -> None:
    out = folder.parent / "out.gguf"
    result = CliRunner().invoke(command, [str(folder), str(out)])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("convert: error: ")
    for word in words:
        assert word in line
    assert not list(folder.parent.glob("*out.gguf*"))


INT4 = {"type": "int", "num_bits": 4, "group_size": 128, "strategy": "group"}
TWO = {"a": {"weights": INT4}, "b": {"weights": {**INT4, "num_bits": 8}}}


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, ["'awq'"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["'bitsandbytes'"]),
        ({"quant_method": "aqlm"}, ["'aqlm'"]),
        ({"quant_method": "gptq", "bits": 3}, ["'gptq' at 3 bits"]),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ["'gptq' in the format 'marlin'"]),
        ({"bits": 4}, ["None"]),
        (compressed("marlin-24", **INT4), ["'compressed-tensors'", "'marlin-24'", "pack-quantized"]),
        ({**compressed("pack-quantized"), "config_groups": TWO}, ["'compressed-tensors'", "2 groups", "a, b"]),
        ({**compressed("pack-quantized"), "config_groups": {}}, ["without config_groups"]),
        ({**compressed("pack-quantized"), "config_groups": {"a": {}}}, ["without weights"]),
        (compressed("pack-quantized", **{**INT4, "strategy": "channel"}), ["strategy 'channel'"]),
        (compressed("pack-quantized", **{**INT4, "type": "float"}), ["'float' values of 4 bits"]),
        (compressed("pack-quantized", **{**INT4, "actorder": "group"}), ["actorder"]),
        (compressed("float-quantized", type="float", num_bits=8, strategy="tensor"), ["strategy 'tensor'"]),
        (compressed("int-quantized", type="int", strategy="channel", group_size=64), ["groups of 64 columns"]),
    ],
    ids=lambda value: None,
)
def test_methods_that_cannot_be_undone(folder: Path, quantization: Any, words: list[str]) -> None:
    configure(folder, quantization)
    refused(folder, "is quantized with", *words, "convert the original checkpoint")


@pytest.mark.parametrize("ending", ["qweight", "weight_packed", "weight_scale", "weight_scale_inv"])
def test_quantized_tensors_that_the_configuration_does_not_tell_of(folder: Path, ending: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{ending}"] = torch.zeros(4, 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, f"model.layers.0.mlp.up_proj.{ending}", "no quantization_config")


@pytest.mark.parametrize("missing", ["g_idx", "scales"])
def test_a_part_of_a_matrix_is_missing(folder: Path, missing: str) -> None:
    def pack(shape: tuple[int, ...], rng: np.random.Generator) -> Packed:
        rows, columns = shape
        parts = {
            "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            "qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
            "scales": torch.ones(1, rows, dtype=torch.float16),
            "g_idx": torch.zeros(columns, dtype=torch.int32),
        }
        del parts[missing]
        return parts, np.zeros(shape, np.float32)

    quantize(folder, pack, {"quant_method": "gptq", "bits": 4})
    refused(folder, "LlamaForCausalLM", f"down_proj.{missing}")
