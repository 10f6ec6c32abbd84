"""The memory plan: what a model and its context take, by kind and by device."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziggurat.runtime.bindings.context_settings import ContextSettings
from ziggurat.runtime.bindings.memory import BufferMemory
from ziggurat.runtime.plan.budgets import BudgetMemory, budget_memory
from ziggurat.runtime.plan.compute import compute_bytes, ubatch
from ziggurat.runtime.plan.kv import check_cache_types, kv_bytes_per_layer, padded
from ziggurat.runtime.plan.outline import Outline

HOST = "CPU"
#: Name of the device in a plan that was not made by asking the library.
GPU = "GPU"
_F32 = 4


@dataclass(frozen=True)
class DeviceMemory:
    """What one device holds, in bytes. ``context`` are KV rows, ``output`` the logits that are read back.

    ``repacked`` of the weights are held by the CPU in an order of its own, in memory and not mapped from the file; only
    the library knows which, so it is 0 in a plan that was not made by asking it. ``adapters`` lie beside the weights
    that they change, in memory.
    """

    device: str
    weights: int = 0
    context: int = 0
    compute: int = 0
    output: int = 0
    repacked: int = 0
    adapters: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.context + self.compute + self.output

    @property
    def fixed(self) -> int:
        """What has to stay in memory on the host, where the other weights are mapped from the file."""
        return self.total - self.weights + self.repacked


@dataclass(frozen=True)
class MemoryPlan:
    """What a model and a context of these settings take, in bytes; ``devices`` begins with the host.

    ``kv_per_layer`` holds the rows of all conversations together, empty for models without attention; with a KV budget,
    whose parts are in ``budget``, what stays of prompts. ``measured`` says that the library was asked,
    ``weights_exact`` that the weights are a file's and not an estimate. Not counted: the library's own objects, among
    them 52 bytes per cell of the cache, scratch memory of the CPU's threads, and pages of the file that are read once
    and not needed again.
    """

    path: Path
    settings: ContextSettings
    devices: tuple[DeviceMemory, ...]
    kv_per_layer: tuple[int, ...]
    kv_exact: bool
    weights_exact: bool
    measured: bool
    budget: BudgetMemory | None = None

    @property
    def weights(self) -> int:
        """Bytes of weights on all devices."""
        return sum(device.weights for device in self.devices)

    @property
    def adapters(self) -> int:
        """Bytes of LoRA adapters on all devices."""
        return sum(device.adapters for device in self.devices)

    @property
    def context(self) -> int:
        """Bytes of KV rows (and recurrent state, where it is known) on all devices, with a budget all of its parts."""
        return sum(device.context for device in self.devices)

    @property
    def compute(self) -> int:
        """Bytes of the graph's temporaries on all devices."""
        return sum(device.compute for device in self.devices)

    @property
    def output(self) -> int:
        """Bytes of the logits that are read back."""
        return sum(device.output for device in self.devices)

    @property
    def total(self) -> int:
        """Bytes on all devices."""
        return sum(device.total for device in self.devices)

    @property
    def host(self) -> DeviceMemory:
        """What lies in the host's memory."""
        return self.devices[0]

    @property
    def gpus(self) -> tuple[DeviceMemory, ...]:
        """What lies elsewhere."""
        return self.devices[1:]

    def beside(self, other: MemoryPlan, *, same_model: bool = True) -> MemoryPlan:
        """Return the plan of this context and another's, of the same model or not; what it says of KV is this one's."""
        more = {device.device: device for device in other.devices}
        devices = tuple(
            dataclasses.replace(
                device,
                weights=device.weights + (0 if same_model else more[device.device].weights),
                repacked=device.repacked + (0 if same_model else more[device.device].repacked),
                context=device.context + more[device.device].context,
                compute=device.compute + more[device.device].compute,
                output=device.output + more[device.device].output,
            )
            if device.device in more
            else device
            for device in self.devices
        )
        return dataclasses.replace(self, devices=devices)

    def as_json(self) -> dict[str, Any]:
        """Return the plan as ``ziggurat plan --json`` writes it; sizes in bytes."""
        settings = self.settings
        return {
            "ctx": settings.n_ctx,
            "ctx_allocated": padded(settings.n_ctx),
            "parallel": settings.n_seq_max,
            "ubatch": settings.n_ubatch,
            "cache_type_k": settings.type_k,
            "cache_type_v": settings.type_v,
            "flash_attention": settings.flash_attention,
            "weights_bytes": self.weights,
            "weights_exact": self.weights_exact,
            "adapters_bytes": self.adapters,
            "kv_bytes": self.context,
            "kv_bytes_per_layer": list(self.kv_per_layer),
            "kv_exact": self.kv_exact,
            "kv_budget": self._budget_json(),
            "compute_bytes": self.compute,
            "output_bytes": self.output,
            "total_bytes": self.total,
            "measured": self.measured,
            "devices": [{**dataclasses.asdict(device), "total": device.total} for device in self.devices],
        }

    def _budget_json(self) -> dict[str, Any] | None:
        budget, kv = self.budget, self.settings.kv
        if kv is None or budget is None:
            return None
        return {
            "rows_per_layer": list(kv.rows),
            "rows_allocated_per_layer": list(budget.capacity),
            "score": kv.score,
            "prefill": kv.prefill,
            "layer_major": budget.layer_major,
            "rows_bytes": sum(budget.rows),
            "position_bytes": sum(budget.positions),
            "query_bytes": sum(budget.queries),
            "sum_bytes": sum(budget.sums),
            "prompts_at_a_time": min(kv.n_reading, self.settings.n_seq_max),
            "copy_bytes": sum(budget.copies),
            "stage_bytes": budget.stage,
            "hidden_bytes": budget.hidden,
            "kv_bytes_full": budget.full,
        }


