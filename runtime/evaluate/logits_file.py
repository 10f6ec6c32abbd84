"""Log-probabilities of a reference on disk, so that a large model runs once and small ones are compared often.

Layout (little-endian): the magic ``ZIGLOGP1``, the header's length (uint32), the header (JSON), the chunks' tokens
(int32), then per chunk its rows and their CRC-32. A row is one scored position over the whole vocabulary in 16 bits:
float32 ``step``, ``top`` and ``target``, uint16 codes; a log-probability is top - step * code, so the likeliest token
is exact and others are off by at most 24 / 65535 / 2 nats; what is less likely than top - 24 is taken as that, and
counts as no probability mass. ``target`` is that of the text's own token, exact: perplexities lose nothing. Rows are
written and read in blocks, never held all at once. ``--kl-divergence-base`` files of llama.cpp are read as well.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziggurat.runtime.errors import InvalidRequestError, ZigguratError
from ziggurat.runtime.evaluate.chunks import Chunks, Step
from ziggurat.runtime.evaluate.scoring import Float32, row_blocks
from ziggurat.runtime.sizes import human_bytes

MAGIC = b"ZIGLOGP1"
LLAMA_CPP_MAGIC = b"_logits_"
RANGE = 24.0
_CODES = 65535
_MAX_HEADER = 2**20


@dataclass(frozen=True)
class Header:
    """What a logits file is of. ``vocabulary`` is a fingerprint of all token texts, None where it is not known."""

    model: str
    n_vocab: int
    n_ctx: int
    n_chunks: int
    vocabulary: str | None
    tokens_crc32: int

    @property
    def rows_per_chunk(self) -> int:
        """Scored positions of a chunk."""
        return self.n_ctx - 1 - self.n_ctx // 2


def _row_type(n_vocab: int) -> np.dtype[Any]:
    return np.dtype([("step", "<f4"), ("top", "<f4"), ("target", "<f4"), ("codes", "<u2", (n_vocab,))])


def encode_rows(log_probs: Float32, targets: NDArray[np.int32]) -> bytes:
    """Return rows of log-probabilities (rows, n_vocab) as they are stored, with the text's tokens, (rows,)."""
    rows = np.empty(len(log_probs), _row_type(log_probs.shape[1]))
    top = log_probs.max(axis=1)
    step = np.minimum(top - log_probs.min(axis=1), RANGE) / _CODES
    rows["top"], rows["step"] = top, step
    rows["target"] = log_probs[np.arange(len(targets)), targets]
    safe = np.where(step > 0, step, 1.0)[:, None].astype(np.float32)
    rows["codes"] = np.minimum(np.rint((top[:, None] - log_probs) / safe), _CODES).astype(np.uint16)
    return rows.tobytes()


class LogitsWriter:
    """Writes a logits file beside its name and renames it at the end; nothing stays under the name before.

    Raises InvalidRequestError when the folder has not enough room, ZigguratError when it cannot be written.
    """

    def __init__(self, path: Path, chunks: Chunks, model: str, vocabulary: str, n_vocab: int) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._chunks = chunks
        self._crc, self._rows = 0, 0
        tokens = chunks.tokens.astype("<i4").tobytes()
        header = Header(model, n_vocab, chunks.n_ctx, chunks.n_chunks, vocabulary, zlib.crc32(tokens))
        size = chunks.n_chunks * (chunks.rows_per_chunk * _row_type(n_vocab).itemsize + 4) + len(tokens)
        try:
            free = shutil.disk_usage(path.absolute().parent).free
            if size > free:
                raise InvalidRequestError(
                    f"--save-logits {path}: takes {human_bytes(size)}, {human_bytes(free)} are free; use fewer --chunks"
                )
            data = json.dumps(asdict(header)).encode()
            self._file = open(self._partial, "wb")
            self._file.write(MAGIC + struct.pack("<I", len(data)) + data + tokens)
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> ZigguratError:
        return ZigguratError(f"--save-logits {self._path}: cannot be written ({error.strerror or error})")

    def write(self, log_probs: Float32, targets: NDArray[np.int32]) -> None:
        """Append the rows that come next in the order of the chunks, with the tokens they predict."""
        per_chunk, start = self._chunks.rows_per_chunk, 0
        try:
            while start < len(log_probs):
                count = min(len(log_probs) - start, per_chunk - self._rows)
                data = encode_rows(log_probs[start : start + count], targets[start : start + count])
                self._file.write(data)
                self._crc = zlib.crc32(data, self._crc)
                self._rows, start = self._rows + count, start + count
                if self._rows == per_chunk:
                    self._file.write(struct.pack("<I", self._crc))
                    self._rows = self._crc = 0
        except OSError as error:
            raise self._failed(error) from None

    def __enter__(self) -> LogitsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                os.replace(self._partial, self._path)
        except OSError as failure:
            raise self._failed(failure) from None
        finally:
            self._partial.unlink(missing_ok=True)


