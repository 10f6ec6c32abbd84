"""Compensation as a step of the tuning pass, and how its tensors come into the plan of the file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter import fold, ggml, scale
from ziggurat.converter.activations import Collector
from ziggurat.converter.calibrate import torch_threads
from ziggurat.converter.compensate import CompensateSettings, Matrix, compensate_all, supported
from ziggurat.converter.errors import QuantizeError
from ziggurat.converter.samples import Sampler
from ziggurat.converter.scale_groups import Group
from ziggurat.converter.upstream import Plan, PlannedTensor

if TYPE_CHECKING:
    import torch

    from ziggurat.converter.tune import Captured

Float32 = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]

NAME = "compensate"
LOSSES = ":losses"


@dataclass(frozen=True)
class TensorLoss:
    """What compensation did for a tensor."""

    tensor: str
    plain: float
    """Squared error of the layer's output on held-out inputs as ggml quantizes the tensor, relative to that output."""
    loss: float
    """The same as it is written; equal if ggml's own quantization was kept."""
    shrinkage: float
    """Of the Gram matrix; not a number if ggml's own quantization was kept."""


@dataclass(frozen=True)
class Given:
    """A `tune.BlockStep` that gives what an earlier pass found."""

    name: str
    arrays: Mapping[int, Arrays]
    """By place."""

    grams = False

    @property
    def identity(self) -> Mapping[str, Any]:
        """A hash of what it gives."""
        digest = hashlib.sha256()
        for place, arrays in sorted(self.arrays.items()):
            for key, array in sorted(arrays.items()):
                digest.update(f"{place} {key}\n".encode() + np.ascontiguousarray(array).tobytes())
        return {"given": digest.hexdigest()}

    def __call__(self, captured: Captured) -> dict[str, npt.NDArray[Any]]:
        """What was found for a block."""
        return dict(self.arrays.get(captured.place, {}))