def plan_memory(model: Outline, settings: ContextSettings, *, gpu_layers: int = 0) -> MemoryPlan:
    """Plan by arithmetic alone. ``gpu_layers`` counts as llama.cpp does: the last layers, the output first of all.

    With layers on a GPU the split is that of one GPU; host and GPU each get the whole estimate of the compute buffers,
    since each computes its own part of the graph. Raises UnsupportedError for cache types that do not fit the heads.
    """
    n_ctx = padded(settings.n_ctx)
    n_ubatch = ubatch(n_ctx, settings.n_streams, settings.n_batch, settings.n_ubatch)
    budget = _budget(model, settings, n_ubatch)
    per_layer = _kv(model, settings, n_ubatch, budget)
    compute = compute_bytes(
        model,
        n_ctx,
        settings.n_streams,
        n_ubatch,
        flash_attention=settings.flash_attention != "off",
        swa_full=settings.swa_full,
        budget=budget,
    )
    context = budget.total if budget is not None else sum(per_layer)
    devices = [DeviceMemory(HOST, model.weights.total, context, compute, _output(model, settings))]
    if gpu_layers > 0:
        devices = _split(model, devices[0], per_layer, gpu_layers, budget)
    return MemoryPlan(
        path=model.path,
        settings=settings,
        devices=_with_adapters(devices, model.adapters),
        kv_per_layer=per_layer,
        kv_exact=model.kv is None or model.kv.exact,
        weights_exact=model.weights.exact,
        measured=False,
        budget=budget,
    )


