"""Whether everything that a benchmark has in memory at a time fits this machine; asked before anything is loaded."""

from __future__ import annotations

import functools

from ziggurat.runtime import plan
from ziggurat.runtime.bench.axes import Axes, Place, Work
from ziggurat.runtime.bindings import devices, supports_gpu_offload
from ziggurat.runtime.errors import MemoryShortageError
from ziggurat.runtime.gguf_file import GGUFFile
from ziggurat.runtime.plan.machine import Machine, this_machine
from ziggurat.runtime.sizes import human_bytes

# the saved state of a sequence, and the copy that the library reads
_STATES = 2


def check_memory(file: GGUFFile, axes: Axes, work: Work, gpu_layers: int | None) -> None:
    """Refuse a benchmark whose contexts of some place cannot be in memory together, as planned by arithmetic.

    A machine that swaps measures its disk, so what counts is what is free now. GPUs are left to the library, which says
    best what is wrong. Raises MemoryShortageError, and UnsupportedError for cache types that do not fit the heads.
    """
    model = plan.outline(file)
    free = [device.memory_free for device in devices() if device.kind == "gpu"] if supports_gpu_offload() else []
    layers = len(model.weights.layers) + 1 if gpu_layers is None else gpu_layers
    machine = this_machine(free)
    for place in axes.places:
        _check(model, axes, place, work, layers if free else 0, machine)


def _check(model: plan.Outline, axes: Axes, place: Place, work: Work, gpu_layers: int, machine: Machine) -> None:
    n_layer = model.kv.n_layer if model.kv is not None else len(model.weights.layers)
    contexts = [setting.context(n_layer, place, work) for setting in axes.settings]
    plans = [plan.plan_memory(model, context, gpu_layers=gpu_layers) for context in contexts]
    host = functools.reduce(plan.MemoryPlan.beside, plans).host
    states = max((_state(model, place, each.settings.type_k, each.settings.type_v) for each in plans), default=0)
    needed = host.fixed + states
    if needed > machine.available:
        compared = "one context" if len(contexts) == 1 else f"{len(contexts)} contexts side by side"
        raise MemoryShortageError(
            f"{model.path}: {compared} with {place.streams} x {place.depth} tokens need {human_bytes(needed)} beside"
            f" the weights ({human_bytes(host.weights)}), and {human_bytes(machine.available)} are free: lower --depth"
            " or --streams, or compare less at a time"
        )


def _state(model: plan.Outline, place: Place, type_k: str, type_v: str) -> int:
    """Bytes that filling the cache takes for a moment."""
    if model.kv is None:
        return 0
    return _STATES * place.depth * sum(plan.bytes_per_token(model.kv, type_k, type_v))
