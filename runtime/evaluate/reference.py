"""What a model is compared with: another model computed beside it, or a logits file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from ziggurat.runtime.bindings import Model, Vocab
from ziggurat.runtime.errors import InvalidRequestError, ZigguratError
from ziggurat.runtime.evaluate.chunks import Chunks, Step
from ziggurat.runtime.evaluate.decoder import ChunkDecoder, DecodeSettings, Logits
from ziggurat.runtime.evaluate.logits_file import LLAMA_CPP_MAGIC, MAGIC, LogitsFile
from ziggurat.runtime.evaluate.monitor import Monitor
from ziggurat.runtime.evaluate.scoring import Float32, log_softmax


class Reference(Protocol):
    """Gives the reference's log-probabilities step by step. What is at or below ``floor`` counts as no mass."""

    floor: float

    def begin(self, step: Step) -> None:
        """Make the rows of a step ready. Steps come in order."""
        ...

    def rows(self, part: slice) -> Float32:
        """Return the log-probabilities (rows, n_vocab) of some rows of the step. Called from several threads."""
        ...


class ModelReference:
    """A model in memory beside the one that is evaluated."""

    def __init__(self, decoder: ChunkDecoder) -> None:
        self.floor = -math.inf
        self._decoder = decoder
        self._logits: Logits | None = None

    def begin(self, step: Step) -> None:
        """Compute the step."""
        self._logits = self._decoder.decode(step)

    def rows(self, part: slice) -> Float32:
        """Return the softmax of the logits just computed."""
        assert self._logits is not None
        return log_softmax(self._logits[part])


class FileReference:
    """A logits file that was checked against the chunks."""

    def __init__(self, file: LogitsFile, chunks: Chunks) -> None:
        self.floor = file.floor
        self._file, self._chunks = file, chunks
        self._step = Step(0, 0, 0, 0)

    def begin(self, step: Step) -> None:
        """Verify the chunks of the step."""
        for chunk in range(step.chunk_start, step.chunk_end):
            self._file.verify(chunk)
        self._step = step

    def rows(self, part: slice) -> Float32:
        """Read rows."""
        return self._file.rows(self._chunks, self._step, part)


@contextlib.contextmanager
def open_reference(
    path: Path,
    vocab: Vocab,
    chunks: Chunks,
    settings: DecodeSettings,
    monitor: Monitor,
    *,
    gpu_layers: int | None = None,
) -> Iterator[Reference]:
    """Open a reference for a model with ``vocab``: a logits file, or a GGUF model (a folder goes through ``as_gguf``).

    Raises InvalidRequestError when vocabulary, text or chunk length differ, and what loading raises.
    """
    if is_logits_file(path):
        with LogitsFile(path) as file:
            file.check(chunks, fingerprint(vocab), vocab.n_tokens)
            yield FileReference(file, chunks)
        return
    with Model(path, gpu_layers=gpu_layers, progress=monitor.loading) as model:
        check_same_vocabulary(vocab, model.vocab, str(path))
        with ChunkDecoder(model, chunks, settings, monitor) as decoder:
            yield ModelReference(decoder)


def is_logits_file(path: Path) -> bool:
    """Whether a file begins like one of ``--save-logits`` or of llama.cpp. Raises InvalidRequestError if unreadable."""
    try:
        with open(path, "rb") as file:
            return file.read(8) in (MAGIC, LLAMA_CPP_MAGIC)
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be read ({error.strerror or error})") from None


@contextlib.contextmanager
def as_gguf(folder: Path, announce: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """Convert a Hugging Face folder to a temporary F32 GGUF, deleted at the end.

    F32 holds every checkpoint exactly and is computed in F32. On a CPU llama.cpp rounds activations to the type of the
    weights: with BF16 that alone was a mean divergence of 9e-5 nats on a small model, with F16 2e-6. F32 takes twice
    the room of a 16-bit checkpoint: for large models convert once, with ``--type f16``, and give that file. The
    converter runs as the ``convert`` command in a process of its own: the runtime knows neither it nor torch.

    Raises InvalidRequestError when the folder is no checkpoint, ZigguratError with the converter's own line.
    """
    _check_checkpoint(folder)
    with tempfile.TemporaryDirectory(prefix="ziggurat-reference-") as place:
        target = Path(place) / "reference.gguf"
        announce(f"converting {folder} to a temporary f32 GGUF as the reference")
        # Python would look for modules in the current folder first, which may be a checkpoint with files of its own
        code = "import sys; sys.path = [p for p in sys.path if p]; from ziggurat.runtime.cli import main; main()"
        command = [sys.executable, "-c", code, "convert", str(folder), str(target), "--type", "f32"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not target.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it gave no reason"]
            why = lines[-1].strip().removeprefix("ziggurat: error: ").removeprefix("convert: error: ")
            raise ZigguratError(f"--against {folder}: cannot be converted ({why})")
        yield target


def _check_checkpoint(folder: Path) -> None:
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InvalidRequestError(
            f"--against {folder}: holds no readable config.json; give a Hugging Face folder, a GGUF or a logits file"
        ) from None


def fingerprint(vocab: Vocab) -> str:
    """Return a hash over the texts of all tokens."""
    digest = hashlib.sha256()
    for token in range(vocab.n_tokens):
        digest.update(vocab.text_of(token).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def check_same_vocabulary(vocab: Vocab, other: Vocab, name: str) -> None:
    """Raise InvalidRequestError naming the first token in which the reference's vocabulary differs."""
    shared = min(vocab.n_tokens, other.n_tokens)
    at = next((t for t in range(shared) if vocab.text_of(t) != other.text_of(t)), shared)
    if at == vocab.n_tokens == other.n_tokens:
        return
    sizes = "" if vocab.n_tokens == other.n_tokens else f" ({other.n_tokens} tokens, the model has {vocab.n_tokens})"
    if at < shared:
        what = f"token {at} is {other.text_of(at)!r}, in the model {vocab.text_of(at)!r}"
    else:
        longer, whose = (other, "the reference") if other.n_tokens > shared else (vocab, "the model")
        what = f"token {at} ({longer.text_of(at)!r}) exists in {whose} only"
    raise InvalidRequestError(f"{name}: the reference has another vocabulary{sizes}: {what}")
