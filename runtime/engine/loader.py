"""From a path and settings to a model that is ready to generate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from ziggurat.runtime import plan
from ziggurat.runtime.bindings import Model, kv
from ziggurat.runtime.engine.contexts import Contexts
from ziggurat.runtime.engine.embedding import Embedder
from ziggurat.runtime.engine.memory_check import check_memory, embeds_only
from ziggurat.runtime.engine.prompts import PromptEncoder
from ziggurat.runtime.engine.protocol import ModelInfo
from ziggurat.runtime.engine.settings import EngineSettings
from ziggurat.runtime.errors import UnsupportedError
from ziggurat.runtime.gguf_file import GGUFFile, read_gguf
from ziggurat.runtime.lora import add_adapters, read_adapters
from ziggurat.runtime.model_hash import model_hash

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to serve, and what was computed about it once.

    ``embedder`` is there if embeddings were asked for; ``contexts`` are of use only if the model generates text.
    """

    model: Model
    contexts: Contexts
    prompts: PromptEncoder
    info: ModelInfo
    planned: plan.MemoryPlan
    embedder: Embedder | None = None

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
        settings = settings.with_lanes()
    expected = check_memory(file, settings, adapters)
    model = Model(path, gpu_layers=settings.gpu_layers, progress=proceed)
    try:
        generates_text = model.generates_text and not embeds_only(file)
        if not generates_text and not settings.embeddings:
            raise UnsupportedError(
                f"{os.fspath(path)}: a {file.architecture} model does not generate text token by token"
                + ("; it makes embeddings" if embeds_only(file) else "")
            )
        unsupported = kv.unsupported(model) if settings.kv is not None else None
        if unsupported is not None:
            _logger.info("%s: no KV budget: %s", os.fspath(path), unsupported)
            settings = replace(settings, kv=None)
            if expected.budget is not None:  # what the metadata tells was not all
                expected = check_memory(file, settings, adapters)
        adapted = add_adapters(model, settings.loras)
        n_ctx = settings.ctx_of(model.n_ctx_train)
        info = ModelInfo(
            path=os.fspath(path),
            description=model.description + adapted,
            n_params=model.n_params,
            n_bytes=model.n_bytes,
            n_vocab=model.vocab.n_tokens,
            n_ctx=n_ctx,
            n_ctx_train=model.n_ctx_train,
            has_chat_template=model.chat_template is not None,
            chat_template=model.chat_template,
            kv_bytes=sum(expected.kv_per_layer),
            kv_unsupported=unsupported,
            metadata=file.scalars(),
            parallel=settings.parallel,
            generates_text=generates_text,
            embedding_size=model.n_embd_out if settings.embeddings else None,
        )
        context = settings.context(n_ctx)
        embedder = Embedder(model, context, settings.pooling) if settings.embeddings else None
        contexts = Contexts(model, shape, context, settings.kv)
        prompts = PromptEncoder(model.vocab, model.chat_template)
        return Loaded(model, contexts, prompts, info, expected, embedder)
    except BaseException:
        model.close()
        raise


def _shape(file: GGUFFile) -> plan.KVShape | None:
    """Return the KV shape; None for models without attention, whose state does not grow."""
    try:
        return plan.kv_shape(file)
    except UnsupportedError:
        return None
