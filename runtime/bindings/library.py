"""Finds and loads llama.cpp, and answers which one it is and what it runs on.

The only place that imports ``llama_cpp`` (an import contract in the tests says so). It is imported at the first use
and not with this module, so that commands which need no model start fast and ``doctor`` can say what is missing.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ziggurat.runtime.bindings.log import LogRelay
from ziggurat.runtime.errors import LibraryError

REMEDY = "install it with: pip install ./patches (in a Ziggurat checkout), or: pip install llama-cpp-python==0.3.36"
PATCHED_REMEDY = "for KV budgets install the patched library: pip install --force-reinstall ./patches"

log = LogRelay()
_lock = threading.Lock()
_DEVICE_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accelerator", 4: "meta"}


@dataclass(frozen=True)
class LibraryInfo:
    """Which llama.cpp is loaded.

    ``package_version`` is the Python package's, ``llama_version`` llama.cpp's own, ``ziggurat_version`` that of the
    patches, None with a stock library.
    """

    path: str
    package_version: str
    llama_version: str
    ziggurat_version: str | None

    @property
    def patched(self) -> bool:
        """Whether this library carries Ziggurat's patches."""
        return self.ziggurat_version is not None


@dataclass(frozen=True)
class Device:
    """A ggml device: ``kind`` is cpu, gpu, igpu, accelerator or meta; memory in bytes, 0 where it is not known."""

    name: str
    description: str
    kind: str
    memory_free: int
    memory_total: int


class _DeviceProps(ctypes.Structure):
    """``struct ggml_backend_dev_props`` of ggml-backend.h; llama_cpp binds none of ggml's backend functions."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ctypes.c_bool * 16),  # four in this version; room so that a longer struct writes into ours
    ]


@lru_cache(maxsize=1)
def _load() -> Any:
    try:
        from llama_cpp import llama_cpp as api
    except ModuleNotFoundError as error:
        raise LibraryError(f"the Python package {error.name} is not installed: {REMEDY}") from None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise LibraryError(f"the llama.cpp library cannot be loaded ({error}): {REMEDY}") from None
    # The callback object lives as long as the cache entry: the library keeps a bare pointer to it.
    api.ziggurat_log_callback = api.llama_log_callback(log.receive)
    api.llama_log_set(api.ziggurat_log_callback, None)
    api.llama_backend_init()
    if function(api, "ggml_backend_reg_count", ctypes.c_size_t)() == 0:
        # A build with one CPU library per instruction set finds them only when told where they lie.
        folder = str(api._base_path).encode()
        function(api, "ggml_backend_load_all_from_path", None, ctypes.c_char_p)(folder)
    return api


def function(api: Any, name: str, restype: Any, *argtypes: Any) -> Any:
    """Bind a C function that llama_cpp does not; libllama's handle finds those of libggml as well."""
    function = getattr(api._lib, name)
    function.restype = restype
    function.argtypes = list(argtypes)
    return function


def api() -> Any:
    """Return ``llama_cpp.llama_cpp``, initialized once: log relayed, backends loaded.

    Raises LibraryError when it is not installed or cannot be loaded. Safe from any thread.
    """
    with _lock:  # lru_cache alone would let two threads initialize side by side
        return _load()


def probe() -> LibraryInfo:
    """Say which library is loaded and whether it is the patched one. Raises LibraryError if none can be."""
    lib = api()
    try:
        package_version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        package_version = "unknown"
    patches: str | None = None
    if hasattr(lib._lib, "ziggurat_version"):
        patches = text(function(lib, "ziggurat_version", ctypes.c_char_p)())
    return LibraryInfo(str(lib._lib._name), package_version, text(lib.llama_version()), patches)


def devices() -> list[Device]:
    """List the devices of all loaded backends with their memory. Raises LibraryError without a library."""
    lib = api()
    get = function(lib, "ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    describe = function(lib, "ggml_backend_dev_get_props", None, ctypes.c_void_p, ctypes.POINTER(_DeviceProps))
    found = []
    for index in range(function(lib, "ggml_backend_dev_count", ctypes.c_size_t)()):
        props = _DeviceProps()
        describe(get(index), ctypes.byref(props))
        kind = _DEVICE_KINDS.get(props.type, "unknown")
        found.append(
            Device(text(props.name), text(props.description).strip(), kind, props.memory_free, props.memory_total)
        )
    return found


def system_info() -> dict[str, list[str]]:
    """Return the features compiled in and usable, by backend: ``{"CPU": ["AVX2", "FMA", …]}``."""
    features: dict[str, list[str]] = {}
    backend = "library"
    for part in text(api().llama_print_system_info()).split("|"):
        head, colon, tail = part.rpartition(" : ")
        if colon:
            backend = head.strip()
        name, equals, value = (tail if colon else part).partition("=")
        if equals and value.strip() != "0":
            features.setdefault(backend, []).append(name.strip() if value.strip() == "1" else part.strip())
    return features


def supports_gpu_offload() -> bool:
    """Whether the library was built with any GPU backend that is usable here.

    llama.cpp's own function of this name says yes to every build that could use machines over the network.
    """
    lib = api()
    get = function(lib, "ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    kind = function(lib, "ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    count = function(lib, "ggml_backend_dev_count", ctypes.c_size_t)()
    return any(_DEVICE_KINDS.get(kind(get(index))) in ("gpu", "igpu") for index in range(count))


def text(value: bytes | None) -> str:
    """Decode a C string, NULL as an empty one."""
    return (value or b"").decode("utf-8", errors="replace")
