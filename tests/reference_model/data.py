"""Training rows for the reference model: stories, encyclopedia, plays, dialogues, copying and notebooks."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from notebooks import COLOURS, NAMES, QUESTIONS, THINGS, Encoder, Fact, Row, notebook
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import BOS, END, EOT

HELD_OUT = 0.05
STORIES = ("tinystories_train.txt", "tinystories_more.txt")
OTHERS = ("wikitext_valid.txt", "tinyshakespeare.txt")
DIALOGUES = "dialogues.txt"
# How often a text row comes from each file. Simple English first: the model is too small for much else.
TEXT_SHARES = {
    "tinystories_train.txt": 0.40,
    "tinystories_more.txt": 0.34,
    "wikitext_valid.txt": 0.16,
    "tinyshakespeare.txt": 0.10,
}
STORY_REQUESTS = ("Tell me a story.", "Please tell me a story.", "Can you tell me a story?")
STORY_REQUESTS_ABOUT = ("Tell me a story about {}.", "Please write a story about {}.", "Can you tell me about {}?")

Message = tuple[str, str]
Chat = list[Message]
Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs, targets and weights, each [rows, length]."""


def read_text(folder: Path, name: str, held_out: bool = False) -> str:
    """The first 95 % of a text, which is for training, or the last 5 %, which never is.

    Raises:
        SystemExit: the text is not there.
    """
    try:
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise SystemExit(f"{folder / name} cannot be read ({e.strerror}): --texts names the folder of the texts") from e
    cut = int(len(text) * (1 - HELD_OUT))
    return text[cut:] if held_out else text[:cut]


def parse_dialogues(text: str) -> list[Chat]:
    """Chats from "User:" and "Bot:" lines; neighbouring pieces of one conversation are not joined."""
    chats: list[Chat] = []
    for piece in text.split("<|endoftext|>"):
        turns = re.findall(r"^(User|Bot): (.+)$", piece, re.M)
        if len(turns) >= 2 and turns[0][0] == "User":
            chats.append([("user" if who == "User" else "assistant", said) for who, said in turns])
    return chats


def parse_stories(text: str) -> list[Chat]:
    """Requests for a story, answered by the stories that have a recognisable beginning."""
    chats: list[Chat] = []
    for story in re.split(r"\n\n(?=Once upon a time|One day)", text):
        if not story.startswith(("Once upon a time", "One day")) or len(story) < 200:
            continue
        name = re.search(r"named ([A-Z]\w+)", story[:200])
        request = STORY_REQUESTS[len(chats) % 3]
        if name and len(chats) % 4:
            request = STORY_REQUESTS_ABOUT[len(chats) % 3].format(name.group(1))
        chats.append([("user", request), ("assistant", story.strip())])
    return chats


def tokenizer_texts(folder: Path) -> Iterator[str]:
    """What the BPE is trained on: the texts, and the words of the notebooks so that each becomes one token."""
    for name in (*STORIES, *OTHERS, DIALOGUES):
        yield read_text(folder, name)[: 900_000 if name in STORIES else 400_000]
    for name in NAMES:
        for colour in COLOURS:
            for thing in THINGS:
                yield " " + Fact(name, colour, thing, "").sentence
    yield "\n".join(q.format(key=f"{n}'s") for q in QUESTIONS for n in NAMES)
    yield " ".join(["\n\nuser\n\nassistant\n\nsystem"] * 200)


@dataclass(frozen=True)
class Corpus:
    """A tokenized text and the positions at which its sentences start."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def encode(cls, tokenizer: Tokenizer, text: str) -> Corpus:
        """Tokenize `text`; a sentence starts after a token that ends in a full stop or the like."""
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        ends = np.array([tokenizer.decode([i]).strip(' "').endswith((".", "!", "?")) for i in range(_size(tokenizer))])
        return cls(ids, np.flatnonzero(ends[ids]) + 1)

    def filler(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """`length` tokens from a random place, starting with a sentence, and the sentence starts in them."""
        at = int(self.starts[rng.randrange(max(1, int(np.searchsorted(self.starts, len(self.ids) - length))))])
        low, high = np.searchsorted(self.starts, [at, at + length])
        return self.ids[at : at + length].tolist(), (self.starts[low:high] - at).tolist()


def _size(tokenizer: Tokenizer) -> int:
    return int(tokenizer.get_vocab_size())


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of rows; what is left of 1 are notebooks."""

    text: float
    chat: float
    copy: float


