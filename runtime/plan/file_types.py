"""How many bits a weight takes in a file of some type, by the part it plays: for models that are not converted yet.

llama.cpp's recipes (``src/llama-quant.cpp``) mix types: matrices get the base type, the output matrix Q6_K, and in the
K types a part of the value and down projections a better one (half of the layers for *_m, the first eighth for *_s).
Vectors stay F32. Against conversions of the tested families (tiny ones, eight types each) sums are -4.2 to +2.0 % off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ziggurat.runtime.errors import UnsupportedError

Role = Literal["embedding", "output", "matrix", "better", "fused", "vector"]


@dataclass(frozen=True)
class FileType:
    """ggml types of a file type's parts; ``share`` is the part of value and down projections that gets ``better``."""

    base: str
    output: str
    better: str
    fused: str
    share: float = 0.0


def _plain(base: str, output: str = "Q6_K") -> FileType:
    return FileType(base, output, base, base)


FILE_TYPES = {
    "f32": _plain("F32", "F32"),
    "f16": _plain("F16", "F16"),
    "bf16": _plain("BF16", "BF16"),
    "q8_0": _plain("Q8_0", "Q8_0"),
    "q4_0": _plain("Q4_0"),
    "q5_0": _plain("Q5_0"),
    "iq4_xs": FileType("IQ4_XS", "Q6_K", "Q5_K", "IQ4_XS", 1 / 8),
    "q4_k_s": FileType("Q4_K", "Q6_K", "Q5_K", "Q4_K", 1 / 8),
    "q4_k_m": FileType("Q4_K", "Q6_K", "Q6_K", "Q5_K", 1 / 2),
    "q5_k_s": FileType("Q5_K", "Q6_K", "Q5_K", "Q5_K"),
    "q5_k_m": FileType("Q5_K", "Q6_K", "Q6_K", "Q6_K", 1 / 2),
    "q6_k": _plain("Q6_K"),
}


def file_type(name: str) -> FileType:
    """Return a file type by name. Raises UnsupportedError for those whose size is not known here."""
    try:
        return FILE_TYPES[name.lower()]
    except KeyError:
        raise UnsupportedError(
            f"the size of a {name} file cannot be estimated; take one of {', '.join(FILE_TYPES)}, or convert the model"
        ) from None


def bits_per_weight(kind: FileType, role: Role) -> float:
    """Return the mean bits per weight of a part of the model."""
    if role == "vector":
        return 32.0
    if role == "better":
        return kind.share * _bits(kind.better) + (1 - kind.share) * _bits(kind.base)
    return _bits({"embedding": kind.base, "output": kind.output, "matrix": kind.base, "fused": kind.fused}[role])


def _bits(name: str) -> float:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    bits: float = block_bytes * 8 / block
    return bits
