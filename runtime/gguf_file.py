"""Reads the metadata and the tensor table of a GGUF file, never its weights.

The ``gguf`` package's own ``GGUFReader`` makes NumPy objects of every array element, which takes seconds for a 128k
vocabulary; here arrays of strings are skipped by their lengths and decoded only when asked for. Names, type ids and
block sizes are the ``gguf`` package's. Format: llama.cpp, ``docs/gguf.md``.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ziggurat.runtime.errors import ModelFileError

Scalar = int | float | bool | str

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# gguf value type -> struct code; strings and arrays are variable
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DEFAULT_ALIGNMENT = 32
_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table: ``shape`` innermost first as in ggml, ``type`` a ggml type name such as ``Q4_K``.

    ``offset`` is that of its bytes in the data section of its file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    n_elements: int
    n_bytes: int
    offset: int


@dataclass(frozen=True)
class ArrayField:
    """An array in the metadata whose elements have not been decoded: element type, length, where they lie."""

    element_type: int
    length: int
    offset: int


@dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensor table of one GGUF file, or of all parts of a split one.

    ``n_bytes`` is the size on disk, all parts together. ``data_offset`` is where the data section of the first begins.
    ``kinds`` are the fields' value types as the format numbers them (6 is a float of 32 bits).
    """

    path: Path
    version: int
    fields: Mapping[str, Scalar | ArrayField]
    tensors: tuple[TensorInfo, ...]
    n_bytes: int
    data_offset: int
    kinds: Mapping[str, int] = field(default_factory=dict)

    def scalar(self, key: str) -> Scalar | None:
        """Return a scalar field, or None if it is absent or an array."""
        value = self.fields.get(key)
        return None if isinstance(value, ArrayField) else value

    def scalars(self) -> dict[str, Scalar]:
        """Return all scalar fields."""
        return {key: value for key, value in self.fields.items() if not isinstance(value, ArrayField)}

    def text(self, key: str) -> str | None:
        """Return a string field, or None."""
        value = self.fields.get(key)
        return value if isinstance(value, str) else None

    def integer(self, key: str) -> int | None:
        """Return an integer field, or None."""
        value = self.fields.get(key)
        return int(value) if isinstance(value, int) else None

    def array(self, key: str) -> list[Scalar] | None:
        """Decode an array field of scalars or strings; None if it is absent or no array.

        Raises ModelFileError for nested arrays and for a file that changed since it was opened.
        """
        found = self.fields.get(key)
        if not isinstance(found, ArrayField):
            return None
        with _mapped(self.path) as data:
            cursor = _Cursor(data, self.path, found.offset)
            if found.element_type == _ARRAY:
                raise ModelFileError(f"{self.path}: {key} is an array of arrays, which no known model has")
            if found.element_type == _STRING:
                return [cursor.string() for _ in range(found.length)]
            return list(cursor.numbers(_SCALARS[found.element_type], found.length))

    @property
    def architecture(self) -> str:
        """``general.architecture``, or an empty string."""
        return self.text("general.architecture") or ""

    @property
    def n_params(self) -> int:
        """Number of weights in all tensors."""
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors, without metadata and padding."""
        return sum(tensor.n_bytes for tensor in self.tensors)


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read metadata and tensor table of ``path``; for the first part of a split model, of all its parts.

    Raises ModelFileError when the file is missing, a folder, unreadable, empty, not a GGUF, of an unknown version,
    damaged, or shorter than its tensor table says.
    """
    parts = read_parts(path)
    first = parts[0]
    return dataclasses.replace(
        first,
        tensors=tuple(tensor for part in parts for tensor in part.tensors),
        n_bytes=sum(part.n_bytes for part in parts),
    )


def read_parts(path: str | os.PathLike[str]) -> tuple[GGUFFile, ...]:
    """Read the files of a split model one by one, of any other the only one. Raises as ``read_gguf`` does."""
    first = _read_one(Path(path))
    n_parts = first.integer("split.count") or 1
    return (first, *map(_read_one, _other_parts(first.path, n_parts) if n_parts > 1 else ()))


def _other_parts(path: Path, n_parts: int) -> Iterator[Path]:
    match = _SPLIT_NAME.match(path.name)
    if match is None or int(match["count"]) != n_parts or int(match["number"]) != 1:
        raise ModelFileError(
            f"{path}: part of a model split into {n_parts} files; give its first part, *-00001-of-{n_parts:05d}.gguf"
        )
    for number in range(2, n_parts + 1):
        yield path.with_name(f"{match['stem']}-{number:05d}-of-{n_parts:05d}.gguf")


