"""A model with scales folded in computes what it computed before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from helpers.corpus import PROMPT
from helpers.families import FAMILIES, reference
from helpers.stock import Gguf, nmse
from ziggurat.converter import fold, quantize, scale_groups, upstream
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.families import FAMILIES as STREAMED
from ziggurat.converter.write import GGUFFile

TOKENS = 40
CAUSAL = [name for name, family in FAMILIES.items() if family.causal]


def random_scales(plan: upstream.Plan, groups: tuple[scale_groups.Group, ...], seed: int = 0) -> fold.Scales:
    """For every group of every block, each channel's drawn between 1/20 and 20."""
    rng, shapes, model = np.random.default_rng(seed), {t.name: t.shape for t in plan.tensors}, plan.model_shape()

    def channels(place: int, group: scale_groups.Group) -> tuple[int, ...]:
        if group.values:
            return (model.n_head_kv * model.n_embd_head_v,)
        shape = shapes[f"blk.{place}.{group.readers[-1]}.weight"]
        return (*shape[:-2], shape[-1]) if group.per_expert else shape[-1:]

    return {
        place: {group.writer: np.exp(rng.uniform(-3, 3, channels(place, group))).astype(np.float32) for group in groups}
        for place in range(model.n_layer)
    }


def write(plan: upstream.Plan, path: Path) -> Path:
    types = [quantize.F32] * len(plan.tensors)
    layout = [(t.name, t.shape, type_id) for t, type_id in zip(plan.tensors, types, strict=True)]
    with GGUFFile(path, plan.arch, dict(plan.metadata), layout) as file:
        file.write_header()
        for slab in quantize.stream(plan.tensors, types, threads=1):
            file.write(slab.data)
        file.commit()
    return path


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_stay(
    name: str, checkpoint: Callable[..., Path], gguf: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    folder = checkpoint(name)
    opened = open_checkpoint(folder)
    plan, groups = upstream.plan(opened, "f32"), scale_groups.find(opened)
    scales = random_scales(plan, groups)
    folded = fold.fold(plan, groups, scales)
    changed = [t.name for t, old in zip(folded.tensors, plan.tensors, strict=True) if t is not old]
    touched = {part for group in groups for part in (group.writer, *group.readers)}
    assert {n.split(".")[2] for n in changed} == touched and not [n for n in changed if not n.startswith("blk.")]
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids[:TOKENS]
    clear = reference(folder, tokens).clear(1e-3)
    assert clear >= TOKENS // 2
    with Gguf(gguf(folder, "f32")) as before, Gguf(write(folded, tmp_path / "scaled.gguf")) as after:
        assert nmse(after.logits(tokens)[:clear], before.logits(tokens)[:clear]) < 1e-6


def test_every_family_has_groups() -> None:
    assert scale_groups.GROUPS.keys() == STREAMED.keys()


@pytest.mark.parametrize("name", ["qwen2", "phi3", "qwen3_moe"])
def test_a_forgotten_reader_shows(
    name: str, checkpoint: Callable[..., Path], gguf: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    folder = checkpoint(name)
    opened = open_checkpoint(folder)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids[:8]
    with Gguf(gguf(folder, "f32")) as model:
        wanted = model.logits(tokens)
    for group in scale_groups.find(opened):
        for reader in group.readers:
            plan = upstream.plan(opened, "f32")
            scales = random_scales(plan, (group,))
            less = dataclasses.replace(group, readers=tuple(r for r in group.readers if r != reader))
            with Gguf(write(fold.fold(plan, (less,), scales), tmp_path / "wrong.gguf")) as model:
                assert nmse(model.logits(tokens), wanted) > 1e-4, (group.writer, reader)
            (tmp_path / "wrong.gguf").unlink()


def test_scaled_matrices_are_not_rounded(checkpoint: Callable[..., Path]) -> None:
    """A quantized file is made of the exact products, though types are chosen with the plan of before."""
    opened = open_checkpoint(checkpoint("llama_gqa"))
    plan, groups = upstream.plan(opened, "bf16"), scale_groups.find(opened)
    folded = fold.fold(plan, groups, random_scales(plan, groups))
    name = "blk.0.ffn_down.weight"
    tensor = next(t for t in folded.tensors if t.name == name)
    old = next(t for t in plan.tensors if t.name == name)
    s = fold.column_scales(plan, groups, random_scales(plan, groups))[name]
    slabs = list(quantize.stream([tensor], [quantize.F32], threads=1))
    got = np.concatenate([slab.data for slab in slabs]).view(np.float32).reshape(tensor.shape)
    fresh = next(t for t in upstream.plan(opened, "bf16").tensors if t.name == name)
    assert np.array_equal(got, fresh.load() * s)
    assert dataclasses.replace(tensor, load=old.load, type_id=old.type_id) == old


def test_scales_go_to_every_query_head() -> None:
    s = np.arange(1, 9, dtype=np.float32)  # two KV heads of four channels, each with three query heads
    got = fold.spread(s, 24, 4).reshape(6, 4)
    assert np.array_equal(got, np.stack([s[:4]] * 3 + [s[4:]] * 3))


def test_importance_of_scaled_activations() -> None:
    importance = {"a": np.array([[4.0, 9.0]], np.float32), "b": np.ones((1, 2), np.float32)}
    got = fold.scaled_importance(importance, {"a": np.array([2.0, 3.0], np.float32)})
    assert np.array_equal(got["a"], [[1, 1]]) and got["b"] is importance["b"]
    experts = fold.scaled_importance({"e": np.ones((3, 2), np.float32)}, {"e": np.full((3, 2), 2, np.float32)})
    assert np.array_equal(experts["e"], np.full((3, 2), 0.25))
