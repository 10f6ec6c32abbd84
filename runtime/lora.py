"""LoRA adapters as a person names them, and whether a file is one that the model can take.

An adapter is a GGUF file that holds, for each weight W it changes, two thin matrices A and B: the model then computes
with W + scale * (alpha / rank) * B A (Hu et al., arXiv 2106.09685). llama.cpp's ``convert_lora_to_gguf.py`` makes them.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ziggurat.runtime.errors import AdapterError, InvalidRequestError, ModelFileError, UnsupportedError
from ziggurat.runtime.gguf_file import GGUFFile, TensorInfo, read_gguf
from ziggurat.runtime.model_hash import model_hash

if TYPE_CHECKING:
    from ziggurat.runtime.bindings import Model

_logger = logging.getLogger(__name__)

_ALPHA = "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"
_EMBEDDING = "token_embd.weight"
_FLOAT32 = 6  # the value type of GGUF
#: What llama.cpp's converter writes; products with some of the other types end the process.
_TYPES = ("F32", "F16", "BF16", "Q8_0")
#: Weights that come with a factor of their own, beside which the library aborts on an adapter.
_UNADAPTABLE = "NVFP4"


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter to load: its file, and what its change of the weights is multiplied by (0 leaves it out)."""

    path: str | os.PathLike[str]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(ctypes.c_float(self.scale).value):
            raise InvalidRequestError(f"{os.fspath(self.path)}: the scale of an adapter cannot be {self.scale}")

    @classmethod
    def parse(cls, text: str) -> LoraAdapter:
        """Read ``FILE`` or ``FILE=SCALE``; a file whose name is all of the text comes first.

        Raises InvalidRequestError for a scale that is no number.
        """
        file, equals, number = text.rpartition("=")
        if not equals or Path(text).exists():
            return cls(text)
        try:
            scale = float(number)
        except ValueError:
            raise InvalidRequestError(f"--lora {text}: the scale {number!r} is not a number") from None
        if not file:
            raise InvalidRequestError(f"--lora {text}: there is no file before the scale")
        return cls(file, scale)


def read_adapters(adapters: Sequence[LoraAdapter], model: GGUFFile) -> tuple[GGUFFile, ...]:
    """Read adapters' tensor tables and check that they are such as the library can apply to a model.

    What an adapter has of norms is not applied, which is logged as a warning. Raises ModelFileError for what is no
    adapter, UnsupportedError for kinds that the library does not apply, AdapterError for one of another model.
    """
    return tuple(_read(adapter.path, model) for adapter in adapters)


def add_adapters(model: Model, adapters: Sequence[LoraAdapter]) -> str:
    """Load adapters that were checked, and return how to name them after the model; empty for none.

    Raises AdapterError with the library's reason when it refuses one, ModelFileError when it is gone.
    """
    for adapter in adapters:
        model.add_lora(adapter.path, adapter.scale, model_hash(adapter.path))
    return "".join(f" + {Path(lora.path).name} x {lora.scale:g}" for lora in model.loras)


def _read(path: str | os.PathLike[str], model: GGUFFile) -> GGUFFile:
    file = read_gguf(path)
    if file.text("general.type") != "adapter":
        raise ModelFileError(f"{path}: is not an adapter (its general.type is {file.scalar('general.type')!r})")
    if file.text("adapter.type") != "lora":
        raise ModelFileError(f"{path}: is not a LoRA adapter (its adapter.type is {file.scalar('adapter.type')!r})")
    if file.architecture != model.architecture:
        raise AdapterError(f"{path}: is an adapter of a {file.architecture} model, and this is a {model.architecture}")
    if (file.integer("split.count") or 1) > 1:
        raise UnsupportedError(f"{path}: the library reads adapters of one file, this one is split")
    if _INVOCATION in file.fields:
        raise UnsupportedError(
            f"{path}: is an activated LoRA, to be applied from its invocation tokens on; only those that are applied"
            " to every token are supported"
        )
    alpha = file.fields.get(_ALPHA, 0.0)
    if file.kinds.get(_ALPHA, _FLOAT32) != _FLOAT32 or not isinstance(alpha, float) or not math.isfinite(alpha):
        raise ModelFileError(f"{path}: {_ALPHA} is not a number of 32 bits; the adapter is damaged")
    _check_tensors(file, model)
    return file


def _check_tensors(file: GGUFFile, model: GGUFFile) -> None:
    """Refuse what the library would not survive or would leave out without a word; the rest it refuses itself."""
    weights = {tensor.name: tensor for tensor in model.tensors}
    norms = [tensor.name for tensor in file.tensors if tensor.name.endswith("_norm.weight")]
    if norms:
        _logger.warning("%s: %d norms of the adapter are not applied, %s among them", file.path, len(norms), norms[0])
    if not any(tensor.name.endswith(".lora_a") for tensor in file.tensors):
        raise ModelFileError(f"{file.path}: has no weights of an adapter")
    for tensor in file.tensors:
        if tensor.type not in _TYPES and tensor.name not in norms:
            raise UnsupportedError(f"{file.path}: {tensor.name} is {tensor.type}; adapters are {', '.join(_TYPES)}")
    for name, a, b in _pairs(file):
        weight = weights.get(name)
        if weight is None:
            continue  # the library says it
        if name == _EMBEDDING and "output.weight" not in weights:
            raise UnsupportedError(
                f"{file.path}: changes the embedding, which is the output matrix of this model as well; the library"
                " cannot apply it to both"
            )
        if weight.type == _UNADAPTABLE:
            raise UnsupportedError(f"{file.path}: the library does not adapt {weight.type} weights such as {name}")
        rank = a.shape[0] if name == _EMBEDDING else (*a.shape, 1)[1]
        if rank != b.shape[0] or not rank or {_outer(a), _outer(b)} != {_outer(weight)}:
            raise AdapterError(f"{file.path}: {name} is adapted by {a.shape} and {b.shape}, which do not go together")


def _pairs(file: GGUFFile) -> Iterator[tuple[str, TensorInfo, TensorInfo]]:
    tensors = {tensor.name: tensor for tensor in file.tensors}
    for name, a in tensors.items():
        weight = name.removesuffix(".lora_a")
        b = tensors.get(f"{weight}.lora_b")
        if weight != name and b is not None:
            yield weight, a, b


def _outer(tensor: TensorInfo) -> tuple[int, ...]:
    """Return the dimensions after the matrix, of which experts have one."""
    return tuple((*tensor.shape, 1, 1, 1)[2:4])