class LogitsFile:
    """A logits file open for reading; close it (or leave its ``with`` block) when done.

    Raises InvalidRequestError when it is missing, damaged, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checked = -1
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InvalidRequestError(f"{path}: cannot be read ({error})") from None
        try:
            self.llama_cpp = self._map[:8] == LLAMA_CPP_MAGIC
            self.header = self._llama_cpp_header() if self.llama_cpp else self._own_header()
            self._check_size()
        except BaseException:
            self.close()
            raise

    def _damaged(self, what: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self.path}: {what}; write it again with --save-logits")

    def _own_header(self) -> Header:
        if self._map[:8] != MAGIC:
            raise InvalidRequestError(f"{self.path}: is no logits file (neither of --save-logits nor of llama.cpp)")
        try:
            (length,) = struct.unpack_from("<I", self._map, 8)
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = Header(**json.loads(self._map[12 : 12 + length]))
            for name, least in (("n_vocab", 1), ("n_ctx", 4), ("n_chunks", 1), ("tokens_crc32", 0)):
                value = getattr(header, name)
                if not isinstance(value, int) or not least <= value < 2**32:
                    raise ValueError(f"{name} {value}")
        except (struct.error, ValueError, TypeError) as error:
            raise self._damaged(f"its header is damaged ({error})") from None
        self._start = 12 + length
        self._type, self._trailer = _row_type(header.n_vocab), 4
        return header

    def _llama_cpp_header(self) -> Header:
        if len(self._map) < 20:
            raise self._damaged("its header is cut off")
        n_ctx, n_vocab, n_chunks = struct.unpack_from("<Iii", self._map, 8)
        if not (4 <= n_ctx < 2**31 and n_vocab > 0 and n_chunks > 0):
            raise self._damaged("its header is damaged")
        self._start, self._trailer = 20, 0
        padded = 2 * ((n_vocab + 1) // 2)
        self._type = np.dtype([("step", "<f4"), ("top", "<f4"), ("codes", "<u2", (padded,))])
        crc = zlib.crc32(self._map[20 : 20 + 4 * n_ctx * n_chunks])
        return Header("llama.cpp", n_vocab, n_ctx, n_chunks, None, crc)

    def _check_size(self) -> None:
        header = self.header
        self._rows_at = self._start + 4 * header.n_ctx * header.n_chunks
        self._chunk_bytes = header.rows_per_chunk * self._type.itemsize + self._trailer
        expected = self._rows_at + header.n_chunks * self._chunk_bytes
        if len(self._map) != expected:
            raise self._damaged(f"has {len(self._map)} bytes instead of {expected}: it is cut off or damaged")
        if zlib.crc32(self._map[self._start : self._rows_at]) != header.tokens_crc32:
            raise self._damaged("its tokens are damaged")

    @property
    def floor(self) -> float:
        """Log-probabilities down to here may have been cut off, so that they carry no mass in a divergence."""
        return -16.0 if self.llama_cpp else -0.999 * RANGE

    def check(self, chunks: Chunks, vocabulary: str, n_vocab: int) -> None:
        """Raise InvalidRequestError unless this is of the same vocabulary, context and text; more chunks are fine."""
        header = self.header
        if header.n_vocab != n_vocab:
            raise InvalidRequestError(f"{self.path}: is of a vocabulary of {header.n_vocab} tokens, not {n_vocab}")
        if header.vocabulary not in (None, vocabulary):
            raise InvalidRequestError(f"{self.path}: is of another vocabulary (of the model {header.model})")
        if header.n_ctx != chunks.n_ctx:
            raise InvalidRequestError(
                f"{self.path}: has chunks of {header.n_ctx} tokens, not {chunks.n_ctx}; use --ctx {header.n_ctx}"
            )
        if header.n_chunks < chunks.n_chunks:
            raise InvalidRequestError(
                f"{self.path}: has {header.n_chunks} chunks, not {chunks.n_chunks}; use --chunks {header.n_chunks}"
            )
        stored = np.frombuffer(self._map, "<i4", chunks.tokens.size, self._start).reshape(chunks.tokens.shape)
        different = np.flatnonzero((stored != chunks.tokens).any(axis=1))
        if len(different):
            raise InvalidRequestError(f"{self.path}: is of another text (chunk {different[0]} differs)")

    def rows(self, chunks: Chunks, step: Step, part: slice) -> Float32:
        """Return the log-probabilities of some of a step's rows, shape (rows, n_vocab)."""
        start, end = chunks.scored(step)
        per_step = end - start
        pieces, targets = [], []
        row = part.start
        while row < part.stop:
            chunk, offset = step.chunk_start + row // per_step, row % per_step
            count = min(part.stop - row, per_step - offset)
            at = self._rows_at + chunk * self._chunk_bytes
            at += (start - chunks.first + offset) * self._type.itemsize
            stored = np.frombuffer(self._map, self._type, count, at)
            pieces.append(self._decode(stored))
            if not self.llama_cpp:
                targets.append(stored["target"])
            row += count
        result = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if not self.llama_cpp:
            exact = np.concatenate(targets)
            result[np.arange(len(result)), chunks.targets(step)[part]] = exact
        return result

    def _decode(self, rows: Any) -> Float32:
        step, top = rows["step"][:, None], rows["top"][:, None]
        codes = rows["codes"][:, : self.header.n_vocab].astype(np.float32)
        # llama.cpp counts up from the least likely one
        result: Float32 = top + step * codes if self.llama_cpp else top - step * codes
        return result

    def verify(self, chunk: int) -> None:
        """Raise InvalidRequestError when the rows of a chunk are damaged; llama.cpp's files carry no checksum."""
        if self.llama_cpp or chunk <= self._checked:
            return
        at = self._rows_at + chunk * self._chunk_bytes
        crc = 0
        for block in row_blocks(self.header.rows_per_chunk, self.header.n_vocab):
            size = self._type.itemsize
            crc = zlib.crc32(self._map[at + block.start * size : at + block.stop * size], crc)
        (stored,) = struct.unpack_from("<I", self._map, at + self._chunk_bytes - 4)
        if crc != stored:
            raise self._damaged(f"the rows of chunk {chunk} are damaged")
        self._checked = chunk

    def close(self) -> None:
        """Unmap the file, or leave that to the last array made of it. Idempotent."""
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> LogitsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