@dataclass(frozen=True)
class Compensation:
    """A `tune.BlockStep` that quantizes the matrices of each block with their errors compensated.

    Experts of a mixture, whose inputs have no Gram matrix, and types without a grid are left to the plain quantizer.
    """

    plan: Plan
    """Of the model that is run, without scales. Tensors are read from it, in their rows' order in the GGUF; what was
    read is gone, so `substituted` has to replace it."""
    types: Mapping[str, int]
    """What the file will have: tensor to ggml type."""
    groups: tuple[Group, ...] = ()
    """Of the scales that the step `scale.NAME` before this one found, if there is one."""
    weighted: bool = True
    """Whether ggml's choices of scales are weighted with the importance matrix."""
    importance: Mapping[str, Float32] | None = None
    """That, by tensor, if it does not come from the pass itself."""
    settings: CompensateSettings = CompensateSettings()
    threads: int = 1

    name = NAME
    grams = True

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that decides the tensors beside the block."""
        given = scale.given_hash(self.types, self.importance)
        settings = {key: str(value) for key, value in dataclasses.asdict(self.settings).items()}
        return {**settings, "weighted": self.weighted, "types": given}

    @functools.cached_property
    def _planned(self) -> dict[str, PlannedTensor]:
        return {t.name: t for t in self.plan.tensors}

    def __call__(self, captured: Captured) -> dict[str, npt.NDArray[Any]]:
        """By name of the tensor its bytes, [rows, row bytes], and under name + LOSSES the fields of a `TensorLoss`.

        Raises:
            CalibrationError: activations are no numbers.
            QuantizeError: a tensor has NaN or infinite values, or ggml finds non-finite scales.
        """
        found: dict[str, npt.NDArray[Any]] = {}
        inputs = _held_out_inputs(captured)
        # threads of torch's own would wait for each other at every column
        with torch_threads(1), ThreadPoolExecutor(self.threads, thread_name_prefix="compensate") as pool:
            for layers in _by_input(captured):
                names = [captured.tensors[layer] for layer in layers if self._compensable(captured.tensors[layer])]
                if names:
                    gram, held_out = captured.grams[layers[0]], inputs[layers[0]]
                    if not (bool(gram.diagonal().isfinite().all()) and bool(held_out.isfinite().all())):
                        raise scale.not_finite(layers[0])
                    found.update(self._compensated(captured, layers[0], names, gram, held_out, pool))
        return found

    def _compensable(self, name: str) -> bool:
        tensor = self._planned[name]
        return len(tensor.shape) == 2 and supported(self.types[name], tensor.shape[-1], self.settings)

    def _compensated(
        self, captured: Captured, layer: str, names: list[str], gram: torch.Tensor, held_out: torch.Tensor,
        pool: Executor,
    ) -> Iterator[tuple[str, npt.NDArray[Any]]]:  # fmt: skip
        """Quantize the tensors that read one input, with their scales folded in."""
        import torch

        part = dataclasses.replace(self.plan, tensors=[self._planned[name] for name in names])
        scales = {captured.place: scale.scales(captured.found.get(scale.NAME, {}))}
        columns = fold.column_scales(part, self.groups, scales)
        assert len(columns) in (0, len(names))  # whoever reads a scaled input has to know of it
        gathered = captured.all_channels[layer].mean_squares
        if columns:  # the inputs are divided by them
            s = torch.from_numpy(columns[names[0]]).to(gram.device)
            gram.div_(s).div_(s[:, None])
            held_out = held_out / s
        matrices = []
        for tensor in fold.fold(part, self.groups, scales).tensors:
            importance = None
            if self.weighted:
                given = gathered if self.importance is None else self.importance.get(tensor.name)
                if given is not None:
                    s2 = np.square(columns[tensor.name]) if columns else 1
                    importance = np.ascontiguousarray(given.reshape(-1) / s2, np.float32)
            ggml.prepare(self.types[tensor.name])
            matrices.append(Matrix(_read(tensor).to(gram.device), self.types[tensor.name], importance))
        try:
            results = compensate_all(matrices, gram, held_out, self.settings, pool, self.threads)
        except QuantizeError as e:
            raise QuantizeError(f"tensor {', '.join(names)}: {e}") from None
        for name, result in zip(names, results, strict=True):
            yield name, result.packed
            yield name + LOSSES, np.array([result.plain_loss, result.loss, result.shrinkage])


def substituted(
    plan: Plan, types: Mapping[str, int], found: Callable[[int], Arrays], places: Mapping[str, int]
) -> Plan:  # fmt: skip
    """The plan with the tensors that `Compensation` made, as bytes in their final type.

    Args:
        plan: of which the step was made, with its scales folded in or not.
        types: those of the step.
        found: what the step found for each place; its last answer is kept.
        places: by name of such a tensor.
    """
    remembered = functools.lru_cache(1)(found)  # the file's order is block by block

    def replaced(tensor: PlannedTensor, place: int) -> PlannedTensor:
        return dataclasses.replace(
            tensor, type_id=types[tensor.name], load=lambda: np.asarray(remembered(place)[tensor.name])
        )

    tensors = [replaced(t, places[t.name]) if t.name in places else t for t in plan.tensors]
    return dataclasses.replace(plan, tensors=tensors)


def losses(found: Arrays) -> list[TensorLoss]:
    """What the step did for the tensors of a block."""
    return [
        TensorLoss(key.removesuffix(LOSSES), *(float(x) for x in values))
        for key, values in found.items()
        if key.endswith(LOSSES)
    ]


def _by_input(captured: Captured) -> list[list[str]]:
    """The layers that have a Gram matrix and a tensor, those that read one input together."""
    shared: dict[int, list[str]] = {}
    for layer in captured.tensors:
        if layer in captured.grams:
            shared.setdefault(id(captured.grams[layer]), []).append(layer)
    return list(shared.values())


def _held_out_inputs(captured: Captured) -> dict[str, torch.Tensor]:
    """What each layer reads of the held-out sequences, [tokens, columns]; layers with one input share a tensor."""
    sampler = Sampler(captured.held_out.shape[:2].numel(), 1, grams=False)
    collector = Collector(sampler)
    with collector.watching(captured.block):
        sampler.begin_batch()
        captured.block(captured.held_out)
    rows = sampler.take().rows
    return {layer: rows[leader] for layer, leader in collector.leaders.items() if leader in rows}


def _read(tensor: PlannedTensor) -> torch.Tensor:
    import torch

    rows = np.ascontiguousarray(tensor.load(), np.float32)
    if not np.isfinite(rows).all():
        raise QuantizeError(f"tensor {tensor.name} has NaN or infinite values: the checkpoint is damaged, get it again")
    return torch.from_numpy(rows)
