"""The smallest possible use of llama.cpp: load a GGUF, tokenize, evaluate one prompt, all of it in plain F32."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import llama_cpp
import numpy as np
import numpy.typing as npt

_CALLBACK = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Gguf:
    """A loaded GGUF file. Use it as a context manager."""

    def __init__(self, path: Path, *, vocab_only: bool = False) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = vocab_only
        parameters.n_gpu_layers = 0
        # whoever listens to the library's log, the runtime among them, goes on listening afterwards
        before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
        llama_cpp.llama_log_set(_CALLBACK, ctypes.c_void_p(0))
        try:
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        finally:
            llama_cpp.llama_log_set(before, data)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def __enter__(self) -> Gguf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        llama_cpp.llama_model_free(self._model)

    @property
    def n_layer(self) -> int:
        return int(llama_cpp.llama_model_n_layer(self._model))

    @property
    def vocab_size(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        ids = (llama_cpp.llama_token * room)()
        n = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
        if n < 0:
            raise RuntimeError(f"tokenizing needs {-n} places, there are {room}")
        return list(ids[:n])

    def piece(self, token: int, *, special: bool = True) -> bytes:
        """Return the bytes one token stands for; a leading space is kept."""
        buffer = ctypes.create_string_buffer(256)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if n < 0:
            raise RuntimeError(f"token {token} needs {-n} bytes")
        return buffer.raw[:n]

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after every token of the prompt, (tokens, vocabulary)."""
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(len(tokens), 32)
        parameters.n_threads = parameters.n_threads_batch = 1  # more only wait for each other
        # an F16 cache alone costs more than the tolerance; flash attention computes in F16 too
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError("llama.cpp makes no context")
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
            if llama_cpp.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode fails")
            rows = llama_cpp.llama_get_logits(context)
            return np.array(np.ctypeslib.as_array(rows, (len(tokens), self.vocab_size)), dtype=np.float32)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)


def nmse(got: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> float:
    """Return the squared error relative to the squared size of what was wanted."""
    got64, wanted64 = got.astype(np.float64), wanted.astype(np.float64)
    return float(((got64 - wanted64) ** 2).sum() / (wanted64**2).sum())
