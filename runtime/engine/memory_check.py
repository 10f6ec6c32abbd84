"""Whether what is to be loaded fits this machine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ziggurat.runtime import plan
from ziggurat.runtime.bindings import (
    Context,
    ContextSettings,
    Model,
    can_measure,
    devices,
    measure,
    supports_gpu_offload,
)
from ziggurat.runtime.engine.draft_loader import plan_draft
from ziggurat.runtime.engine.embedding import embedding_settings
from ziggurat.runtime.engine.settings import EngineSettings
from ziggurat.runtime.errors import MemoryShortageError
from ziggurat.runtime.gguf_file import GGUFFile
from ziggurat.runtime.plan.machine import impossible, shortage, this_machine

_logger = logging.getLogger(__name__)

# the part of the free memory from which on an estimate is not good enough
_NEAR = 0.9
# times the memory of the machine from which on no better estimate helps: asking takes a part of what it asks for
_FAR = 2


def check_memory(file: GGUFFile, settings: EngineSettings, adapters: Sequence[GGUFFile]) -> plan.MemoryPlan:
    """Compare the plan, for a prompt as long as the context, with the machine, and return it.

    Checked is all that the settings ask for, a draft model and a context for embeddings as well; returned what is
    planned for generating text, if the model does.

    By arithmetic first; when that comes near to what is free, the library is asked, which takes as long as reading the
    vocabulary. (In this process: on a file that it aborts on, it would abort a moment later anyway.) A GPU that is
    short of memory is never refused here: the library says best what is wrong. Raises MemoryShortageError.
    """
    expected = _Expected.of(file, settings, adapters)
    plans, planned = expected.plans, expected.together
    machine = this_machine(expected.gpus_free)
    near = planned.total > _NEAR * machine.available and planned.host.fixed < _FAR * (machine.total + machine.swap)
    if near and not planned.gpus and can_measure():
        with Model(file.path, gpu_layers=0, simulated=True) as simulated:
            plans = [_measured(expected.model, simulated, each) for each in expected.contexts]
        planned = _together(plans, expected.draft)
    why = impossible(planned, machine)
    if why is not None:
        raise MemoryShortageError(f"{file.path}: {why}")
    warning = shortage(planned, machine)
    if warning is not None:
        _logger.warning("%s %s", file.path, warning)
    return plans[0]


def plan_all(file: GGUFFile, settings: EngineSettings, adapters: Sequence[GGUFFile]) -> plan.MemoryPlan:
    """Return the plan, by arithmetic, for all that the settings ask for together; see ``check_memory``."""
    return _Expected.of(file, settings.with_lanes(), adapters).together


@dataclass(frozen=True)
class _Expected:
    """What is planned by arithmetic: for generating text and for embeddings, and for a draft model."""

    model: plan.Outline
    contexts: list[ContextSettings]
    plans: list[plan.MemoryPlan]
    draft: plan.MemoryPlan | None
    gpus_free: list[int]

    @classmethod
    def of(cls, file: GGUFFile, settings: EngineSettings, adapters: Sequence[GGUFFile]) -> _Expected:
        model = replace(plan.outline(file), adapters=sum(adapter.weights_bytes for adapter in adapters))
        free = [device.memory_free for device in devices() if device.kind == "gpu"] if supports_gpu_offload() else []
        every_layer = len(model.weights.layers) + 1
        gpu_layers = every_layer if settings.gpu_layers is None else settings.gpu_layers
        n_ctx = settings.ctx_of(model.n_ctx_train)
        context = settings.context(n_ctx)
        if settings.kv is not None and model.kv is not None and model.kv.full_layers:
            rows = settings.kv.rows if settings.one_shot else settings.kv.most_rows
            context = replace(context, kv=settings.kv.settings(rows(model.kv.window, n_ctx)))
        contexts = [context]
        if settings.embeddings:
            contexts.append(embedding_settings(context, settings.pooling))
        if embeds_only(file):
            model, contexts = replace(model, kv=None), contexts[1:] or contexts
        plans = [plan.plan_memory(model, each, gpu_layers=gpu_layers if free else 0) for each in contexts]
        draft = _draft(settings, context, gpu_layers if free else 0)
        return cls(model, contexts, plans, draft, free)

    @property
    def together(self) -> plan.MemoryPlan:
        return _together(self.plans, self.draft)


def _draft(settings: EngineSettings, context: ContextSettings, gpu_layers: int) -> plan.MemoryPlan | None:
    if settings.draft_model is None:
        return None
    return plan_draft(settings.draft_model, context, settings.kv, gpu_layers=gpu_layers)


def _together(plans: Sequence[plan.MemoryPlan], draft: plan.MemoryPlan | None) -> plan.MemoryPlan:
    together = functools.reduce(plan.MemoryPlan.beside, plans)
    return together if draft is None else together.beside(draft, same_model=False)


def _measured(model: plan.Outline, simulated: Model, settings: ContextSettings) -> plan.MemoryPlan:
    with Context(simulated, settings) as context:
        return plan.measured_plan(model, settings, measure(context))


def embeds_only(file: GGUFFile) -> bool:
    """Whether every token of the model sees all others, so that it cannot tell what comes next."""
    return file.scalar(f"{file.architecture}.attention.causal") is False
