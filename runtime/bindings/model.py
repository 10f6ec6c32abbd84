"""A loaded model: weights, vocabulary, metadata."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ziggurat.runtime.bindings import library, lora
from ziggurat.runtime.bindings.log import reason
from ziggurat.runtime.bindings.vocab import Vocab
from ziggurat.runtime.errors import EngineClosedError, ModelLoadError

if TYPE_CHECKING:
    from ziggurat.runtime.bindings.context import Context


class Model:
    """A GGUF model in memory; the weights are mapped from the file where the device allows it.

    ``gpu_layers``: how many layers go to the GPU, None for all that a GPU build can take. ``progress`` is called with
    0.0 to 1.0 from the loading thread; the load stops when it returns False. ``vocab_only`` loads no weights.
    ``simulated`` reads none either and lets contexts be made that allocate nothing, to be measured and not computed
    with.

    Close it (or leave its ``with`` block) when done: its contexts are closed first. Not safe from several threads,
    except for ``vocab`` and the read-only properties.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        gpu_layers: int | None = None,
        vocab_only: bool = False,
        simulated: bool = False,
        progress: Callable[[float], bool] | None = None,
    ) -> None:
        lib = self._lib = library.api()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = -1 if gpu_layers is None else gpu_layers
        params.vocab_only = vocab_only
        self.simulated = simulated
        if simulated:
            params.no_alloc = True
            params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # the library aborts on a mapped file here
        watch = _LoadWatch(progress)
        callback = lib.llama_progress_callback(watch)  # alive until the call returns, which is as long as C needs it
        params.progress_callback = callback
        with library.log.capture() as lines:
            handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        if watch.error is not None:
            if handle:
                lib.llama_model_free(handle)
            raise watch.error
        if not handle:
            stopped = "the load was stopped" if watch.stopped else "no reason was given; see --verbose"
            raise ModelLoadError(f"{os.fspath(path)}: {stopped if watch.stopped else reason(lines, stopped)}")
        self._handle: Any = handle
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        # Finalizers run at exit in reverse order of creation, so contexts go before their model there too.
        self._free = weakref.finalize(self, lib.llama_model_free, handle)
        self.vocab = Vocab(lib.llama_model_get_vocab(handle))
        #: LoRA adapters of every context that is made from now on.
        self.loras: tuple[lora.Lora, ...] = ()

    @property
    def handle(self) -> Any:
        """The ``llama_model`` pointer. Raises EngineClosedError after ``close``."""
        if not self._free.alive:
            raise EngineClosedError("the model was closed")
        return self._handle

    def register(self, context: Context) -> None:
        """Remember a context made from this model, so that ``close`` can free it first."""
        self._contexts.add(context)

    def add_lora(self, path: str | os.PathLike[str], scale: float, name: str) -> lora.Lora:
        """Load a LoRA adapter for the contexts that are made from now on; those made before stay as they are.

        See ``Lora`` for the arguments. It is freed with the model. Raises AdapterError with the library's reason. The
        file has to have been checked (``runtime.lora``): there are adapters that the library does not survive.
        """
        added = lora.Lora(os.fspath(path), scale, name, lora.load(self.handle, path))
        self.loras = (*self.loras, added)
        return added

    def close(self) -> None:
        """Free the contexts, the adapters and the weights. Idempotent."""
        for context in list(self._contexts):
            context.close()
        self._free()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_params(self) -> int:
        """Number of weights."""
        return int(self._lib.llama_model_n_params(self.handle))

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(self._lib.llama_model_size(self.handle))

    @property
    def n_layer(self) -> int:
        """Number of blocks."""
        return int(self._lib.llama_model_n_layer(self.handle))

    @property
    def n_head(self) -> int:
        """Query heads of the first block."""
        return int(self._lib.llama_model_n_head(self.handle))

    @property
    def n_head_kv(self) -> int:
        """KV heads of the first block."""
        return int(self._lib.llama_model_n_head_kv(self.handle))

    @property
    def n_ctx_train(self) -> int:
        """Context length the model was trained for, in tokens."""
        return int(self._lib.llama_model_n_ctx_train(self.handle))

    @property
    def recurrent(self) -> bool:
        """Whether some of its layers have a state instead of rows: nothing of a sequence can be taken back then."""
        lib, handle = self._lib, self.handle
        return bool(lib.llama_model_is_recurrent(handle) or lib.llama_model_is_hybrid(handle))

    @property
    def description(self) -> str:
        """The library's short name of it: architecture, size class, file type."""
        buffer = ctypes.create_string_buffer(256)
        self._lib.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", errors="replace")

    @property
    def chat_template(self) -> str | None:
        """The default chat template (Jinja source), None if the file has none."""
        source: bytes | None = self._lib.llama_model_chat_template(self.handle, None)
        return None if source is None else source.decode("utf-8", errors="replace")

    @property
    def n_embd_out(self) -> int:
        """Size of the vectors that a context for embeddings gives."""
        return int(self._lib.llama_model_n_embd_out(self.handle))

    @property
    def has_encoder(self) -> bool:
        """Whether it has an encoder beside a decoder, or for one (T5 and its like; not those of BERT's kind)."""
        return bool(self._lib.llama_model_has_encoder(self.handle))

    @property
    def generates_text(self) -> bool:
        """Whether this may be a decoder that predicts the next token: no encoder-decoder and no diffusion model.

        A model for embeddings shows itself in its contexts alone: they are not ``causal``.
        """
        lib, handle = self._lib, self.handle
        has = lib.llama_model_has_decoder(handle) and not self.has_encoder
        return bool(has and not lib.llama_model_is_diffusion(handle))


class _LoadWatch:
    """The progress callback: never lets an exception into C, and remembers that it stopped the load."""

    def __init__(self, progress: Callable[[float], bool] | None) -> None:
        self._progress = progress
        self.error: BaseException | None = None
        self.stopped = False

    def __call__(self, fraction: float, _user_data: Any) -> bool:
        try:
            self.stopped = self._progress is not None and not self._progress(fraction)
        except BaseException as error:  # Ctrl-C arrives here too when the main thread loads
            self.error, self.stopped = error, True
        return not self.stopped
