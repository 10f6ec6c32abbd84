"""From a path and settings to a model that is ready to generate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ziggurat.runtime import plan
from ziggurat.runtime.bindings import (
    Context,
    ContextSettings,
    Model,
    can_measure,
    devices,
    kv,
    measure,
    supports_gpu_offload,
)
from ziggurat.runtime.engine.contexts import Contexts
from ziggurat.runtime.engine.prompts import PromptEncoder
from ziggurat.runtime.engine.protocol import ModelInfo
from ziggurat.runtime.engine.speculation import MAX_DRAFT
from ziggurat.runtime.errors import InvalidRequestError, MemoryShortageError, UnsupportedError
from ziggurat.runtime.gguf_file import GGUFFile, read_gguf
from ziggurat.runtime.hardware import default_threads
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.lora import LoraAdapter, add_adapters, read_adapters
from ziggurat.runtime.model_hash import model_hash
from ziggurat.runtime.plan.machine import impossible, shortage, this_machine

_logger = logging.getLogger(__name__)

#: Context taken when none is asked for: the model's own, but no more than this.
DEFAULT_CTX = 8192
#: Sequences that a context can have.
MAX_SEQUENCES = 256
# the part of the free memory from which on an estimate is not good enough
_NEAR = 0.9
# times the memory of the machine from which on no better estimate helps: asking takes a part of what it asks for
_FAR = 2


@dataclass(frozen=True)
class EngineSettings:
    """How an engine loads its model.

    ``n_ctx`` is per conversation, in tokens; None takes the trained context up to ``DEFAULT_CTX``. ``n_ubatch`` tokens
    are computed at once. ``type_k`` and ``type_v`` are the KV row types (f16, bf16, q8_0, q4_0). ``threads`` None takes
    the physical cores, ``gpu_layers`` None all that the device can hold. ``kv`` bounds the rows that stay of a prompt;
    None keeps all.

    ``parallel`` requests run at a time, and ``cached`` sequences beside theirs hold what earlier ones left, to be
    continued or begun with; ``queue_limit`` more requests may wait. While prompts are read, the time between two tokens
    of the others may be ``gap`` times what it is undisturbed, and one piece of reading. ``one_shot`` is for single
    prompts: the cache is made for each one's length, and nothing of it is used again. ``loras`` are adapters that are
    applied to all that is computed.

    A ``draft_model`` of the same vocabulary proposes up to ``draft_max`` tokens (1 to 15) at a time, and before it, or
    alone, ``prompt_lookup`` what followed the last tokens when they occurred before.
    """

    n_ctx: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: str = "auto"
    threads: int | None = None
    gpu_layers: int | None = None
    kv: KVPolicy | None = None
    parallel: int = 1
    cached: int = 0
    queue_limit: int = 64
    gap: float = 3.0
    one_shot: bool = False
    loras: tuple[LoraAdapter, ...] = ()
    draft_model: str | os.PathLike[str] | None = None
    draft_max: int = 8
    prompt_lookup: bool = False

    def __post_init__(self) -> None:
        for name in ("n_ctx", "n_batch", "n_ubatch", "threads", "parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} is {value}; it must be at least 1")
        if self.gpu_layers is not None and self.gpu_layers < 0:
            raise InvalidRequestError(f"gpu_layers is {self.gpu_layers}; it must be 0 or more")
        for name in ("cached", "queue_limit"):
            if getattr(self, name) < 0:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.parallel + self.cached > MAX_SEQUENCES:
            raise InvalidRequestError(
                f"parallel and cached are {self.parallel} and {self.cached}; together they can be {MAX_SEQUENCES}"
            )
        if not 1 <= self.draft_max <= MAX_DRAFT:
            raise InvalidRequestError(f"draft_max is {self.draft_max}; it must be from 1 to {MAX_DRAFT}")
        if not 1 < self.gap <= 1000:
            raise InvalidRequestError(f"the gap is {self.gap}; it must be above 1 and at most 1000")
        if self.one_shot and (self.parallel, self.cached) != (1, 0):
            raise InvalidRequestError("an engine for single prompts runs one at a time and keeps nothing")

    @property
    def lanes(self) -> int:
        """Prompts that are read at a time."""
        asked = self.kv.reading if self.kv is not None else None
        return min(asked or 2, self.parallel)

    @property
    def step(self) -> int:
        """Tokens of a sequence that are decoded at a time."""
        return 1 + self.draft_max if self.prompt_lookup or self.draft_model is not None else 1


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to serve, and what was computed about it once."""

    model: Model
    contexts: Contexts
    prompts: PromptEncoder
    info: ModelInfo
    planned: plan.MemoryPlan

    def hash(self) -> str:
        """Return what tells the model's file from others."""
        return model_hash(self.info.path)


