"""The only room that touches llama.cpp's C API: typed, documented, and safe to call from Python.

``library`` finds and probes it, ``model`` and ``vocab`` hold weights and tokens, ``context`` and ``batch`` decode,
``sampler`` chooses, ``log`` turns its log into reasons, ``abort`` stops it. Everything that would make the library
abort the process (a token id out of range, logits never computed, an oversized batch) is an exception here.
"""

from ziggurat.runtime.bindings.abort import AbortFlag
from ziggurat.runtime.bindings.batch import Batch
from ziggurat.runtime.bindings.context import CACHE_TYPES, FLASH_ATTENTION, Context, ContextSettings
from ziggurat.runtime.bindings.library import Device, LibraryInfo, devices, probe, supports_gpu_offload, system_info
from ziggurat.runtime.bindings.model import Model
from ziggurat.runtime.bindings.sampler import SamplerChain
from ziggurat.runtime.bindings.vocab import Vocab

__all__ = [
    "CACHE_TYPES",
    "FLASH_ATTENTION",
    "AbortFlag",
    "Batch",
    "Context",
    "ContextSettings",
    "Device",
    "LibraryInfo",
    "Model",
    "SamplerChain",
    "Vocab",
    "devices",
    "probe",
    "supports_gpu_offload",
    "system_info",
]
