"""A context: the KV cache of some sequences, and the decoding of batches into it."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ziggurat.runtime.bindings import kv, library, lora
from ziggurat.runtime.bindings.abort import AbortFlag
from ziggurat.runtime.bindings.batch import Batch
from ziggurat.runtime.bindings.context_settings import ContextSettings, fill
from ziggurat.runtime.bindings.kv import MAX_STEP
from ziggurat.runtime.bindings.kv_settings import KVLayout, Progress
from ziggurat.runtime.bindings.log import reason
from ziggurat.runtime.bindings.model import Model
from ziggurat.runtime.errors import ContextError, DecodeAborted, DecodeError, EngineClosedError, InvalidRequestError


class Context:
    """The KV cache of ``n_seq_max`` sequences of one model. One thread at a time may use it.

    ``abort`` may be set from any other thread: the batch being computed ends with DecodeAborted (on the CPU within a
    graph node, on a GPU after the batch). ``log_lines`` are what the library reported while making it, ``loras`` the
    model's adapters at that time, which are applied to all that it computes.
    """

    def __init__(self, model: Model, settings: ContextSettings) -> None:
        lib = self._lib = library.api()
        self.model = model  # the context must not outlive it
        self.settings = settings
        self.abort = AbortFlag()
        params = lib.llama_context_default_params()
        budget = fill(params, settings)
        params.abort_callback = ctypes.cast(self.abort.function, lib.ggml_abort_callback)
        params.abort_callback_data = self.abort.address
        with library.log.capture() as lines:
            handle = lib.llama_init_from_model(model.handle, params)
        del budget  # the library has copied it
        self.log_lines = tuple(line for _, line in lines)
        if not handle:
            raise ContextError(f"no context of {settings.n_ctx} rows: {reason(lines, 'not enough memory?')}")
        self._handle: Any = handle
        self._free = weakref.finalize(self, lib.llama_free, handle)
        self._memory = lib.llama_get_memory(handle)
        #: Whether it has rows of earlier tokens to go on from; False for encoders, which have none.
        self.keeps_rows = bool(self._memory)
        #: Whether tokens see only those before them, so that a text can be read in parts.
        self.causal = self.keeps_rows and bool(lib.llama_get_causal_attn(handle))
        self._outputs: frozenset[int] = frozenset()
        #: Whether rows that were copied are not there yet: the library copies them with the next batch.
        self.copies_pending = False
        cache = kv.Cache(handle, model.n_layer) if settings.kv is not None else None
        self._cache = cache if cache is not None and cache.active else None
        #: Chains that work within the context, by sequence; kept alive here because the library keeps pointers.
        self.samplers: dict[int, object] = {}
        self.loras = model.loras
        lora.attach(handle, self.loras)
        model.register(self)
        if settings.n_step > 1 and not model.simulated:
            self.set_step(settings.n_step)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return not self._free.alive

    @property
    def handle(self) -> Any:
        """The ``llama_context`` pointer. Raises EngineClosedError after ``close``."""
        if not self._free.alive:
            raise EngineClosedError("the context was closed")
        return self._handle

    def close(self) -> None:
        """Free the cache and the compute buffers. Idempotent."""
        self._free()
        self.samplers.clear()

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_ctx_allocated(self) -> int:
        """Rows per sequence as the library allocated them: ``n_ctx`` rounded up."""
        return int(self._lib.llama_n_ctx_seq(self.handle))

    @property
    def n_batch(self) -> int:
        """Largest batch in tokens; at most what the settings asked, unless there are more sequences."""
        return int(self._lib.llama_n_batch(self.handle))

    @property
    def n_ubatch(self) -> int:
        """Tokens computed at once; at most what the settings asked."""
        return int(self._lib.llama_n_ubatch(self.handle))

    def set_threads(self, n_threads: int) -> None:
        """Compute with so many threads from now on, single tokens and prompts alike."""
        if n_threads < 1:
            raise InvalidRequestError(f"{n_threads} threads cannot compute anything")
        self._lib.llama_set_n_threads(self.handle, n_threads, n_threads)

    def new_batch(self) -> Batch:
        """Return an empty batch of the largest size this context takes."""
        return Batch(self.n_batch, self.settings.n_seq_max)

    def decode(self, batch: Batch) -> None:
        """Compute a batch: its tokens become KV rows, its flagged outputs become logits.

        Raises TokenError for ids outside the vocabulary before anything is computed, ContextError when the rows do not
        fit (nothing was changed), DecodeAborted when ``abort`` was set, DecodeError otherwise. After the last two the
        rows of finished ubatches remain: clear the sequences concerned. With a KV budget every sequence is then as it
        was before, or has all its tokens of the batch (a prompt that was finished): ``last_position`` tells.
        """
        if self.model.simulated:
            raise ContextError("this context was made to be measured and has no memory to compute in")
        self.model.vocab.check(batch.tokens)
        self._outputs = frozenset()
        if not self.causal and len(batch) > self.n_ubatch:  # the library would abort the process
            raise ContextError(f"{len(batch)} tokens have to be computed at once, and here {self.n_ubatch} are")
        compute = self._lib.llama_decode if self.keeps_rows else self._lib.llama_encode
        with library.log.capture() as lines:
            status = compute(self.handle, batch.native(self._lib))
        if status == 0:
            self._outputs = batch.outputs
            self.copies_pending = False
        elif status == 1:
            refusal = self._cache.refusal() if self._cache is not None else ""
            rows = self.n_ctx_allocated
            raise ContextError(refusal or f"no room for {len(batch)} tokens in a context of {rows} rows")
        elif status == 2:
            raise DecodeAborted("the computation was aborted as asked", status)
        else:
            raise DecodeError(f"decoding {len(batch)} tokens failed: {reason(lines, f'status {status}')}", status)

    def output_index(self, index: int) -> int:
        """Return ``index`` if the last batch computed logits there, else raise InvalidRequestError.

        The library aborts the process when asked for logits it has not got.
        """
        if index not in self._outputs:
            raise InvalidRequestError(f"the last batch computed no logits at index {index}")
        return index

    def logits(self, index: int) -> Any:
        """Copy the logits of position ``index`` of the last batch: a float32 array of shape (n_vocab,)."""
        import numpy as np

        pointer = self._lib.llama_get_logits_ith(self.handle, self.output_index(index))
        return np.ctypeslib.as_array(pointer, shape=(self.model.vocab.n_tokens,)).copy()

    def likeliest(self, index: int) -> int:
        """Return the token with the highest logit at position ``index`` of the last batch, the first of equals."""
        import numpy as np

        pointer = self._lib.llama_get_logits_ith(self.handle, self.output_index(index))
        return int(np.ctypeslib.as_array(pointer, shape=(self.model.vocab.n_tokens,)).argmax())

    def output_logits(self) -> Any:
        """View all logits of the last batch: float32 of shape (outputs, n_vocab), in the order of the batch's tokens.

        Nothing is copied: the array is the library's own buffer, valid until the next ``decode`` or ``close``.
        """
        import numpy as np

        shape = (len(self._outputs), self.model.vocab.n_tokens)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self.handle), shape=shape)

    def copy(self, source: int, target: int, end: int = -1) -> None:
        """Give sequence ``target`` the positions of ``source`` up to ``end`` (-1: all); what it had is forgotten.

        Both go on as ``source`` alone would. With a KV budget every sequence has rows of its own, so a copy takes as
        many as the original; it has the original's own budget as well. Raises ContextError, with nothing changed, when
        ``end`` lies before the last selection of ``source``, or a prompt of one of them is being read.
        """
        memory = self._checked_memory()
        if not self._valid(source) or not self._valid(target) or source == target:
            return
        if self._cache is not None:
            self._lib.llama_memory_seq_cp(memory, source, target, -1, end)
            if refusal := self._cache.refusal():
                raise ContextError(refusal)
            return
        self.copies_pending = True
        self._lib.llama_memory_seq_rm(memory, target, -1, -1)
        self._lib.llama_memory_seq_cp(memory, source, target, -1, -1)  # aborts the process when asked for a part
        if end >= 0:
            self._lib.llama_memory_seq_rm(memory, target, end, -1)

    def _valid(self, sequence: int) -> bool:
        if not 0 <= sequence < self.settings.n_seq_max:  # the library would abort the process
            raise InvalidRequestError(f"sequence {sequence} is not one of {self.settings.n_seq_max}")
        return True

    def clear(self) -> None:
        """Forget the rows of all sequences."""
        self._lib.llama_memory_clear(self._checked_memory(), False)

    def remove(self, sequence: int, start: int = 0, end: int = -1) -> bool:
        """Remove positions [start, end) of a sequence (end -1: all). False if the memory cannot, nothing changed."""
        return bool(self._lib.llama_memory_seq_rm(self._checked_memory(), sequence, start, end))

    def last_position(self, sequence: int) -> int:
        """Return the largest position held of a sequence, -1 when it is empty."""
        return int(self._lib.llama_memory_seq_pos_max(self._checked_memory(), sequence))

    def removable_from(self, sequence: int) -> int:
        """Return the first position from which on a sequence's end can be removed exactly.

        ``remove(sequence, start)`` with ``start`` there or later leaves the rows as they were when ``start`` tokens had
        been seen. 0 where everything can go; ``last_position + 1`` where nothing can. With a KV budget: what came after
        the last selection (nothing while a prompt is being read). Without one: all of it in plain attention; in
        sliding-window layers what leaves a whole window of rows before it; nothing in recurrent and hybrid models.
        """
        memory = self._checked_memory()
        self._valid(sequence)
        if self._cache is not None:
            return self._cache.removable_from(sequence)
        end = self.last_position(sequence) + 1
        if self.model.recurrent:
            return end
        first = int(self._lib.llama_memory_seq_pos_min(memory, sequence))
        return 0 if first <= 0 else min(end, first + int(self._lib.llama_model_n_swa(self.model.handle)))

    @property
    def kv_active(self) -> bool:
        """Whether there is a KV budget; False without one in the settings, and when the model cannot have one."""
        return self._cache is not None

    def kv_layout(self) -> KVLayout | None:
        """Return what the KV budget has allocated, None without one."""
        return self._cache.layout() if self.handle and self._cache is not None else None

    def kv_capacity(self) -> tuple[int, ...]:
        """Return the rows allocated per layer and sequence; empty without a KV budget."""
        return self._cache.capacity() if self.handle and self._cache is not None else ()

    def kv_rows(self, sequence: int) -> tuple[int, ...]:
        """Return the rows that a sequence uses per layer; empty without a KV budget."""
        valid = self.handle and self._valid(sequence)
        return self._cache.rows(sequence) if valid and self._cache is not None else ()

    def kv_positions(self, sequence: int, layer: int) -> Any:
        """Return which tokens a sequence's rows are of: int32 of shape (KV heads of the layer, rows), ascending.

        Raises InvalidRequestError without a KV budget, and for a layer that there is not. Waits for the computation.
        """
        return self._checked_cache(sequence).positions(sequence, layer)

    def set_kv_budget(self, sequence: int, rows: Sequence[int] | None) -> None:
        """Give one sequence a KV budget of its own from its next selection on, None for the context's again.

        ``rows`` has one entry per layer; with the slack they have to fit what was allocated. Raises InvalidRequestError
        when they do not, and without a KV budget.
        """
        self._checked_cache(sequence).set_budget(sequence, rows)

    def kv_select(self, sequence: int) -> int:
        """Bring the layers of a sequence that are above their budget down to it; return how many there were.

        Raises ContextError when the computation fails; the sequence is then as it was.
        """
        return self._checked_cache(sequence).select(sequence)

    def set_step(self, n_tokens: int) -> None:
        """Let up to ``n_tokens`` (1 to 16) tokens of a sequence in a batch be a decoding step, as a single one is.

        With a KV budget, more are a prompt. The tokens of a step can all be removed again: rows are selected before it,
        when it does not fit, and never after. So it gives what as many single tokens would, but for a selection that
        may come earlier by less than a step. Without a budget there is nothing to tell apart, and nothing is changed.
        Raises InvalidRequestError for more tokens than 16 or than fit beside the budget (``KVSettings.slack`` always
        do), ContextError when there is no memory to compute such a step in.
        """
        if not 1 <= n_tokens <= MAX_STEP:
            raise InvalidRequestError(f"a decoding step has 1 to {MAX_STEP} tokens, not {n_tokens}")
        if self.handle and self._cache is not None:
            self._cache.set_step(n_tokens)

    def prompt_begin(self, sequence: int, tokens: Sequence[int]) -> None:
        """Make ready to read a prompt in steps, after what the sequence holds; nothing is computed yet.

        The sequence stays as it is until the last step is done, and takes nothing else but its removal, which cancels.
        Raises InvalidRequestError without a KV budget, TokenError for ids outside the vocabulary, ContextError when the
        tokens do not fit, when the sequence is being read already, or as many prompts are as the settings allow.
        """
        cache = self._checked_cache(sequence)
        self.model.vocab.check(tokens)
        cache.prompt_begin(sequence, tokens)

    def prompt_step(self, sequence: int, max_steps: int) -> Progress:
        """Compute at most ``max_steps`` further steps of a prompt; other sequences may decode before the next ones.

        The result is that of one ``decode`` of the whole prompt. Once it is finished, index -1 has the logits after its
        last token. Raises ContextError when no prompt is being read; DecodeAborted when ``abort`` was set and
        DecodeError when the computation failed: the prompt is cancelled then, and the sequence as it was before.
        """
        cache = self._checked_cache(sequence)
        self._outputs = frozenset()
        progress = cache.prompt_step(sequence, max_steps)
        if progress.finished:
            self._outputs = frozenset((-1,))
        return progress

    def prompt_cancel(self, sequence: int) -> bool:
        """Give a prompt up, after which the sequence is as it was before; False if none is being read."""
        return self._checked_cache(sequence).prompt_cancel(sequence)

    def _checked_cache(self, sequence: int) -> kv.Cache:
        if not self.handle or self._cache is None:
            raise InvalidRequestError("this context has no KV budget")
        self._valid(sequence)
        return self._cache

    def _checked_memory(self) -> Any:
        if not self.handle or not self.keeps_rows:
            raise ContextError("this model keeps no rows of earlier tokens, so nothing can be generated with it")
        return self._memory
