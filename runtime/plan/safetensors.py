"""Reads the tensor tables of a checkpoint's safetensors files: names and shapes, never weights.

Format: https://huggingface.co/docs/safetensors. An eight-byte length, then a JSON object.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from ziggurat.runtime.errors import ModelFileError

# as in the format's reference implementation
_MAX_HEADER = 100_000_000

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(folder: Path) -> Shapes | None:
    """Return the shape of every tensor in the folder's safetensors files, outermost dimension first.

    None when there is none of them, or not all parts that the folder's index names: a checkpoint that is not
    downloaded yet. Raises ModelFileError for files that are not safetensors.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = set(_object(index, index.read_bytes()).get("weight_map", {}).values())
        files = [folder / str(name) for name in sorted(parts)]
    else:
        files = [folder / "model.safetensors"]
    if not files or not all(file.is_file() for file in files):
        return None
    shapes: Shapes = {}
    for file in files:
        for name, entry in _header(file).items():
            if name != "__metadata__":
                try:
                    shapes[name] = tuple(int(extent) for extent in entry["shape"])
                except (KeyError, TypeError, ValueError):
                    raise ModelFileError(f"{file}: tensor {name} has no shape; the file is damaged") from None
    return shapes


def _header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise ModelFileError(f"{path}: is not a safetensors file; download it again")
        return _object(path, file.read(length))


def _object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path}: holds no JSON object where one belongs; download it again")
    return found
