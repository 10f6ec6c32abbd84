"""The library's grammar sampler, with nothing that makes it abort the process."""

from __future__ import annotations

import codecs
import ctypes
import math
import weakref

from ziggurat.runtime.bindings import library
from ziggurat.runtime.bindings.candidates import Candidates
from ziggurat.runtime.bindings.log import reason
from ziggurat.runtime.bindings.vocab import Vocab
from ziggurat.runtime.errors import InvalidRequestError, TokenError


class GrammarSampler:
    """Which tokens continue a text of a grammar (GBNF, beginning with the rule ``root``).

    The library is strict about characters and lax about the rest: a text may end within a character there, bytes that
    are no UTF-8 pass or throw through Python, and control tokens count by their name, which is never shown. Here
    tokens are refused unless what they show is a continuation in UTF-8. ``named`` are control tokens that the grammar
    asks for.

    Raises InvalidRequestError when the library refuses the grammar. It has to have been read by ``grammar.py``: there
    are grammars that the library does not survive.
    """

    def __init__(self, vocab: Vocab, text: str, named: frozenset[int] = frozenset()) -> None:
        lib = self._lib = library.api()
        self._vocab = vocab
        self._named = named
        with library.log.capture() as lines:
            handle = lib.llama_sampler_init_grammar(vocab.handle, text.encode("utf-8"), b"root")
        if not handle or not text:
            raise InvalidRequestError(f"the library refuses the grammar: {reason(lines, 'no reason is given')}")
        self._handle = handle
        self._free = weakref.finalize(self, lib.llama_sampler_free, handle)
        self._free.atexit = False
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._one = (lib.llama_token_data * 1)()
        self._one_struct = lib.llama_token_data_array(data=self._one, size=1, selected=-1, sorted=False)

    def allows(self, token: int) -> bool:
        """Whether a token may come next, or as an end token, whether the text may end here."""
        self._one[0].id, self._one[0].logit = token, 0.0
        self._lib.llama_sampler_apply(self._handle, ctypes.byref(self._one_struct))
        return self._one[0].logit > -math.inf and self.shows(token)

    def shows(self, token: int) -> bool:
        """Whether what the token shows continues the text in UTF-8."""
        within_character = bool(self._decoder.getstate()[0])
        if self._vocab.is_eog(token):
            return not within_character
        piece = self._vocab.piece(token)
        if not piece:
            return token in self._named and not within_character
        state = self._decoder.getstate()
        try:
            self._decoder.decode(piece)
            pending = self._decoder.getstate()[0]
        except UnicodeDecodeError:
            return False
        finally:
            self._decoder.setstate(state)
        # two thirds of a surrogate is the one beginning that Python lets pass though nothing can complete it
        return b"\0" not in piece and not (pending[:1] == b"\xed" and pending[1:] >= b"\xa0")

    def mask(self, candidates: Candidates) -> None:
        """Forbid the tokens that the library does not allow; ask ``shows`` about the one that is chosen."""
        candidates.mask(self._handle)

    def accept(self, token: int) -> None:
        """Go on after a token. Raises TokenError for one that is not allowed: the library would abort the process."""
        if not self.allows(token):
            raise TokenError(f"token {token} does not continue the text as the grammar wants it")
        if not self._vocab.is_eog(token):
            self._decoder.decode(self._vocab.piece(token))
        self._lib.llama_sampler_accept(self._handle, token)

    def close(self) -> None:
        """Free the grammar. Idempotent."""
        self._free()
