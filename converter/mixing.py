"""The step of a conversion that chooses types for a size: `mix_pass` measures, `mix` chooses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ziggurat.converter import embedding, ggml, linears, mix, recipes
from ziggurat.converter.depth import Measuring
from ziggurat.converter.errors import QuantizeError
from ziggurat.converter.imatrix import Float32
from ziggurat.converter.mix import Candidate, Target
from ziggurat.converter.mix_losses import Quantizing, candidate_types
from ziggurat.converter.mix_record import MixRecord
from ziggurat.converter.quantize import BF16, F16, F32, stored_bytes
from ziggurat.converter.upstream import Plan, PlannedTensor
from ziggurat.converter.write import ALIGNMENT

if TYPE_CHECKING:
    from ziggurat.converter.repair import Fold

# Of the capacity: what may be left unused before the user is told.
UNUSED = 0.01


@dataclass(frozen=True)
class Mixer:
    """Chooses types for a size.

    Tensors that the recipe nearest in size quantizes, and whose losses can be measured, are open; the others keep the
    recipe's types.
    """

    target: Target
    plan: Plan
    types: Sequence[int]
    """The recipe's."""
    measured: Collection[str]
    """Tensors whose losses can be measured."""
    weighted: Collection[str]
    """Tensors with importance data."""

    def open(self) -> dict[str, tuple[PlannedTensor, list[int]]]:
        """Tensors by name, with the types they could have."""
        found = {}
        for tensor, type_id in zip(self.plan.tensors, self.types, strict=True):
            if type_id in (F32, F16, BF16) or tensor.name not in self.measured:
                continue
            types = candidate_types(tensor.shape[-1], importance=tensor.name in self.weighted)
            if types:
                found[tensor.name] = tensor, types
        return found

    def capacity(self, header: int) -> int:
        """Bytes for the open tensors in a file whose header has `header` bytes.

        Raises:
            QuantizeError: they do not fit, whatever their types.
        """
        found = self.open()
        fixed = sum(
            self._bytes(tensor, type_id)
            for tensor, type_id in zip(self.plan.tensors, self.types, strict=True)
            if tensor.name not in found
        )
        capacity = self.target.capacity(header, self.plan.parameters) - fixed
        least = sum(min(self._bytes(tensor, t) for t in types) for tensor, types in found.values())
        if capacity < least:
            parameters = self.plan.parameters
            needed = header + fixed + least if self.target.bytes is not None else 8 * (fixed + least) / parameters
            unit = "bytes" if self.target.bytes is not None else "bits per weight"
            wanted = self.target.bytes if self.target.bytes is not None else self.target.bits_per_weight
            raise QuantizeError(
                f"{wanted} {unit} are too few for this model: with the smallest types it needs "
                f"{_up(needed)}; ask for more, or remove blocks with --prune"
            )
        return capacity

    def choose(
        self, header: int, measuring: Measuring, importance: Mapping[str, Float32] | None,
        columns: Mapping[str, Float32], *, removed: tuple[int, ...] = (), folds: Mapping[int, Fold] | None = None,
    ) -> tuple[list[int], MixRecord]:  # fmt: skip
        """Measure and choose: the types of all tensors of the plan, and what to tell of them.

        Args:
            header: bytes of the file before the tensors' data.
            measuring: checkpoint, text, and how to run it.
            importance: what the tensors of the plan are quantized with.
            columns: what their columns are multiplied by.
            removed: blocks of the checkpoint that the plan is without.
            folds: repair in it, by block of the checkpoint.

        Raises:
            CalibrationError: hidden states are no numbers, the folder is of other inputs, or there is no room.
            QuantizeError: the model does not fit.
        """
        from ziggurat.converter.blocks import Blocks
        from ziggurat.converter.mix_pass import COARSE_BELOW, MixSettings, measure
        from ziggurat.converter.tune import TunedModel

        capacity, found, how = self.capacity(header), self.open(), measuring.settings
        tensors = linears.tensor_names(measuring.checkpoint, self.plan, removed)
        model = TunedModel(Blocks(measuring.checkpoint, how.device, how.dtype), tensors, removed, folds or {})
        wanted = {
            name: _quantizing(types, (importance or {}).get(name), columns.get(name))
            for name, (_, types) in found.items()
        }
        bits = 8 * capacity / sum(math.prod(tensor.shape) for tensor, _ in found.values())
        settings = MixSettings(coarse=bits < COARSE_BELOW)
        assert how.work is not None
        how = dataclasses.replace(how, work=how.work / "mix")
        losses = measure(model, wanted, measuring.tokens, settings, how, measuring.progress)
        groups = [
            [Candidate(t, self._bytes(tensor, t), float(loss)) for t, loss in zip(types, losses[name], strict=True)]
            for name, (tensor, types) in found.items()
        ]
        chosen = dict(zip(found, mix.choose(groups, capacity), strict=True))
        types = [
            chosen[tensor.name].type_id if tensor.name in chosen else type_id
            for tensor, type_id in zip(self.plan.tensors, self.types, strict=True)
        ]
        used = sum(c.bytes for c in chosen.values())
        note = None
        if used < (1 - UNUSED) * capacity:
            note = f"with the best types the tensors take {used} of {capacity} bytes: a larger file would gain nothing"
        every = sum(self._bytes(tensor, t) for tensor, t in zip(self.plan.tensors, types, strict=True))
        return types, MixRecord.of(self.target.text, capacity, every, chosen, note)

    def _bytes(self, tensor: PlannedTensor, type_id: int) -> int:
        """What a tensor counts: in a file, its padding too."""
        size = stored_bytes(tensor.shape, type_id)
        return size if self.target.bytes is None else -(-size // ALIGNMENT) * ALIGNMENT


def nearest_recipe(plan: Plan, target: Target, imatrix: Collection[str] | None, shape: ggml.ModelShape) -> str:
    """The recipe whose file is nearest in size: what the mix is called in the metadata, and scales are searched for.

    Raises:
        UnsupportedModelError: llama.cpp has no recipe for the model.
    """
    wanted = target.capacity(0, plan.parameters)
    sizes: dict[str, int] = {}
    for name in recipes.FTYPES:
        if name in recipes.FLOAT_TYPES:
            continue
        try:
            types = recipes.choose(plan, name, imatrix=imatrix, shape=shape)
        except QuantizeError:  # needs importance data where there is none
            continue
        sizes[name] = sum(stored_bytes(t.shape, type_id) for t, type_id in zip(plan.tensors, types, strict=True))
    return min(sizes, key=lambda name: abs(sizes[name] - wanted))


def measurable(measuring: Measuring, plan: Plan, removed: Collection[int] = ()) -> set[str]:
    """Tensors whose losses can be measured."""
    return {*linears.tensor_names(measuring.checkpoint, plan, removed).values(), embedding.TENSOR}


def metadata(target: Target) -> dict[str, Any]:
    """What the GGUF says of a mix."""
    return MixRecord.metadata(target.text)


def _quantizing(types: Sequence[int], importance: Float32 | None, columns: Float32 | None) -> Quantizing:
    scales = None if columns is None else np.asarray(columns, np.float32).reshape(-1, columns.shape[-1])
    if importance is not None:
        importance = np.asarray(importance, np.float32).reshape(-1, importance.shape[-1])
    return Quantizing(types, importance, scales)


def _up(value: float) -> str:
    """Rounded up: what is asked for next has to be enough."""
    return str(value) if isinstance(value, int) else f"{math.ceil(value * 1000) / 1000:g}"