def load(path: str | os.PathLike[str], settings: EngineSettings, proceed: Callable[[float], bool]) -> Loaded:
    """Check the file and load the model. ``proceed`` gets 0.0 to 1.0 and stops the load with False.

    What is short of memory is logged as a warning before anything is loaded, and refused when it can never fit. A model
    that cannot have the KV budget asked for is loaded without; ``ModelInfo.kv_unsupported`` says why.

    Raises ModelFileError, AdapterError, MemoryShortageError, ModelLoadError, UnsupportedError, ContextError,
    TemplateError, LibraryError; nothing stays allocated then.
    """
    file = read_gguf(path)
    adapters = read_adapters(settings.loras, file)
    shape = _shape(file)
    if shape is not None:
        plan.check_cache_types(shape, settings.type_k, settings.type_v)
    if settings.kv is not None:
        kv.require()
        # with one shot every prompt begins with an empty cache
        kv_policy = replace(settings.kv, reading=settings.lanes, copies=0 if settings.one_shot else None)
        settings = replace(settings, kv=kv_policy)
    expected = _check_memory(file, settings, adapters)
    model = Model(path, gpu_layers=settings.gpu_layers, progress=proceed)
    try:
        if not model.generates_text:
            raise UnsupportedError(
                f"{os.fspath(path)}: a {file.architecture} model does not generate text token by token"
            )
        unsupported = kv.unsupported(model) if settings.kv is not None else None
        if unsupported is not None:
            _logger.info("%s: no KV budget: %s", os.fspath(path), unsupported)
            settings = replace(settings, kv=None)
            if expected.budget is not None:  # what the metadata tells was not all
                expected = _check_memory(file, settings, adapters)
        adapted = add_adapters(model, settings.loras)
        n_ctx = _n_ctx(settings, model.n_ctx_train)
        info = ModelInfo(
            path=os.fspath(path),
            description=model.description + adapted,
            n_params=model.n_params,
            n_bytes=model.n_bytes,
            n_vocab=model.vocab.n_tokens,
            n_ctx=n_ctx,
            n_ctx_train=model.n_ctx_train,
            has_chat_template=model.chat_template is not None,
            kv_bytes=sum(expected.kv_per_layer),
            kv_unsupported=unsupported,
            parallel=settings.parallel,
        )
        contexts = Contexts(model, shape, _context_settings(settings, n_ctx), settings.kv, step=settings.step)
        return Loaded(model, contexts, PromptEncoder(model.vocab, model.chat_template), info, expected)
    except BaseException:
        model.close()
        raise


def _n_ctx(settings: EngineSettings, n_ctx_train: int) -> int:
    return settings.n_ctx or min(n_ctx_train or DEFAULT_CTX, DEFAULT_CTX)


def _check_memory(file: GGUFFile, settings: EngineSettings, adapters: Sequence[GGUFFile]) -> plan.MemoryPlan:
    """Compare the plan, for a prompt as long as the context, with the machine, and return it.

    By arithmetic first; when that comes near to what is free, the library is asked, which takes as long as reading the
    vocabulary. (In this process: on a file that it aborts on, it would abort a moment later anyway.) A GPU that is
    short of memory is never refused here: the library says best what is wrong.
    """
    model = replace(plan.outline(file), adapters=sum(adapter.weights_bytes for adapter in adapters))
    free = [device.memory_free for device in devices() if device.kind == "gpu"] if supports_gpu_offload() else []
    every_layer = len(model.weights.layers) + 1
    gpu_layers = every_layer if settings.gpu_layers is None else settings.gpu_layers
    n_ctx = _n_ctx(settings, model.n_ctx_train)
    context = _context_settings(settings, n_ctx)
    if settings.kv is not None and model.kv is not None:
        rows = settings.kv.rows if settings.one_shot else settings.kv.most_rows
        context = replace(context, kv=settings.kv.settings(rows(model.kv.n_layer, n_ctx)))
    planned = plan.plan_memory(model, context, gpu_layers=gpu_layers if free else 0)
    machine = this_machine(free)
    near = planned.total > _NEAR * machine.available and planned.host.fixed < _FAR * (machine.total + machine.swap)
    if near and not planned.gpus and can_measure():
        with Model(file.path, gpu_layers=0, simulated=True) as simulated, Context(simulated, context) as measured:
            planned = plan.measured_plan(model, context, measure(measured))
    why = impossible(planned, machine)
    if why is not None:
        raise MemoryShortageError(f"{file.path}: {why}")
    warning = shortage(planned, machine)
    if warning is not None:
        _logger.warning("%s %s", file.path, warning)
    return planned


def _shape(file: GGUFFile) -> plan.KVShape | None:
    """Return the KV shape; None for models without attention, whose state does not grow."""
    try:
        return plan.kv_shape(file)
    except UnsupportedError:
        return None


def _context_settings(settings: EngineSettings, n_ctx: int) -> ContextSettings:
    return ContextSettings(
        n_ctx=n_ctx,
        n_batch=settings.n_batch,
        n_ubatch=settings.n_ubatch,
        n_seq_max=settings.parallel + settings.cached,
        type_k=settings.type_k,
        type_v=settings.type_v,
        flash_attention=settings.flash_attention,
        n_threads=settings.threads or default_threads(),
    )