class Rows:
    """Draws training rows; its only state is `rng`, so that a checkpoint can hold it."""

    def __init__(self, tokenizer: Tokenizer, corpora: dict[str, Corpus], chats: Sequence[Chat], seed: int) -> None:
        self.rng = random.Random(seed)
        self.encoder = Encoder(tokenizer)
        self._corpora, self._chats = corpora, chats
        self._shares = [TEXT_SHARES.get(name, 0.1) for name in corpora]
        self._prose = [corpus for name, corpus in corpora.items() if name != "tinyshakespeare.txt"]

    @classmethod
    def from_texts(cls, tokenizer: Tokenizer, folder: Path, seed: int) -> Rows:
        """Rows from the training part of the texts in `folder`."""
        texts = {name: read_text(folder, name) for name in (*STORIES, *OTHERS)}
        stories = [chat for name in STORIES for chat in parse_stories(texts[name])]
        corpora = {name: Corpus.encode(tokenizer, text) for name, text in texts.items()}
        dialogues = parse_dialogues(read_text(folder, DIALOGUES))
        return cls(tokenizer, corpora, dialogues * 2 + stories, seed)

    def copying(self, length: int) -> Row:
        """Random tokens that repeat with a random period: from the second time round they can be known."""
        first = len(self.encoder.special)
        period = self.rng.randint(8, length // 2)
        some = self.rng.sample(range(first, self.encoder.size), min(64, self.encoder.size - first))
        block = [self.rng.choice(some) for _ in range(period)]
        row = Row([self.encoder.special[BOS], *block], [0.0] * (period + 1))
        rest = length - len(row.ids)
        row.add((block * (rest // period + 1))[:rest], 1.0)
        return row

    def text(self, length: int) -> Row:
        """A window of a text."""
        corpus = self.rng.choices(list(self._corpora.values()), self._shares)[0].ids
        at = self.rng.randrange(len(corpus) - length)
        row = Row([self.encoder.special[BOS]], [0.0])
        row.add(corpus[at : at + length - 1].tolist(), 1.0)
        return row

    def chat(self, length: int) -> Row:
        """Chats one after the other; only what the assistant says is learnt."""
        row = Row([], [])
        while len(row.ids) < length:
            row.add([self.encoder.special[BOS]], 0.0)
            for role, said in self.rng.choice(self._chats):
                row.add(self.encoder.header(role), 0.0)
                row.add([*self.encoder(said), self.encoder.special[EOT]], float(role == "assistant"))
        return Row(row.ids[:length], row.weights[:length])

    def notebook(self, length: int) -> Row:
        """Facts in filler, and questions; padded to `length` without weight."""
        corpus = self.rng.choice(self._prose)
        row = notebook(self.rng, self.encoder, length, lambda room: corpus.filler(self.rng, room))
        row.add([self.encoder.special[END]] * (length - len(row.ids)), 0.0)
        return row

    def draw(self, length: int, mixture: Mixture) -> Row:
        """One row of the mixture."""
        share = self.rng.random()
        for part, make in ((mixture.text, self.text), (mixture.chat, self.chat), (mixture.copy, self.copying)):
            if share < part:
                return make(length)
            share -= part
        return self.notebook(length)

    def batch(self, count: int, length: int, mixture: Mixture) -> Batch:
        """Inputs, targets and weights of `count` rows, each [count, length]."""
        rows = [self.draw(length + 1, mixture) for _ in range(count)]
        ids = torch.tensor([row.ids for row in rows])
        weights = torch.tensor([row.weights for row in rows])
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:].contiguous()
