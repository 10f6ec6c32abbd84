"""Lets llama.cpp check a GGUF's metadata, tensor shapes and vocabulary before any weight is computed.

The check runs in a process of its own: on some wrong inputs llama.cpp does not return an error but aborts. That process
imports no more than `ctypes`: the bindings with all that they import take far longer to start than the check.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from ziggurat.converter.errors import TokenizerError, UnsupportedModelError

MARK = "error loading model"
MISFIT = "check_tensor_dims"
UNKNOWN_PRE = "unknown pre-tokenizer type"


def check_loadable(path: Path) -> None:
    """Make sure that llama.cpp would load the file: names, shapes and number of tensors, metadata, vocabulary.

    The file needs its full length but not its content: no weight is read.

    Raises:
        TokenizerError: llama.cpp does not know the pre-tokenizer.
        UnsupportedModelError: llama.cpp would not load it for another reason, which is told.
    """
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0
    # Python would look for modules in the current folder first, which may be a checkpoint with files of its own.
    code = f"import sys; sys.path = [p for p in sys.path if p]; from {__name__} import _child; _child()"
    command = [sys.executable, "-c", code, llama_cpp.llama_cpp._lib._name, bytes(params).hex(), str(path)]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if result.returncode == 0:
        return
    lines = [line.strip() for line in result.stderr.decode(errors="replace").splitlines() if line.strip()]
    reason = next((line for line in lines if MARK in line), lines[-1] if lines else f"exit code {result.returncode}")
    reason = reason.split(f"{MARK}:", 1)[-1].strip()
    if UNKNOWN_PRE in reason:
        name = reason.split(UNKNOWN_PRE, 1)[-1].strip(" :")
        raise TokenizerError(f"llama.cpp has no pre-tokenizer {name}: give another --pre, or none and it is recognized")
    if MISFIT in reason:
        reason = f"{reason.split(MISFIT, 1)[-1].strip(' :')} (these weights are not what config.json describes)"
    raise UnsupportedModelError(f"llama.cpp would not load the converted model: {reason}")


def _child() -> None:
    """Load the model; the arguments are the library, `llama_model_params` without a pointer as hex digits, the file."""
    library, digits, path = sys.argv[1:]
    words = len(digits) // 16

    class Params(ctypes.Structure):
        _fields_ = [("words", ctypes.c_uint64 * words)]  # passed by value like any struct of this size

    load = ctypes.CDLL(library).llama_model_load_from_file
    load.argtypes, load.restype = [ctypes.c_char_p, Params], ctypes.c_void_p
    sys.exit(0 if load(os.fsencode(path), Params.from_buffer_copy(bytes.fromhex(digits))) else 1)
