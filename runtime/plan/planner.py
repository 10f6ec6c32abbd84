"""Answers questions about one model's memory: from the library where it can say, by arithmetic where it cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ziggurat.runtime.bindings import ContextSettings, Simulation, can_measure, supports_gpu_offload
from ziggurat.runtime.bindings.kv import available as kv_budgets_available
from ziggurat.runtime.errors import UnsupportedError
from ziggurat.runtime.gguf_file import read_gguf
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.lora import LoraAdapter, read_adapters
from ziggurat.runtime.plan import fit
from ziggurat.runtime.plan.checkpoint import checkpoint_outline
from ziggurat.runtime.plan.kv import padded
from ziggurat.runtime.plan.memory import MemoryPlan, measured_plan, plan_memory
from ziggurat.runtime.plan.outline import Outline, outline

#: The file type that ``convert`` makes, and that a checkpoint is planned as.
DEFAULT_FILE_TYPE = "q4_k_m"
# A simulated cache still has its cells, of 52 bytes; more of them than this would take memory that was not asked for.
_MAX_SIMULATED_ROWS = 2**22


class Planner:
    """Makes plans for one model. ``simulation`` is the model opened in the library, None to plan by arithmetic.

    ``gpu_layers``: as for ``plan_memory``; with a simulation it was given there. ``policy`` is what the KV cache keeps
    of prompts as long as the context; None plans for what the settings of a plan say.
    """

    def __init__(
        self,
        model: Outline,
        *,
        gpu_layers: int = 0,
        simulation: Simulation | None = None,
        policy: KVPolicy | None = None,
    ) -> None:
        self.model = model
        self._gpu_layers = gpu_layers
        self._simulation = simulation
        self._policy = policy

    def plan(self, settings: ContextSettings) -> MemoryPlan:
        """Return the plan for a context.

        Raises UnsupportedError for cache types that do not fit the heads, ContextError when the library refuses.
        """
        if self._policy is not None and self.model.kv is not None and self.model.kv.full_layers:
            rows = self._policy.rows if settings.n_seq_max == 1 else self._policy.most_rows
            policy = dataclasses.replace(self._policy, reading=self._policy.lanes(settings.n_seq_max))
            kv = policy.settings(rows(self.model.kv.window, settings.n_ctx))
            settings = dataclasses.replace(settings, kv=kv)
        estimate = plan_memory(self.model, settings, gpu_layers=self._gpu_layers)
        if (
            self._simulation is None
            or (settings.kv is not None and not kv_budgets_available())
            or padded(settings.n_ctx) * settings.n_seq_max > _MAX_SIMULATED_ROWS
        ):
            return estimate
        return measured_plan(self.model, settings, self._simulation.breakdown(settings))

    def most_conversations(self, settings: ContextSettings, memory: int, size: fit.Size = fit.on_all_devices) -> int:
        """Return how many conversations of ``settings.n_ctx`` tokens fit into ``memory`` bytes; see ``fit``."""
        return fit.most_conversations(self.plan, settings, memory, size)

    def largest_ctx(self, settings: ContextSettings, memory: int, size: fit.Size = fit.on_all_devices) -> int:
        """Return the largest context that ``settings.n_seq_max`` conversations can have in ``memory``; see ``fit``."""
        return fit.largest_ctx(self.plan, self.model, settings, memory, size)


@contextlib.contextmanager
def open_planner(
    path: str | os.PathLike[str],
    *,
    gpu_layers: int | None = None,
    file_type: str | None = None,
    ask_library: bool = True,
    policy: KVPolicy | None = None,
    loras: Sequence[LoraAdapter] = (),
) -> Iterator[Planner]:
    """Open a GGUF file, or a checkpoint's folder or ``config.json``, for planning.

    ``gpu_layers`` None: all if the library has a GPU; without asking the library, none. ``file_type`` is what a
    checkpoint will be converted to (default ``DEFAULT_FILE_TYPE``). ``policy``: as for Planner. ``loras`` are adapters
    of a GGUF file. The library is asked about GGUF files if it is installed and patched. Raises what reading the files
    raises, ModelLoadError when the library does not take the model, UnsupportedError for a checkpoint with adapters.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".json":
        if loras:
            raise UnsupportedError(f"{path}: adapters are planned with GGUF files; convert the model first")
        model = checkpoint_outline(path, file_type or DEFAULT_FILE_TYPE)
        yield Planner(model, gpu_layers=gpu_layers or 0, policy=policy)
        return
    file = read_gguf(path)
    adapters = read_adapters(loras, file)
    model = dataclasses.replace(outline(file), adapters=sum(adapter.weights_bytes for adapter in adapters))
    if ask_library and can_measure():
        layers = _default_gpu_layers(model) if gpu_layers is None else gpu_layers
        with Simulation(path, gpu_layers=gpu_layers) as simulation:
            yield Planner(model, gpu_layers=layers, simulation=simulation, policy=policy)
        return
    yield Planner(model, gpu_layers=gpu_layers or 0, policy=policy)


def _default_gpu_layers(model: Outline) -> int:
    return len(model.weights.layers) + 1 if supports_gpu_offload() else 0
