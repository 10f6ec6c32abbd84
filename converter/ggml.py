"""The converter's door to the patched library: ggml's quantizers and llama.cpp's type recipes.

With `kernels` and `loadable`, the only module of the converter that touches the C API. All functions may be called from
several threads at once; ctypes releases Python's lock while C code runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter.errors import LibraryError, QuantizeError, UnsupportedModelError

logger = logging.getLogger(__name__)

_LOG_ERROR = 4  # enum ggml_log_level

REMEDY = "install the patched library with `pip install ./patches` from Ziggurat's source folder"


class _ModelShape(ctypes.Structure):
    """`struct ziggurat_quant_desc` of patches/src/ziggurat-quant.h."""

    _fields_ = [
        ("arch", ctypes.c_char_p),
        ("n_embd", ctypes.c_uint32),
        ("n_ff", ctypes.c_uint32),
        ("n_layer", ctypes.c_uint32),
        ("n_head", ctypes.c_uint32),
        ("n_head_kv", ctypes.c_uint32),
        ("n_expert", ctypes.c_uint32),
        ("n_embd_head_k", ctypes.c_uint32),
        ("n_embd_head_v", ctypes.c_uint32),
    ]


class _Tensor(ctypes.Structure):
    """`struct ziggurat_quant_tensor` of patches/src/ziggurat-quant.h."""

    _fields_ = [("name", ctypes.c_char_p), ("type", ctypes.c_int32), ("ne", ctypes.c_int64 * 4)]


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class ModelShape:
    """What llama.cpp's recipes look at besides tensor names and shapes; `n_head_kv` and `n_ff` are those of block 0."""

    arch: str
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int
    n_embd_head_k: int
    n_embd_head_v: int


@functools.cache
def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """libggml-base and libllama with the signatures used here.

    Raises:
        LibraryError: llama-cpp-python is missing, does not load, or is not the patched one.
    """
    try:
        import llama_cpp
    except ImportError as e:
        raise LibraryError(f"llama-cpp-python is not installed ({e}): {REMEDY}") from e
    except (OSError, RuntimeError) as e:
        raise LibraryError(f"llama-cpp-python does not load ({e}): {REMEDY}") from e
    folder = Path(llama_cpp.__file__).parent / "lib"
    base = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    # A handle of our own: signatures set on llama_cpp's would be everybody's.
    llama = ctypes.CDLL(llama_cpp.llama_cpp._lib._name)
    try:
        recipe = llama.ziggurat_quant_types
        feed_back, descend = llama.ziggurat_round_feed_back, llama.ziggurat_round_descend
    except AttributeError:
        raise LibraryError(
            f"the installed llama-cpp-python {llama_cpp.__version__} is not the patched one: {REMEDY}"
        ) from None
    recipe.argtypes = [
        ctypes.POINTER(_ModelShape), ctypes.c_int32, ctypes.c_bool, ctypes.POINTER(_Tensor), ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_uint8), ctypes.c_char_p, ctypes.c_size_t,
    ]  # fmt: skip
    recipe.restype = ctypes.c_int32
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    feed_back.argtypes, feed_back.restype = [pointer, i64, *[pointer] * 7], None
    descend.argtypes, descend.restype = [pointer, i64, *[pointer] * 8], None
    base.ggml_quantize_init.argtypes = [ctypes.c_int]
    base.ggml_quantize_init.restype = None
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    base.ggml_validate_row_data.restype = ctypes.c_bool
    base.ggml_fp32_to_bf16_row_ref.argtypes = [pointer, pointer, i64]
    base.ggml_fp32_to_bf16_row_ref.restype = None
    base.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    base.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    base.ggml_type_name.argtypes = [ctypes.c_int]
    base.ggml_type_name.restype = ctypes.c_char_p
    base.ggml_row_size.argtypes = [ctypes.c_int, i64]
    base.ggml_row_size.restype = ctypes.c_size_t
    base.ggml_get_type_traits.argtypes = [ctypes.c_int]
    base.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    return base, llama


def row_bytes(type_id: int, columns: int) -> int:
    """Bytes of one row of `columns` values of ggml type `type_id`."""
    return int(libraries()[0].ggml_row_size(type_id, columns))


def block_columns(type_id: int) -> int:
    """Columns of a block of ggml type `type_id`, which have something in common: 256 in the K types."""
    return int(libraries()[0].ggml_get_type_traits(type_id).contents.blck_size)


def type_name(type_id: int) -> str:
    """Ggml's name of a type, for example "q4_K"."""
    return str(libraries()[0].ggml_type_name(type_id).decode())


