"""Text to tokens and back, through the library's own tokenizer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from ziggurat.runtime.bindings import library
from ziggurat.runtime.errors import TokenError

_MAX_TEXT = 2**31 - 1
_NULL_TOKEN = -1
_ATTR_NORMAL = 1 << 2  # LLAMA_TOKEN_ATTR_NORMAL


class Vocab:
    """A model's vocabulary. Belongs to a Model and is valid while that one is open; immutable, safe from any thread."""

    def __init__(self, handle: Any) -> None:
        self._lib = library.api()
        self.handle = handle
        self.n_tokens: int = self._lib.llama_vocab_n_tokens(handle)
        self._eog: tuple[int, ...] | None = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Turn text into token ids.

        ``add_special`` adds BOS/EOS as the model's metadata says; ``parse_special`` reads ``<|im_start|>`` and its like
        as one token instead of as letters. Raises TokenError for text that is not valid Unicode, or too long.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenError(f"the text is not valid Unicode: a lone surrogate at character {error.start}") from None
        if len(data) > _MAX_TEXT:
            raise TokenError(f"the text has {len(data)} bytes; the tokenizer takes at most {_MAX_TEXT}")
        capacity = len(data) + 8  # a token spans at least one byte, plus BOS, EOS and a space prefix
        for _ in range(2):
            buffer = (ctypes.c_int32 * capacity)()
            count = self._lib.llama_tokenize(self.handle, data, len(data), buffer, capacity, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            capacity = -count
        raise TokenError(f"the tokenizer asked for {capacity} tokens twice; the vocabulary is damaged")

    def check(self, tokens: Sequence[int]) -> None:
        """Raise TokenError naming the first id outside the vocabulary: the library would abort the process on it."""
        if tokens and not (0 <= min(tokens) and max(tokens) < self.n_tokens):
            index, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < self.n_tokens)
            raise TokenError(f"token {token} at position {index} is not in the vocabulary (0 to {self.n_tokens - 1})")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of one token, possibly part of a character. Control tokens are empty unless ``special``."""
        self.check((token,))
        capacity = 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(capacity)
            count = self._lib.llama_token_to_piece(self.handle, token, buffer, capacity, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            capacity = -count
        raise TokenError(f"token {token} has no text; the vocabulary is damaged")

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of a whole sequence, invalid UTF-8 replaced.

        The pieces are joined as they are: the library's own ``llama_detokenize`` takes spaces out of the text ("a , b"
        becomes "a, b") for many vocabularies. A space that the tokenizer put in front therefore stays.
        """
        return b"".join(self.piece(token, special=special) for token in tokens).decode("utf-8", errors="replace")

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation (EOS, end of turn, …)."""
        return bool(self._lib.llama_vocab_is_eog(self.handle, token))

    def eog_tokens(self) -> tuple[int, ...]:
        """Return all tokens that end a generation; looked up once."""
        if self._eog is None:
            self._eog = tuple(token for token in range(self.n_tokens) if self.is_eog(token))
        return self._eog

    def is_normal(self, token: int) -> bool:
        """Whether the token is ordinary text: not control, unknown, unused, user-defined, or a single byte."""
        self.check((token,))
        return bool(self._lib.llama_vocab_get_attr(self.handle, token) & _ATTR_NORMAL)

    def _special(self, token: int) -> int | None:
        return None if token == _NULL_TOKEN else token

    @property
    def bos(self) -> int | None:
        """The beginning-of-sequence token."""
        return self._special(self._lib.llama_vocab_bos(self.handle))

    @property
    def eos(self) -> int | None:
        """The end-of-sequence token."""
        return self._special(self._lib.llama_vocab_eos(self.handle))

    @property
    def adds_bos(self) -> bool:
        """Whether the model wants BOS in front of every prompt."""
        return bool(self._lib.llama_vocab_get_add_bos(self.handle))

    def text_of(self, token: int | None) -> str:
        """Return how a special token is written in a chat template, an empty string for None."""
        if token is None:
            return ""
        self.check((token,))
        text: bytes = self._lib.llama_vocab_get_text(self.handle, token) or b""
        return text.decode("utf-8", errors="replace")

    def suppressed(self) -> list[int]:
        """Tokens the model's metadata forbids to sample."""
        count = ctypes.c_int32(0)
        tokens = self._lib.llama_vocab_get_suppress_tokens(self.handle, ctypes.byref(count))
        return [tokens[index] for index in range(count.value)]
