"""Notebooks: chats whose user message hides facts in filler text, and questions about those facts.

A fact reads "The code of Lily's red box is 4821."; the answer repeats that sentence, so answering is looking the
key up and copying. Within one notebook every (name, colour, thing) and every code occurs once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from vocabulary import BOS, EOT, HEADER, HEADER_END, SPECIAL

NAMES = (
    "Lily Tom Anna Ben Mia Sam Lucy Max Sue Tim Emma Jack Sara Leo Ella Bob Amy Joe Kate Dan Zoe Ned Eva Roy Ivy "
    "Sid Fay Gus Nora Hugo Iris Otto Ruth Carl Vera Paul Jane Mark Rosa Finn"
).split()
COLOURS = "red blue green yellow black white pink brown gold silver gray purple".split()
THINGS = (
    "box door bag house garden boat book key hat chest train drawer ring clock lamp coat phone room shop bike cup safe"
).split()
QUESTIONS = (
    "What is the code of {key}?",
    "What is the code of {key}?",
    "Tell me the code of {key}.",
    "Do you know the code of {key}?",
)
TURN_TOKENS = 40  # a question with its answer, rounded up
FACT_TOKENS = 14

FILLER_WEIGHT = 0.5  # the filler is ordinary text, but a notebook is there for its answers
KEY_WEIGHT = 0.5
DIGIT_WEIGHT = 4.0


@dataclass(frozen=True)
class Fact:
    """One thing to remember."""

    name: str
    colour: str
    thing: str
    code: str

    @property
    def key(self) -> str:
        """What a question names: "Lily's red box"."""
        return f"{self.name}'s {self.colour} {self.thing}"

    @property
    def sentence(self) -> str:
        """The sentence that is hidden in the filler and repeated as the answer."""
        return f"The code of {self.key} is {self.code}."


def draw_facts(rng: random.Random, count: int, digits: Sequence[int] = (4,), alike: float = 0.0) -> list[Fact]:
    """Draw `count` facts with distinct keys and distinct codes.

    Args:
        rng: the only source of chance.
        count: how many.
        digits: a code's length is drawn from these.
        alike: share of the facts whose key differs from an earlier one in a single word, so that all three count.
    """
    facts: list[Fact] = []
    keys: set[tuple[str, str, str]] = set()
    codes: set[str] = set()
    while len(facts) < count:
        key = (rng.choice(NAMES), rng.choice(COLOURS), rng.choice(THINGS))
        if alike and facts and rng.random() < alike:
            other, part = rng.choice(facts), rng.randrange(3)
            words = [other.name, other.colour, other.thing]
            words[part] = key[part]
            key = (words[0], words[1], words[2])
        code = "".join(rng.choice("0123456789") for _ in range(rng.choice(digits)))
        if key not in keys and code not in codes:
            keys.add(key)
            codes.add(code)
            facts.append(Fact(*key, code))
    return facts


@dataclass
class Row:
    """Token ids with the loss weight of each: weights[i] is for predicting ids[i]."""

    ids: list[int]
    weights: list[float]

    def add(self, ids: Sequence[int], weight: float) -> None:
        """Append tokens that all have one weight."""
        self.ids.extend(ids)
        self.weights.extend([weight] * len(ids))


class Encoder:
    """Text to token ids, with a memory for the short strings that come again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special: dict[str, int] = {name: int(tokenizer.token_to_id(name) or 0) for name in SPECIAL}
        self._tokenizer = tokenizer
        self._memory: dict[str, list[int]] = {}
        self.size: int = tokenizer.get_vocab_size()

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text` without any special token."""
        ids = self._memory.get(text)
        if ids is None:
            if len(self._memory) > 100_000:
                self._memory.clear()
            ids = self._memory[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def header(self, role: str) -> list[int]:
        """The tokens that open a message of `role`."""
        return [self.special[HEADER], *self(role), self.special[HEADER_END], *self("\n\n")]


Filler = Callable[[int], tuple[list[int], list[int]]]
"""Gives (ids, places): that many tokens of text, and the indices at which a sentence starts."""


def write_notebook(
    rng: random.Random, encoder: Encoder, facts: Sequence[Fact], asked: Sequence[Fact], length: int, filler: Filler
) -> Row:
    """One chat of at most `length` tokens: `facts` in shuffled order in filler text, then the `asked` in turn.

    Raises:
        ValueError: facts and questions alone are longer than `length`.
    """
    tail = _questions(rng, encoder, asked)
    head = Row([], [])
    head.add([encoder.special[BOS], *encoder.header("user")], 0.0)
    sentences = [encoder(" " + fact.sentence) for fact in facts]
    rng.shuffle(sentences)
    room = length - len(head.ids) - len(tail.ids) - sum(map(len, sentences))
    if room < 0:
        raise ValueError(f"{len(facts)} facts and {len(asked)} questions need {-room} tokens more than {length}")
    text, places = filler(room)
    # Facts go between sentences where there are enough of them, else anywhere.
    choice = places if len(places) >= len(sentences) else range(len(text) + 1)
    cuts = sorted(rng.choice(choice) for _ in sentences)
    body, start = head, 0
    for cut, sentence in zip(cuts, sentences, strict=True):
        body.add(text[start:cut], FILLER_WEIGHT)
        body.add(sentence, 0.0)  # what a fact says cannot be known beforehand
        start = cut
    body.add(text[start:], FILLER_WEIGHT)
    return Row(body.ids + tail.ids, body.weights + tail.weights)


def _questions(rng: random.Random, encoder: Encoder, asked: Sequence[Fact]) -> Row:
    """The end of the first user message, its answer, and a further turn for every further fact."""
    row, eot = Row([], []), encoder.special[EOT]
    for index, fact in enumerate(asked):
        question = rng.choice(QUESTIONS).format(key=fact.key)
        row.add(encoder.header("user") if index else encoder("\n\n"), 0.0)
        row.add([*encoder(question), eot], 0.0)
        row.add(encoder.header("assistant"), 0.0)
        stem = encoder(fact.sentence[: -len(fact.code) - 2])
        row.add(stem, KEY_WEIGHT)
        row.add(encoder(" "), KEY_WEIGHT)
        row.add(encoder(fact.code), DIGIT_WEIGHT)
        row.add([*encoder("."), eot], KEY_WEIGHT)
    return row


def notebook(rng: random.Random, encoder: Encoder, length: int, filler: Filler) -> Row:
    """A training notebook of at most `length` tokens, with as many facts and questions as fit well."""
    budget = length - 16
    asked = rng.randint(1, max(1, min(12, budget // (2 * TURN_TOKENS))))
    budget -= asked * TURN_TOKENS
    most = max(asked, min(24, budget // (2 * FACT_TOKENS)))
    facts = draw_facts(rng, rng.randint(max(asked, min(6, most)), most), digits=(3, 4, 4, 4, 4, 4, 5), alike=0.3)
    return write_notebook(rng, encoder, facts, rng.sample(facts, asked), length, filler)
