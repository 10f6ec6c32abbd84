"""Compensation in the tuning pass: the right tensors, in the rows' order of the GGUF, with scales, into the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.deep import random_tokens
from helpers.families import FAMILIES
from helpers.plain import QUICK_COMPENSATION
from ziggurat.converter import compensate_step, fold, ggml, linears, quantize, scale, scale_groups, upstream
from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings
from ziggurat.converter.checkpoint import Checkpoint, open_checkpoint
from ziggurat.converter.compensate_step import LOSSES, Compensation, TensorLoss, losses, substituted
from ziggurat.converter.errors import CalibrationError
from ziggurat.converter.tune import Captured, TunedModel, found, tune

Q4_0 = 2
CAUSAL = [name for name, family in FAMILIES.items() if family.causal]
Arrays = Mapping[str, np.ndarray[Any, Any]]


class Double:
    """A step in the place of the search for scales: every group gets scales from 1/2 to 2."""

    name, identity, grams = scale.NAME, {}, False

    def __init__(self, groups: tuple[scale_groups.Group, ...]) -> None:
        self._groups = groups

    def __call__(self, captured: Captured) -> dict[str, np.ndarray[Any, Any]]:
        width = captured.held_out.shape[2]
        norms = [group.writer for group in self._groups if group.writer.endswith("norm")]
        return {writer: np.geomspace(0.5, 2, width).astype(np.float32) for writer in norms}


class Keep:
    """A step that keeps what it gets."""

    name, identity, grams = "keep", {}, True

    def __init__(self) -> None:
        self.captured: list[Captured] = []

    def __call__(self, captured: Captured) -> dict[str, np.ndarray[Any, Any]]:
        self.captured.append(captured)
        return {}


@dataclasses.dataclass(frozen=True)
class Result:
    checkpoint: Checkpoint
    types: dict[str, int]
    found: list[Arrays]
    scales: dict[int, Arrays]

    def plan(self) -> upstream.Plan:
        """Anew: its tensors can be read once."""
        return upstream.plan(self.checkpoint, "bf16")

    @property
    def groups(self) -> tuple[scale_groups.Group, ...]:
        return scale_groups.find(self.checkpoint)


def compensated(folder: Path, work: Path, *, scaled: bool = False) -> Result:
    checkpoint = open_checkpoint(folder)
    plan, groups = upstream.plan(checkpoint, "bf16"), scale_groups.find(checkpoint)
    types = {t.name: Q4_0 if t.type_id == quantize.BF16 else t.type_id for t in plan.tensors}
    step = Compensation(plan, types, groups if scaled else (), settings=QUICK_COMPENSATION)
    steps = [Double(groups), step] if scaled else [step]
    model = TunedModel(Blocks(checkpoint), linears.tensor_names(checkpoint, plan))
    finished = tune(model, random_tokens(6, 32), steps, CalibrateSettings(work=work, threads=1))
    places = range(finished.finished)
    scales = {place: found(finished, place, scale.NAME) for place in places} if scaled else {}
    return Result(checkpoint, types, [found(finished, place, compensate_step.NAME) for place in places], scales)


@pytest.mark.parametrize(("family", "scaled"), [("llama_gqa", False), *((name, True) for name in CAUSAL)])
def test_the_bytes_are_those_of_the_planned_tensors(
    family: str, scaled: bool, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of every matrix but the experts; rows in another order, or wrong scales, would be far from them."""
    result = compensated(checkpoint(family, narrow=True), tmp_path / "work", scaled=scaled)
    plan = fold.fold(result.plan(), result.groups, result.scales)
    wanted = {
        t.name: t
        for t in plan.tensors
        if t.name.startswith("blk.") and len(t.shape) == 2 and result.types[t.name] == Q4_0
    }
    packed = {name: a for arrays in result.found for name, a in arrays.items() if not name.endswith(LOSSES)}
    assert packed.keys() == wanted.keys() and packed
    for name, tensor in wanted.items():
        rows = np.asarray(tensor.load(), np.float32)
        values = ggml.dequantize_rows(Q4_0, packed[name], tensor.shape[1])
        assert np.square(values - rows).sum() < 0.05 * np.square(rows).sum(), name


def test_the_file_gets_these_bytes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compensated(checkpoint("llama_gqa", narrow=True), tmp_path / "work", scaled=True)
    plan = fold.fold(result.plan(), result.groups, result.scales)
    places = {loss.tensor: place for place, arrays in enumerate(result.found) for loss in losses(arrays)}
    plan = substituted(plan, result.types, lambda place: result.found[place], places)
    types = [result.types[t.name] for t in plan.tensors]
    written: dict[str, bytes] = {}
    for slab in quantize.stream(plan.tensors, types, threads=1):
        written[slab.tensor.name] = written.get(slab.tensor.name, b"") + slab.data.tobytes()
    assert written.keys() == result.types.keys()
    for tensor in plan.tensors:
        assert len(written[tensor.name]) == quantize.stored_bytes(tensor.shape, result.types[tensor.name])
    for arrays in result.found:
        for name, data in arrays.items():
            assert name.endswith(LOSSES) or written[name] == data.tobytes()


def test_losses_are_told_and_never_rise(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compensated(checkpoint("qwen2", narrow=True), tmp_path / "work")
    told: list[TensorLoss] = [loss for arrays in result.found for loss in losses(arrays)]
    assert {loss.tensor for loss in told} == {n for a in result.found for n in a if not n.endswith(LOSSES)}
    assert all(0 < loss.loss <= loss.plain for loss in told)
    assert all((loss.loss == loss.plain) == np.isnan(loss.shrinkage) for loss in told)


def test_it_gives_the_same_bytes_again(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    once, again = (compensated(checkpoint("gemma2", narrow=True), tmp_path / name) for name in ("once", "again"))
    for a, b in zip(once.found, again.found, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_activations_that_are_no_numbers_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    opened, keep = open_checkpoint(checkpoint("llama_gqa", narrow=True)), Keep()
    plan = upstream.plan(opened, "bf16")
    types = {t.name: Q4_0 if t.type_id == quantize.BF16 else t.type_id for t in plan.tensors}
    model = TunedModel(Blocks(opened), linears.tensor_names(opened, plan))
    tune(model, random_tokens(4, 32), [keep], CalibrateSettings(work=tmp_path / "work", threads=1))
    captured = keep.captured[0]
    broken = {layer: torch.full_like(gram, torch.nan) for layer, gram in captured.grams.items()}
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        Compensation(plan, types, settings=QUICK_COMPENSATION)(dataclasses.replace(captured, grams=broken))


def test_what_decides_the_tensors_is_in_its_identity() -> None:
    plan = upstream.Plan("llama", {}, [])
    same = Compensation(plan, {"a": Q4_0})
    assert same.identity == Compensation(plan, {"a": Q4_0}).identity
    importance = {"a": np.ones((1, 32), np.float32)}
    others = [
        Compensation(plan, {"a": 8}),
        Compensation(plan, {"a": Q4_0}, weighted=False),
        Compensation(plan, {"a": Q4_0}, importance=importance),
        Compensation(plan, {"a": Q4_0}, settings=QUICK_COMPENSATION),
    ]
    assert all(other.identity != same.identity for other in others)
