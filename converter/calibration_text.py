"""Calibration text to tokens: the text that ships with the package, or a file or folder of one's own."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import CalibrationError, LibraryError, TokenizerError

logger = logging.getLogger(__name__)

BUILT_IN = "built-in"
TEXTS = ("prose.txt", "code.txt", "languages.txt")
DIALOGUES = "dialogues.json"

# Of a text longer than this, and than so much per wanted token, pieces spread over it are tokenized.
LEAST_CHARACTERS, CHARACTERS_PER_TOKEN = 1 << 20, 64
PIECES = 64

# Stands before a chat template: those that print the date give the same tokens tomorrow.
FIXED_DATE = "{% macro strftime_now(format) %}1 January 2025{% endmacro %}"


@dataclass(frozen=True)
class TextSettings:
    """Which text, and how much of it."""

    source: Path | None = None
    """A UTF-8 text file, or a folder of them; None: the text that ships with the package."""
    tokens: int = 16384
    """At most so many tokens, in whole sequences."""
    sequence: int = 512
    """Tokens per sequence, the one that begins it (BOS) included."""
    seed: int = 0
    """Chooses the sequences when the text has more than are wanted."""


@dataclass(frozen=True)
class CalibrationTokens:
    """Sequences of token ids, and where they come from."""

    ids: npt.NDArray[np.int32]
    """Shape [sequences, positions]."""
    source: str = BUILT_IN
    """The built-in text, or the file or folder it was read from."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the ids."""
        return hashlib.sha256(np.ascontiguousarray(self.ids, np.int32).tobytes()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """What a record of a conversion says about them."""
        sequences, positions = self.ids.shape
        return {"source": self.source, "sequences": sequences, "positions": positions, "sha256": self.sha256}


def read_tokens(checkpoint: Checkpoint, settings: TextSettings | None = None) -> CalibrationTokens:
    """Cut a calibration text into sequences of tokens of the checkpoint's own tokenizer.

    The text is tokenized as a whole and cut into sequences, each behind the token that the tokenizer begins texts with,
    if it has one. The built-in dialogues are put into the checkpoint's chat template, if it has one that takes them.

    Raises:
        CalibrationError: the text is empty, too short, or no text, or the settings do not fit the model.
        TokenizerError: the tokenizer cannot be loaded.
        LibraryError: transformers is missing.
    """
    settings = settings or TextSettings()
    _check(checkpoint, settings)
    texts = None if settings.source is None else read_texts(settings.source)  # a wrong file is found before any work
    tokenizer = _tokenizer(checkpoint)
    if texts is None:
        texts = built_in_texts(tokenizer)
    text = excerpt("\n\n".join(texts), max(LEAST_CHARACTERS, CHARACTERS_PER_TOKEN * settings.tokens))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = _begin(tokenizer)
    body = settings.sequence - len(begin)
    available = len(ids) // body
    source = BUILT_IN if settings.source is None else str(settings.source)
    if available < 2:
        raise CalibrationError(
            f"the calibration text ({source}) has {len(ids)} tokens, at least two sequences of {settings.sequence} are "
            "needed: give more text, or a smaller sequence length"
        )
    count = min(available, settings.tokens // settings.sequence)
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(available)[:count])
    windows = np.array(ids[: available * body], np.int32).reshape(available, body)[chosen]
    sequences = np.concatenate([np.tile(np.array(begin, np.int32), (count, 1)), windows], axis=1)
    return CalibrationTokens(sequences, source)


def _check(checkpoint: Checkpoint, settings: TextSettings) -> None:
    """Refuse settings that no text could meet."""
    if settings.sequence < 8:
        raise CalibrationError(f"sequences of {settings.sequence} tokens say nothing of a model: take at least 8")
    if settings.tokens < 2 * settings.sequence:
        raise CalibrationError(
            f"{settings.tokens} calibration tokens are less than two sequences of {settings.sequence}: ask for more "
            "tokens or a smaller sequence length"
        )
    for key in ("max_position_embeddings", "n_positions"):
        limit = checkpoint.config.get(key)
        if isinstance(limit, int) and settings.sequence > limit:
            raise CalibrationError(
                f"the model takes {limit} tokens at most ({key}), the calibration's sequences have "
                f"{settings.sequence}: choose a smaller sequence length"
            )


def read_texts(source: Path) -> list[str]:
    """The text of a file, or of all files of a folder and those in it, by name; hidden ones are left out.

    Raises:
        CalibrationError: there is nothing to read, or a file is empty or no UTF-8 text.
    """
    try:
        if source.is_dir():
            texts = [_read_text(path) for path in _files(source)]
            if not texts:
                raise CalibrationError(f"{source} holds no file: give a folder of text files, or one text file")
        elif source.is_file():
            texts = [_read_text(source)]
        else:
            what = "is no regular file" if source.exists() else "does not exist"
            raise CalibrationError(f"{source} {what}: give a text file or a folder of text files")
    except OSError as e:
        raise CalibrationError(f"{e.filename or source} cannot be read ({e.strerror}): check the calibration") from e
    if not any(texts):
        raise CalibrationError(f"{source} is empty: give a calibration text of some thousand words")
    return [text for text in texts if text]


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and (Path(place) / name).is_file():
                yield Path(place) / name


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{path} is no UTF-8 text (byte {e.start}): convert it, or leave it out") from None
    if "\0" in text:
        raise CalibrationError(f"{path} is no text (it holds zero bytes): leave it out of the calibration")
    return text.replace("\r\n", "\n").strip()


def excerpt(text: str, limit: int) -> str:
    """At most about `limit` characters of a text: pieces spread over it, cut at line ends where there are any."""
    if len(text) <= limit:
        return text
    size, pieces = limit // PIECES, []
    for i in range(PIECES):
        start = i * (len(text) - size) // (PIECES - 1)
        piece = text[start : start + size]
        if i:  # the first line is not whole
            piece = piece[piece.find("\n") + 1 :]
        pieces.append(piece)
    return "\n".join(pieces)


def built_in_texts(tokenizer: Any = None) -> list[str]:
    """The text that ships with the package, its dialogues as the tokenizer's chat template writes them."""
    folder = importlib.resources.files("ziggurat.converter") / "data"
    texts = [(folder / name).read_text(encoding="utf-8").strip() for name in TEXTS]
    dialogues: list[list[dict[str, str]]] = json.loads((folder / DIALOGUES).read_text(encoding="utf-8"))
    return texts + [_dialogue(tokenizer, messages) for messages in dialogues]


def _dialogue(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """A dialogue in the chat template; without its instructions if the template knows none; else as plain text."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        for said in (messages, [m for m in messages if m["role"] != "system"]):
            try:
                text = tokenizer.apply_chat_template(said, chat_template=FIXED_DATE + template, tokenize=False)
            except Exception as e:  # a template can raise anything
                logger.info("the chat template refuses a dialogue: %s", e)
                continue
            return str(text).removeprefix(tokenizer.bos_token or "")  # every sequence begins with it anyway
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def _tokenizer(checkpoint: Checkpoint) -> Any:
    try:
        import transformers
    except ImportError as e:
        raise LibraryError(f"{e.name} is not installed: `pip install 'ziggurat[convert]'`") from e
    try:
        return transformers.AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as e:  # transformers' tokenizers fail in many ways
        raise TokenizerError(
            f"{checkpoint.folder}: the tokenizer cannot be loaded by transformers ({type(e).__name__}: {e}): copy its "
            "files again"
        ) from e


def _begin(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, if it does."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    begins = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return [int(ids[0])] if begins else []
