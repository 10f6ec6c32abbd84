"""The C view of the memory breakdown: what it does with wrong arguments, and that its rows are all there."""

import ctypes

import llama_cpp
import pytest

from helpers import hollow_models


class Row(ctypes.Structure):
    _fields_ = [("device", ctypes.c_char * 64), ("buffer", ctypes.c_char * 64)] + [
        (name, ctypes.c_uint64) for name in ("model", "context", "compute")
    ]


def breakdown(context, rows, n_rows, error=None, error_size=0):
    function = llama_cpp.llama_cpp._lib.ziggurat_memory_breakdown
    function.restype = ctypes.c_int32
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    return function(context, rows, n_rows, error, error_size)


@pytest.fixture
def context(tmp_path):
    path = hollow_models.write_model(tmp_path / "m.gguf", hollow_models.Dims(type="Q4_0"))
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, llama_cpp.LLAMA_LOAD_MODE_NONE, 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx = 512
    context = llama_cpp.llama_init_from_model(model, context_params)
    assert context
    yield context
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    llama_cpp.llama_log_set(before, data)


def test_rows_are_counted_whatever_room_there_is(context):
    count = breakdown(context, None, 0)
    rows = (Row * (count + 1))()
    assert breakdown(context, rows, count + 1) == count
    names = [(row.device, row.buffer) for row in rows[:count]]
    assert names == sorted(names) and (b"CPU", b"CPU") in names
    assert rows[count].device == b""
    one = (Row * 1)()
    assert breakdown(context, one, 1) == count
    assert bytes(one[0]) == bytes(rows[0])
    assert sum(row.context for row in rows) == 512 * 4 * 2 * 2 * 64 * 2
    assert all(row.device == b"CPU" for row in rows[:count])


def test_null_pointers_are_refused(context):
    error = ctypes.create_string_buffer(8)
    assert breakdown(None, None, 0, error, 8) == -1
    assert error.value == b"a requi"
    assert breakdown(None, None, 0) == -1
    assert breakdown(context, None, 1) == -1
