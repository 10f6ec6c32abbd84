"""LoRA adapters: loaded into a model, attached to a context.

A model owns its adapters and frees them when it is closed, as llama.h says of those that nobody frees before.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ziggurat.runtime.bindings import library
from ziggurat.runtime.bindings.log import reason
from ziggurat.runtime.errors import AdapterError


@dataclass(frozen=True)
class Lora:
    """An adapter of a model, valid as long as that is open.

    What it adds to the weights is multiplied by ``scale``; with 0 the library leaves it out. ``name`` tells it from
    other adapters wherever their files lie: its ``model_hash``.
    """

    path: str
    scale: float
    name: str
    handle: Any


def load(model: Any, path: str | os.PathLike[str]) -> Any:
    """Load an adapter into the memory that the weights it changes are in; ``model`` and what is returned are handles.

    Raises AdapterError with the library's reason when it refuses it.
    """
    with library.log.capture() as lines:
        handle = library.api().llama_adapter_lora_init(model, os.fsencode(path))
    if not handle:
        why = reason(lines, "no reason was given; see --verbose").removeprefix("failed to apply lora adapter: ")
        raise AdapterError(f"{os.fspath(path)}: {why}")
    return handle


def attach(context: Any, loras: Sequence[Lora]) -> None:
    """Let a context compute with these adapters and no others; ``context`` is a handle."""
    if not loras:
        return
    lib = library.api()
    handles = (lib.llama_adapter_lora_p_ctypes * len(loras))(*(lora.handle for lora in loras))
    scales = (ctypes.c_float * len(loras))(*(lora.scale for lora in loras))
    lib.llama_set_adapters_lora(context, handles, len(loras), scales)