def measured_plan(model: Outline, settings: ContextSettings, buffers: Iterable[BufferMemory]) -> MemoryPlan:
    """Plan with what the library says that it allocates; only ``kv_per_layer`` and ``output`` are arithmetic."""
    n_ubatch = ubatch(padded(settings.n_ctx), settings.n_streams, settings.n_batch, settings.n_ubatch)
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    sums[HOST]["output"] = _output(model, settings)
    for buffer in buffers:
        sums[buffer.device].update(weights=buffer.weights, context=buffer.context, compute=buffer.compute)
        # a GPU's pinned buffers hold weights only in this simulation: with a mapped file they stay where they are
        if buffer.device == HOST and buffer.buffer != HOST and not buffer.buffer.endswith("_Host"):
            sums[HOST]["repacked"] += buffer.weights
    devices = [DeviceMemory(name, **sizes) for name, sizes in sums.items()]
    context = sum(device.context for device in devices)
    budget = _budget(model, settings, n_ubatch)
    if budget is not None and context - budget.total > budget.padding:  # the graph could not be cut into layers
        budget = _budget(model, settings, n_ubatch, layer_major=False)
    per_layer = _kv(model, settings, n_ubatch, budget)
    known, padding = (budget.total, budget.padding) if budget is not None else (sum(per_layer), 0)
    return MemoryPlan(
        path=model.path,
        settings=settings,
        devices=_with_adapters(devices, model.adapters),
        kv_per_layer=per_layer,
        kv_exact=0 <= context - known <= padding,
        weights_exact=True,
        measured=True,
        budget=budget,
    )


def _with_adapters(devices: Sequence[DeviceMemory], size: int) -> tuple[DeviceMemory, ...]:
    """Add adapters to each device by its part of the weights that they change, about; the rest to the last one."""
    whole = sum(device.weights for device in devices) or 1
    parts = [size * device.weights // whole for device in devices]
    parts[-1] += size - sum(parts)
    return tuple(dataclasses.replace(device, adapters=part) for device, part in zip(devices, parts, strict=True))


def _budget(
    model: Outline, settings: ContextSettings, n_ubatch: int, *, layer_major: bool = True
) -> BudgetMemory | None:
    if model.kv is None or settings.kv is None:
        return None
    check_cache_types(model.kv, settings.type_k, settings.type_v)
    return budget_memory(model.kv, model.n_embd, settings, n_ubatch, layer_major=layer_major)


def _kv(
    model: Outline, settings: ContextSettings, n_ubatch: int, budget: BudgetMemory | None = None
) -> tuple[int, ...]:
    if model.kv is None:
        return ()
    if budget is not None:
        return budget.kept_per_layer
    check_cache_types(model.kv, settings.type_k, settings.type_v)
    return kv_bytes_per_layer(
        model.kv,
        settings.n_ctx,
        type_k=settings.type_k,
        type_v=settings.type_v,
        n_seq=settings.n_streams,
        n_ubatch=n_ubatch,
        swa_full=settings.swa_full,
        flash_attention=settings.flash_attention != "off",
    )


def _output(model: Outline, settings: ContextSettings) -> int:
    """Logits of the tokens that every conversation decodes at a time; a batch that asks for more lets the buffer grow.

    A context for embeddings has them, and hidden states, of every token that it computes at once.
    """
    if settings.pooling is not None:
        return (model.n_vocab + model.n_embd) * min(settings.n_ubatch, padded(settings.n_ctx)) * _F32
    return model.n_vocab * settings.n_seq_max * settings.n_step * _F32


def _split(
    model: Outline,
    all_of_it: DeviceMemory,
    per_layer: tuple[int, ...],
    gpu_layers: int,
    budget: BudgetMemory | None,
) -> list[DeviceMemory]:
    weights = model.weights
    n_layer = len(weights.layers)
    first = max(n_layer + 1 - gpu_layers, 0)
    on_gpu = weights.output + sum(weights.layers[first:])
    copy = weights.embedding if weights.tied else 0
    rows = sum(per_layer[first:]) + (sum(budget.copies[first:]) if budget is not None else 0)
    # the stage is needed wherever there are layers
    reading = budget.reading if budget is not None and first < n_layer else 0
    left = all_of_it.context - rows - (reading if first == 0 else 0)
    return [
        dataclasses.replace(all_of_it, weights=all_of_it.weights - on_gpu, context=left),
        DeviceMemory(GPU, on_gpu + copy, rows + reading, all_of_it.compute),
    ]