def needs_importance(type_id: int) -> bool:
    """Whether ggml's quantizer of this type cannot run without importance data."""
    return bool(libraries()[0].ggml_quantize_requires_imatrix(type_id))


def prepare(type_id: int) -> None:
    """Build the lookup tables that quantizing to `type_id` needs: once, before several threads start."""
    libraries()[0].ggml_quantize_init(type_id)


def to_bf16(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 (nearest, ties to even), as bit patterns of the same shape."""
    out = np.empty(rows.shape, np.uint16)
    libraries()[0].ggml_fp32_to_bf16_row_ref(rows.ctypes.data, out.ctypes.data, rows.size)
    return out


def quantize_rows(
    type_id: int,
    rows: npt.NDArray[np.float32],
    out: npt.NDArray[np.uint8],
    importance: npt.NDArray[np.float32] | None = None,
) -> None:
    """Quantize contiguous float32 rows of shape [n, columns] into `out` of shape [n, row_bytes(type_id, columns)].

    `importance` of shape [columns] weighs the columns' errors (the diagonal of the importance matrix).

    Raises:
        QuantizeError: the result holds non-finite scales.
    """
    base = libraries()[0]
    weights = importance.ctypes.data if importance is not None else None
    n, columns = rows.shape
    written = base.ggml_quantize_chunk(type_id, rows.ctypes.data, out.ctypes.data, 0, n, columns, weights)
    assert written == out.nbytes
    if not base.ggml_validate_row_data(type_id, out.ctypes.data, out.nbytes):
        raise QuantizeError("quantizing it gives non-finite scales")


def dequantize_rows(type_id: int, packed: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.float32]:
    """What quantized rows stand for: ggml's own reading of them.

    Args:
        type_id: a quantized ggml type.
        packed: rows as `quantize_rows` makes them, any shape of n * row_bytes(type_id, columns) bytes.
        columns: values of a row.

    Returns:
        Shape [n, columns].
    """
    packed = np.ascontiguousarray(packed)
    rows, left = divmod(packed.nbytes, row_bytes(type_id, columns))
    assert left == 0
    out = np.empty((rows, columns), np.float32)
    traits = libraries()[0].ggml_get_type_traits(type_id).contents
    traits.to_float(packed.ctypes.data, out.ctypes.data, out.size)  # blocks are self-contained: rows need no loop
    return out


def recipe_types(
    shape: ModelShape,
    ftype: int,
    tensors: Sequence[tuple[str, int, tuple[int, ...]]],
    *,
    has_imatrix: bool,
) -> tuple[list[int], list[bool]]:
    """The ggml type that llama.cpp's quantizer gives each tensor for file type `ftype`.

    Args:
        shape: the model's dimensions.
        ftype: llama.cpp's file type number.
        tensors: name, source ggml type and shape (outermost dimension first) of every tensor of the model.
        has_imatrix: whether the quantizer will have an importance matrix; some recipes differ.

    Returns:
        Type per tensor, and per tensor whether it cannot do without an importance matrix.

    Raises:
        UnsupportedModelError: the library cannot say, with its reason.
    """
    n = len(tensors)
    table = (_Tensor * n)()
    for entry, (name, type_id, dims) in zip(table, tensors, strict=True):
        ne = list(reversed(dims)) + [1] * (4 - len(dims))
        entry.name, entry.type, entry.ne = name.encode(), type_id, (ctypes.c_int64 * 4)(*ne)
    desc = _ModelShape(
        shape.arch.encode(), shape.n_embd, shape.n_ff, shape.n_layer, shape.n_head, shape.n_head_kv, shape.n_expert,
        shape.n_embd_head_k, shape.n_embd_head_v,
    )  # fmt: skip
    types, needs = (ctypes.c_int32 * n)(), (ctypes.c_uint8 * n)()
    error = ctypes.create_string_buffer(512)
    quant_types = libraries()[1].ziggurat_quant_types
    with captured_log():  # it warns of every tensor whose shape its type does not fit
        status = quant_types(ctypes.byref(desc), ftype, has_imatrix, table, n, types, needs, error, len(error))
    if status != 0:
        raise UnsupportedModelError(
            f"llama.cpp has no quantization recipe here: {error.value.decode(errors='replace')}"
        )
    return list(types), [bool(x) for x in needs]


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """Keep llama.cpp's log off the terminal; the list collects its error lines."""
    import llama_cpp

    lines: list[str] = []

    def collect(level: int, text: bytes, _data: Any) -> None:
        line = text.decode(errors="replace").strip()
        logger.debug("%s", line)
        if level == _LOG_ERROR:
            lines.append(line)

    # whoever listens now does so again afterwards: in one process with an engine, the engine's relay
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(before, data)
