"""llama.cpp's own quantizer, as llama-quantize calls it: what the converter's files are compared with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt


def quantize(
    source: Path,
    out: Path,
    ftype: int,
    imatrix: Mapping[str, npt.NDArray[np.float32]] | None = None,
    *,
    prune: Sequence[int] = (),
    threads: int = 2,
) -> None:
    """Quantize a GGUF to the file type `ftype`; `prune`: blocks to leave out (llama.cpp's `prune_layers`)."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, threads
    if prune:
        layers = (ctypes.c_int32 * (len(prune) + 1))(*prune, -1)
        params.prune_layers = ctypes.cast(layers, type(params.prune_layers))
    if imatrix is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, data) in zip(entries, imatrix.items(), strict=False):
            entry.name = name.encode()
            entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = data.size
        params.imatrix = entries
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
