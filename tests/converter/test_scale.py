"""Scales are found where they help on activations that took no part in finding them, and nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.deep import random_tokens
from helpers.families import FAMILIES
from models.outliers import OutlierSettings, add_outliers
from ziggurat.converter import fold, ggml, linears, quantize, scale, scale_groups, upstream
from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings
from ziggurat.converter.checkpoint import Checkpoint, open_checkpoint
from ziggurat.converter.errors import CalibrationError
from ziggurat.converter.matrices import matrices
from ziggurat.converter.tune import Captured, TunedModel, tune

Q4_K = 12
QUICK = scale.ScaleSettings(grid=4, values=1 << 14, final_values=1 << 16)
CAUSAL = [name for name, family in FAMILIES.items() if family.causal]
Found = dict[str, np.ndarray[Any, Any]]


class Keep:
    """A step that keeps what it gets."""

    name, identity, grams = "keep", {}, False

    def __init__(self) -> None:
        self.captured: list[Captured] = []

    def __call__(self, captured: Captured) -> Found:
        self.captured.append(captured)
        return {}


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint, its plan, and what was captured of its blocks."""

    checkpoint: Checkpoint
    plan: upstream.Plan
    captured: list[Captured]

    def search(self, settings: scale.ScaleSettings = QUICK, **options: Any) -> scale.ScaleSearch:
        types = {t.name: Q4_K for t in self.plan.tensors if t.type_id == quantize.BF16 and t.name.startswith("blk.")}
        groups = scale_groups.find(self.checkpoint)
        return scale.ScaleSearch(groups, types, self.plan.model_shape(), settings=settings, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> Callable[[str], Model]:
    """Give a family's model, or with "outliers" one that has them, made once."""
    made: dict[str, Model] = {}

    def make(name: str) -> Model:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = checkpoint("llama_gqa" if name == "outliers" else name)
            if name == "outliers":
                add_outliers(source, folder / "twin", OutlierSettings(share=0.03))
                source = folder / "twin"
            opened = open_checkpoint(source)
            plan, keep = upstream.plan(opened, "bf16"), Keep()
            tuned = TunedModel(Blocks(opened), linears.tensor_names(opened, plan))
            tune(tuned, random_tokens(10, 48), [keep], CalibrateSettings(work=folder / "work", threads=1))
            made[name] = Model(opened, plan, keep.captured)
        return made[name]

    return make


def in_eight_bits(scales: torch.Tensor) -> Callable[..., tuple[torch.Tensor]]:
    """A hook that rounds scaled inputs as kernels of the K types do: integers up to 127 times one number per 256."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        blocks = (args[0] / scales).unflatten(-1, (-1, 256))
        unit = blocks.abs().max(-1, keepdim=True).values / 127
        return ((torch.round(blocks / unit) * unit).flatten(-2) * scales,)

    return hook


@contextlib.contextmanager
def quantized(model: Model, captured: Captured, group: scale_groups.Group, s: np.ndarray[Any, Any]) -> Iterator[None]:
    """The readers of a group as llama.cpp computes them when quantized with scales, done in the plainest way."""
    layers, views = {t: layer for layer, t in captured.tensors.items()}, matrices(captured.block)
    with contextlib.ExitStack() as stack:
        for reader in group.readers:
            layer = layers[f"blk.{captured.place}.{reader}.weight"]
            (view,) = views[layer]
            mine = fold.spread(s, view.shape[1], model.plan.model_shape().n_embd_head_v)
            importance = captured.all_channels[layer].mean_squares.astype(np.float32) / np.square(mine)
            out = np.empty((len(view), ggml.row_bytes(Q4_K, view.shape[1])), np.uint8)
            ggml.quantize_rows(Q4_K, view.numpy() * mine, out, importance)
            stack.callback(view.copy_, view.clone())
            view.copy_(torch.from_numpy(ggml.dequantize_rows(Q4_K, out, view.shape[1]) / mine))
            module = captured.block.layer.get_submodule(layer.removeprefix(captured.block.prefix))
            stack.callback(module.register_forward_pre_hook(in_eight_bits(torch.from_numpy(mine))).remove)
        yield


def outputs(captured: Captured, group: scale_groups.Group) -> torch.Tensor:
    """What the part of the block that a group's readers belong to gives on the held-out activations."""
    attention = group.readers[0].startswith("attn")
    module = captured.block.layer.self_attn if attention else captured.block.mlp
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    captured.block(captured.held_out)
    handle.remove()
    return seen[0]


def lost(model: Model, captured: Captured, group: scale_groups.Group, s: np.ndarray[Any, Any]) -> float:
    wanted = outputs(captured, group)
    size = captured.block(captured.held_out).square().mean(-1, keepdim=True)  # of each token's state
    with quantized(model, captured, group, s):
        return float(((outputs(captured, group) - wanted).square() / size).sum() / (wanted.square() / size).sum())


def test_outliers_gain_and_what_is_accepted_gains_on_held_out_activations(model: Callable[[str], Model]) -> None:
    twin = model("outliers")
    search = twin.search(dataclasses.replace(QUICK, final_values=1 << 20, final_tokens=1 << 20))
    gains: dict[str, list[float]] = {}
    for captured in twin.captured:
        found = search(captured)
        for group in search.groups:
            unscaled, chosen = found[group.writer + scale.LOSSES]
            s = scale.scales(found).get(group.writer)
            if s is None:
                assert unscaled == chosen
                continue
            assert lost(twin, captured, group, np.ones_like(s)) == pytest.approx(unscaled, rel=5e-3)
            assert lost(twin, captured, group, s) == pytest.approx(chosen, rel=5e-3)
            assert chosen < unscaled
            gains.setdefault(group.writer, []).append(chosen / unscaled)
    for writer in ("attn_norm", "ffn_norm", "ffn_up"):
        assert len(gains[writer]) == len(twin.captured) and max(gains[writer]) < 0.7, writer


def test_statistics_that_mislead_are_not_followed(model: Callable[[str], Model]) -> None:
    """With the channels of the statistics and samples shuffled, candidates scale the wrong columns."""
    twin = model("outliers")
    captured, rng = twin.captured[0], np.random.default_rng(0)

    def shuffled(name: str) -> tuple[Any, Any]:
        order = rng.permutation(captured.samples[name].shape[1])
        old = captured.channels[name]
        wrong = dataclasses.replace(old, absolute=old.absolute[order], squares=old.squares[order])
        return wrong, captured.samples[name][:, torch.from_numpy(order)]

    wrong = {name: shuffled(name) for name in captured.samples}
    misled = dataclasses.replace(
        captured,
        channels={name: statistics for name, (statistics, _) in wrong.items()},
        samples={name: rows for name, (_, rows) in wrong.items()},
    )
    search = twin.search(dataclasses.replace(QUICK, grid=1, finalists=1))  # s = x alone
    found = search(misled)
    assert not scale.scales(found)
    assert {key for key in found} == {group.writer + scale.LOSSES for group in search.groups}
    assert all(losses[0] == losses[1] for losses in found.values())


def test_the_same_again_and_with_other_threads(model: Callable[[str], Model]) -> None:
    qwen = model("qwen2")
    runs = [qwen.search(threads=threads)(qwen.captured[0]) for threads in (1, 1, 3)]
    assert scale.scales(runs[0])
    for other in runs[1:]:
        assert runs[0].keys() == other.keys()
        assert all(np.array_equal(runs[0][key], other[key]) for key in other)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family(name: str, model: Callable[[str], Model]) -> None:
    """Scales are sound and fit the tensors; the block is left as it was."""
    this = model(name)
    search = this.search(dataclasses.replace(QUICK, grid=2, finalists=1, final_values=1 << 14))
    before = {key: value.clone() for key, value in this.captured[-1].block.layer.state_dict().items()}
    found = {captured.place: search(captured) for captured in this.captured}
    scales = {place: scale.scales(arrays) for place, arrays in found.items()}
    for arrays in found.values():
        assert {key for key in arrays if key.endswith(scale.LOSSES)} == {
            group.writer + scale.LOSSES for group in search.groups
        }
    assert any(scales.values())
    for s in (s for of_block in scales.values() for s in of_block.values()):
        assert s.dtype == np.float32 and np.isfinite(s).all() and s.min() > 0
    assert all(torch.equal(before[key], value) for key, value in this.captured[-1].block.layer.state_dict().items())
    shapes = {t.name: t.shape for t in this.plan.tensors}
    for tensor, columns in fold.column_scales(this.plan, search.groups, scales).items():
        assert columns.shape in (shapes[tensor][-1:], (*shapes[tensor][:-2], shapes[tensor][-1]))


def test_what_was_judged_is_what_is_written(model: Callable[[str], Model]) -> None:
    """The scaled file's matrix, scaled back, is the one that the search computed with."""
    twin = model("outliers")
    captured, search = twin.captured[0], twin.search()
    scales = {captured.place: scale.scales(search(captured))}
    name = f"blk.{captured.place}.ffn_down.weight"
    layer = next(layer for layer, tensor in captured.tensors.items() if tensor == name)
    columns = fold.column_scales(twin.plan, search.groups, scales)
    importance = {name: captured.all_channels[layer].mean_squares.astype(np.float32)}
    weighted = fold.scaled_importance(importance, columns)
    fresh = upstream.plan(twin.checkpoint, "bf16")
    tensor = next(t for t in fold.fold(fresh, search.groups, scales).tensors if t.name == name)
    slabs = [slab.data for slab in quantize.stream([tensor], [Q4_K], threads=1, importance=weighted)]
    written = ggml.dequantize_rows(Q4_K, np.concatenate(slabs), tensor.shape[1]) / columns[name]
    group = next(group for group in search.groups if group.writer == "ffn_up")
    view = matrices(captured.block)[layer][0]
    with quantized(twin, captured, group, scales[captured.place]["ffn_up"]):
        np.testing.assert_allclose(written, view.numpy(), rtol=1e-6)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_activations_that_are_no_numbers_are_refused(value: float, model: Callable[[str], Model]) -> None:
    this = model("llama_gqa")
    captured = this.captured[0]
    layer = next(layer for layer, tensor in captured.tensors.items() if "ffn_down" in tensor)
    rows = captured.samples[layer].clone()
    rows[0, 0] = value
    with pytest.raises(CalibrationError, match=r"what model\.layers\.0\.mlp\.down_proj reads .* NaN or infinite"):
        this.search()(dataclasses.replace(captured, samples={**captured.samples, layer: rows}))


def test_float_types_need_no_scales(model: Callable[[str], Model]) -> None:
    this = model("llama_gqa")
    search = dataclasses.replace(this.search(), types={t.name: quantize.F16 for t in this.plan.tensors})
    assert search(this.captured[0]) == {}


def test_what_decides_the_scales_is_in_their_identity(model: Callable[[str], Model]) -> None:
    search = model("llama_gqa").search()
    others = (
        dataclasses.replace(search, types={**search.types, "blk.0.attn_q.weight": 14}),
        dataclasses.replace(search, weighted=False),
        dataclasses.replace(search, importance={"blk.0.attn_q.weight": np.ones((1, 256), np.float32)}),
        dataclasses.replace(search, settings=scale.ScaleSettings(grid=5)),
    )
    assert all(other.identity != search.identity for other in others)
    assert dataclasses.replace(search, threads=7).identity == search.identity