def _mapped(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ModelFileError(
            f"{path}: is a folder; give a .gguf file (convert makes one from a model folder)"
        ) from None
    except ValueError:  # an empty file cannot be mapped
        raise ModelFileError(f"{path}: is empty, not a GGUF file") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_one(path: Path) -> GGUFFile:
    with _mapped(path) as data:
        if data[:4] != _MAGIC:
            raise ModelFileError(f"{path}: is not a GGUF file (it begins with {data[:4]!r})")
        cursor = _Cursor(data, path, 4)
        version = cursor.number("I")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0
            why = "written for a big-endian machine" if swapped else f"GGUF version {version}"
            raise ModelFileError(f"{path}: {why}, this build reads versions 2 and 3, little-endian")
        n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
        fields: dict[str, Scalar | ArrayField] = {}
        kinds: dict[str, int] = {}
        for _ in range(n_fields):
            key = cursor.string()
            if key in fields:
                raise ModelFileError(f"{path}: metadata key {key} appears twice; the file is damaged")
            kinds[key] = cursor.number("I")
            fields[key] = cursor.value(kinds[key])
        rows = [_tensor_row(cursor) for _ in range(n_tensors)]
        alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelFileError(f"{path}: general.alignment is not a power of two; the file is damaged")
        start = -(-cursor.offset // alignment) * alignment
        end = max((start + tensor.offset + tensor.n_bytes for tensor in rows), default=cursor.offset)
        if end > len(data):
            raise ModelFileError(
                f"{path}: truncated, its tensors need {end} bytes and it has {len(data)}; download or convert it again"
            )
        return GGUFFile(path, version, fields, tuple(rows), len(data), start, kinds)


def _tensor_row(cursor: _Cursor) -> TensorInfo:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string()
    n_dims = cursor.number("I")
    if n_dims > 4:
        raise ModelFileError(f"{cursor.path}: tensor {name!r} has {n_dims} dimensions; the file is damaged")
    shape = cursor.numbers("Q", n_dims)
    type_id, offset = cursor.number("I"), cursor.number("Q")
    try:
        ggml_type = GGMLQuantizationType(type_id)
    except ValueError:
        raise ModelFileError(
            f"{cursor.path}: tensor {name!r} has the unknown type {type_id}; update the gguf package"
        ) from None
    n_elements = 1
    for extent in shape:
        n_elements *= extent
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape and shape[0] % block:
        raise ModelFileError(
            f"{cursor.path}: tensor {name!r} has rows of {shape[0]}, no multiple of {ggml_type.name}'s {block}"
        )
    return TensorInfo(name, shape, ggml_type.name, n_elements, n_elements // block * block_bytes, offset)


class _Cursor:
    """A reading position in a mapped file; running past the end is a ModelFileError."""

    def __init__(self, data: mmap.mmap, path: Path, offset: int) -> None:
        self._data = data
        self.path = path
        self.offset = offset

    def _advance(self, n_bytes: int) -> int:
        start = self.offset
        if n_bytes > len(self._data) - start:
            raise ModelFileError(f"{self.path}: truncated inside the metadata; download or convert it again")
        self.offset = start + n_bytes
        return start

    def numbers(self, code: str, count: int) -> tuple[int, ...]:
        start = self._advance(struct.calcsize("<" + code) * count)
        return struct.unpack_from(f"<{count}{code}", self._data, start)

    def number(self, code: str) -> int:
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        length = self.number("Q")
        start = self._advance(length)
        return self._data[start : start + length].decode("utf-8", errors="replace")

    def value(self, value_type: int) -> Scalar | ArrayField:
        if value_type == _STRING:
            return self.string()
        if value_type == _ARRAY:
            element_type, length = self.number("I"), self.number("Q")
            field = ArrayField(element_type, length, self.offset)
            self._skip_array(element_type, length, depth=0)
            return field
        if value_type not in _SCALARS:
            raise ModelFileError(f"{self.path}: unknown metadata type {value_type}; the file is damaged or too new")
        return self.number(_SCALARS[value_type])

    def _skip_array(self, element_type: int, length: int, depth: int) -> None:
        if element_type in _SCALARS:
            self._advance(struct.calcsize("<" + _SCALARS[element_type]) * length)
        elif element_type == _STRING:
            # one unpack per string, inlined: this loop sees a quarter of a million merges
            data, offset, unpack, last = self._data, self.offset, struct.Struct("<Q").unpack_from, len(self._data) - 8
            for _ in range(length):
                if offset > last:
                    offset = len(data) + 1
                    break
                offset += 8 + unpack(data, offset)[0]
            self._advance(offset - self.offset)
        elif element_type == _ARRAY and depth < 4:
            for _ in range(length):
                self._skip_array(self.number("I"), self.number("Q"), depth + 1)
        else:
            raise ModelFileError(f"{self.path}: unknown array type {element_type}; the file is damaged or too new")
