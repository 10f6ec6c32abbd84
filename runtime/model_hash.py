"""Tells one model file from another in a moment, however large it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from ziggurat.runtime.errors import ModelFileError
from ziggurat.runtime.gguf_file import GGUFFile, read_parts

_SAMPLE = 4096  # bytes


def model_hash(path: str | os.PathLike[str]) -> str:
    """Return a hash (SHA-256, 64 hexadecimal digits) of a GGUF file, or of all parts of a split one given its first.

    It covers the metadata, the tensor table and the file's length, and of each tensor its first, middle and last 4 KiB:
    a model that was trained, quantized or cut in another way has another one, a file with a single weight changed need
    not. Raises ModelFileError when the file cannot be read.
    """
    digest = hashlib.sha256()
    for part in read_parts(path):
        try:
            with open(part.path, "rb") as file:
                digest.update(part.n_bytes.to_bytes(8, "little"))
                digest.update(file.read(part.data_offset))
                for start, size in _samples(part):
                    file.seek(start)
                    digest.update(file.read(size))
        except OSError as error:
            raise ModelFileError(f"{part.path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def _samples(part: GGUFFile) -> Iterator[tuple[int, int]]:
    for tensor in part.tensors:
        size = min(_SAMPLE, tensor.n_bytes)
        for start in (0, (tensor.n_bytes - size) // 2, tensor.n_bytes - size):
            yield part.data_offset + tensor.offset + start, size
