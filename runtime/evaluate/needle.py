"""Writes documents that hide facts in filler, and asks for one of them.

The text form says "The code of Lily's red box is 4821." between sentences of ordinary text and asks "What is the code
of Lily's red box?". The token form is for models without a language: random tokens of the vocabulary, in which key
tokens are followed by value tokens; it ends with a key. Documents are put together from tokens, so that their length
is exact for any tokenizer, and are the same for the same seed, vocabulary and settings.

A length counts everything the model holds at the end: prompt and room for the answer (as in RULER, NVIDIA 2024; the
"needle in a haystack" of Kamradt 2023 measures the prompt alone).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ziggurat.runtime.bindings import Vocab
from ziggurat.runtime.errors import InvalidRequestError

NAMES = (
    "Lily Tom Anna Ben Mia Sam Lucy Max Sue Tim Emma Jack Sara Leo Ella Bob Amy Joe Kate Dan Zoe Ned Eva Roy Ivy "
    "Sid Fay Gus Nora Hugo Iris Otto Ruth Carl Vera Paul Jane Mark Rosa Finn"
).split()
COLOURS = "red blue green yellow black white pink brown gold silver gray purple".split()
THINGS = (
    "box door bag house garden boat book key hat chest train drawer ring clock lamp coat phone room shop bike cup safe"
).split()
_MAX_FACTS = 2000


@dataclass(frozen=True)
class Wording:
    """How facts read. ``fact`` has {key} and {value}, ``question`` has {key}; a value has ``digits`` digits."""

    fact: str = "The code of {key} is {value}."
    question: str = "What is the code of {key}?"
    digits: int = 4

    def __post_init__(self) -> None:
        if "{key}" not in self.fact or self.fact.count("{value}") != 1 or "{key}" not in self.question:
            raise InvalidRequestError("a fact needs {key} and {value}, its question {key}")
        if not 1 <= self.digits <= 18:
            raise InvalidRequestError(f"values of {self.digits} digits are not possible; take 1 to 18")

    def state(self, key: str, value: str) -> str:
        """Return the sentence that is hidden."""
        return self.fact.replace("{key}", key).replace("{value}", value)

    def stem(self, key: str) -> str:
        """Return the sentence up to its value, for models that continue text instead of answering."""
        return self.fact.split("{value}")[0].replace("{key}", key).rstrip()

    def ask(self, key: str) -> str:
        """Return the question."""
        return self.question.replace("{key}", key)


@dataclass(frozen=True)
class Needle:
    """A prompt and the answer it asks for. ``depth`` is the wanted, ``actual_depth`` the nearest possible one.

    ``expected`` is the value's text in the text form; in the token form it is empty and ``expected_tokens`` counts.
    ``length`` is the prompt plus the room for the answer, in tokens. ``hidden`` are the keys and values of all facts in
    the text form, the one asked for among them.
    """

    prompt: tuple[int, ...]
    length: int
    depth: float
    actual_depth: float
    facts: int
    key: str
    expected: str
    expected_tokens: tuple[int, ...]
    hidden: tuple[tuple[str, str], ...] = ()


#: Makes the trial with this generator: (rng, length, depth, facts).
Writer = Callable[[random.Random, int, float, int], Needle]


@dataclass(frozen=True)
class Piece:
    """Tokens of a document that stay together; something may be put in front where ``opens`` is true."""

    tokens: Sequence[int]
    opens: bool = True


def place(pieces: Sequence[Piece], fact: Sequence[int], depth: float) -> tuple[list[int], float]:
    """Put a fact in front of the piece (or at the end) nearest to ``depth``; return the tokens and the true depth.

    Depth is the share of the other tokens that come before the fact: 0 at the start, 1 at the end.
    """
    total = sum(len(piece.tokens) for piece in pieces)
    best, before = (2.0, len(pieces), total), 0
    for index, piece in enumerate(pieces):
        if piece.opens or before == 0:
            best = min(best, (abs(before / total - depth), index, before))
        before += len(piece.tokens)
    best = min(best, (abs(1.0 - depth), len(pieces), total))
    document = [token for piece in pieces[: best[1]] for token in piece.tokens]
    document += fact
    document += [token for piece in pieces[best[1] :] for token in piece.tokens]
    return document, best[2] / total if total else 0.0


class TextNeedles:
    """The text form. ``frame`` is what the prompt template puts before and after the user's message, as tokens.

    With ``raw`` the prompt ends with the beginning of the fact instead of a question. Raises InvalidRequestError for a
    filler without words.
    """

    def __init__(
        self,
        vocab: Vocab,
        filler: str,
        frame: tuple[list[int], list[int]],
        wording: Wording,
        *,
        answer_tokens: int,
        raw: bool = False,
    ) -> None:
        self._vocab, self._wording, self._raw = vocab, wording, raw
        self._head, self._tail = frame
        self._answer_tokens = answer_tokens
        probe = vocab.tokenize("x", add_special=False, parse_special=False)
        self._adds_space = vocab.detokenize(probe).startswith(" ")
        self._filler = self._encode(filler, space=True)
        if len(self._filler) < 8:
            raise InvalidRequestError("the filler has fewer than 8 tokens; give a longer text")
        self._words = filler
        self._opens = self._sentence_starts()
        self._starts = [index for index, opens in enumerate(self._opens) if opens and self._is_word(index)]

    def _sentence_starts(self) -> list[bool]:
        """Tell for every filler token whether a sentence ended before it on the same line."""
        ends: dict[int, bool] = {}
        for token in set(self._filler):
            text = self._vocab.piece(token).decode("utf-8", errors="replace")
            ends[token] = text.rstrip(" \"'").endswith((".", "!", "?"))
        return [True] + [ends[token] for token in self._filler[:-1]]

    def _is_word(self, index: int) -> bool:
        return b"\n" not in self._vocab.piece(self._filler[index])

    def _encode(self, text: str, *, space: bool) -> list[int]:
        """Tokenize text in the middle of a document; a SentencePiece vocabulary brings the space itself."""
        before = " " if space and not self._adds_space else ""
        return self._vocab.tokenize(before + text, add_special=False, parse_special=False)

    def __call__(self, rng: random.Random, length: int, depth: float, facts: int) -> Needle:
        """Write a document. Raises InvalidRequestError when the length has no room for facts and question."""
        keys, values = self._draw(rng, facts)
        asked = rng.randrange(facts)
        sentences = [
            self._encode(self._wording.state(key, value), space=True) for key, value in zip(keys, values, strict=True)
        ]
        if self._raw:
            closing = self._encode(self._wording.stem(keys[asked]), space=True)
        else:
            closing = self._encode("\n\n" + self._wording.ask(keys[asked]), space=False)
        prompt_tokens = length - self._answer_tokens
        room = prompt_tokens - len(self._head) - len(self._tail) - len(closing) - sum(map(len, sentences))
        if room < 0:
            raise InvalidRequestError(
                f"{length} tokens have no room for {facts} facts and a question: take at least {length - room}"
            )
        fact = sentences.pop(asked)
        pieces = self._scatter(rng, room, sentences)
        document, actual = place(pieces, fact, depth)
        prompt = (*self._head, *document, *closing, *self._tail)
        hidden = tuple(zip(keys, values, strict=True))
        return Needle(prompt, length, depth, actual, facts, keys[asked], values[asked], (), hidden)

    def _draw(self, rng: random.Random, facts: int) -> tuple[list[str], list[str]]:
        """Draw distinct keys and values that the filler does not contain."""
        if not 1 <= facts <= min(_MAX_FACTS, 10**self._wording.digits // 2):
            raise InvalidRequestError(f"{facts} facts are not possible with values of {self._wording.digits} digits")
        keys: list[str] = []
        values: list[str] = []
        for _ in range(100 * facts + 1000):
            if len(keys) < facts:
                key = f"{rng.choice(NAMES)}'s {rng.choice(COLOURS)} {rng.choice(THINGS)}"
                if key not in keys and key not in self._words:
                    keys.append(key)
            if len(values) < facts:
                value = "".join(rng.choice("0123456789") for _ in range(self._wording.digits))
                if value not in values and value not in self._words:
                    values.append(value)
            if len(keys) == len(values) == facts:
                return keys, values
        raise InvalidRequestError(f"the filler contains too many numbers to hide {facts} more; give another text")

    def _scatter(self, rng: random.Random, room: int, sentences: Sequence[list[int]]) -> list[Piece]:
        """Return ``room`` tokens of filler from a random sentence on, with the other facts at random places."""
        pieces = _shortened(self._whole_sentences(rng.choice(self._starts), room), room)
        places = [index for index, piece in enumerate(pieces) if piece.opens] + [len(pieces)]
        for at, sentence in sorted(((rng.choice(places), sentence) for sentence in sentences), reverse=True):
            pieces.insert(at, Piece(sentence))
        return pieces

    def _whole_sentences(self, start: int, room: int) -> list[list[int]]:
        """Return sentences of filler from ``start`` on, around and around, until there are ``room`` tokens or more."""
        size, index, count = len(self._filler), start, 0
        pieces: list[list[int]] = []
        while count < room or not self._opens[index % size]:
            if not pieces or self._opens[index % size]:
                pieces.append([])
            pieces[-1].append(self._filler[index % size])
            index, count = index + 1, count + 1
        return pieces if room else []


def _shortened(sentences: list[list[int]], room: int) -> list[Piece]:
    """Cut the sentences to ``room`` tokens where it shows least: one in the middle loses its end."""
    excess = sum(map(len, sentences)) - room
    pieces = [Piece(sentence) for sentence in sentences]
    middle = len(sentences) / 2
    for index in sorted(range(len(sentences)), key=lambda index: abs(index - middle)):
        if excess and len(sentences[index]) > excess:
            pieces[index] = Piece(sentences[index][:-excess])
            if index + 1 < len(pieces):  # nothing goes between the cut sentence and the next
                pieces[index + 1] = Piece(sentences[index + 1], opens=False)
            return pieces
    flat = [token for sentence in sentences for token in sentence][:room]
    return pieces if not excess else [Piece(flat)]


class TokenNeedles:
    """The token form: ``key_tokens`` and ``value_tokens`` tokens of each fact occur nowhere else in the document."""

    def __init__(self, vocab: Vocab, *, key_tokens: int = 2, value_tokens: int = 4) -> None:
        self._vocab, self._key, self._value = vocab, key_tokens, value_tokens
        self._normal = [t for t in range(vocab.n_tokens) if vocab.is_normal(t) and not vocab.is_eog(t)]

    def __call__(self, rng: random.Random, length: int, depth: float, facts: int) -> Needle:
        """Write a document. Raises InvalidRequestError when length or vocabulary are too small."""
        each = self._key + self._value
        if facts < 1 or facts * each >= len(self._normal):
            raise InvalidRequestError(f"{facts} facts need more than {facts * each} tokens of ordinary vocabulary")
        reserved = rng.sample(self._normal, facts * each)
        chosen = set(reserved)
        others = [token for token in self._normal if token not in chosen]
        pairs = [reserved[index : index + each] for index in range(0, len(reserved), each)]
        head = [self._vocab.bos] if self._vocab.adds_bos and self._vocab.bos is not None else []
        room = length - self._value - len(head) - self._key - facts * each
        if room < 0:
            raise InvalidRequestError(f"{length} tokens have no room for {facts} facts: take at least {length - room}")
        asked = pairs.pop(rng.randrange(facts))
        pieces = [Piece([rng.choice(others)]) for _ in range(room)]
        for pair in pairs:
            pieces.insert(rng.randint(0, len(pieces)), Piece(pair))
        document, actual = place(pieces, asked, depth)
        key, value = asked[: self._key], asked[self._key :]
        name = self._vocab.detokenize(key, special=True)
        return Needle((*head, *document, *key), length, depth, actual, facts, name, "", tuple(value))


def grid(
    writer: Writer, lengths: Sequence[int], depths: Sequence[float], facts: Sequence[int], trials: int, seed: int
) -> Iterator[Needle]:
    """Write the documents of a grid in order; each trial has a generator of its own, whatever else is in the grid."""
    for count in facts:
        for length in lengths:
            for depth in depths:
                for trial in range(trials):
                    yield writer(random.Random(f"{seed}/{count}/{length}/{depth}/{trial}"), length, depth, count)
