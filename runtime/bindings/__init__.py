"""The only room that touches llama.cpp's C API: typed, documented, and safe to call from Python.

``library`` finds and probes it, ``model`` and ``vocab`` hold weights and tokens, ``lora`` adapts them, ``context`` and
``batch`` decode, ``kv`` bounds the rows that stay, ``kv_state`` saves them, ``embedding`` makes vectors of texts,
``sampler`` chooses a token, from ``candidates`` where a ``grammar`` bounds them, ``memory`` and ``simulation`` say
what is or would be allocated, ``log`` turns its log into reasons, ``abort`` stops it. Everything that would make the
library abort the process (a token id out of range, logits never computed, an oversized batch) is an exception here.
"""

from ziggurat.runtime.bindings.abort import AbortFlag
from ziggurat.runtime.bindings.batch import Batch
from ziggurat.runtime.bindings.candidates import Candidates
from ziggurat.runtime.bindings.context import Context
from ziggurat.runtime.bindings.context_settings import CACHE_TYPES, FLASH_ATTENTION, POOLINGS, ContextSettings
from ziggurat.runtime.bindings.grammar import GrammarSampler
from ziggurat.runtime.bindings.kv_settings import KVLayout, KVSettings, Progress
from ziggurat.runtime.bindings.library import Device, LibraryInfo, devices, probe, supports_gpu_offload, system_info
from ziggurat.runtime.bindings.memory import BufferMemory, can_measure, measure
from ziggurat.runtime.bindings.model import Model
from ziggurat.runtime.bindings.sampler import SamplerChain
from ziggurat.runtime.bindings.simulation import Simulation
from ziggurat.runtime.bindings.vocab import Vocab

__all__ = [
    "CACHE_TYPES",
    "FLASH_ATTENTION",
    "POOLINGS",
    "AbortFlag",
    "Batch",
    "BufferMemory",
    "Candidates",
    "Context",
    "ContextSettings",
    "Device",
    "GrammarSampler",
    "KVLayout",
    "KVSettings",
    "LibraryInfo",
    "Model",
    "Progress",
    "SamplerChain",
    "Simulation",
    "Vocab",
    "can_measure",
    "devices",
    "measure",
    "probe",
    "supports_gpu_offload",
    "system_info",
]
