"""Texts of the benchmarks: parts for calibration, and parts that neither it nor the reference model was trained on."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parent.parent / "reference_model"
sys.path.insert(0, str(MODEL))

TEXTS = ("tinystories_more.txt", "wikitext_valid.txt", "tinyshakespeare.txt", "dialogues.txt")
CALIBRATION_CHARACTERS, HELD_OUT_CHARACTERS = 40_000, 16_000
CHATS, CHAT_SENTENCES, CHAT_FACTS = 60, 24, 4
CHAT = (
    "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{answer}<|eot_id|>"
)
# A piece may begin there and end before the like: tokenizers that split words from line ends cut there as well.
LINE_START = re.compile(r"\n(?= ?[A-Za-z])")


def held_out_text(source: Path, characters: int | None = HELD_OUT_CHARACTERS) -> str:
    """So many characters of each text's held-out part; None: all of them."""
    from data import read_text

    return "\n\n".join(read_text(source, name, held_out=True)[:characters] for name in TEXTS)


def chats(stories: str) -> str:
    """Chats in which facts hidden in stories are asked for: without any, calibration knows nothing of looking back."""
    from notebooks import QUESTIONS, draw_facts

    rng = random.Random(0)
    sentences = [s.strip() + "." for s in stories[:200_000].replace("\n", " ").split(".") if 20 < len(s) < 120]
    written = []
    for _ in range(CHATS):
        start = rng.randrange(len(sentences) - CHAT_SENTENCES)
        lines, facts = sentences[start : start + CHAT_SENTENCES], draw_facts(rng, CHAT_FACTS)
        for fact in facts:
            lines.insert(rng.randrange(len(lines) + 1), fact.sentence)
        asked = rng.choice(facts)
        question = rng.choice(QUESTIONS).format(key=asked.key)
        written.append(CHAT.format(text=" ".join([*lines, question]), answer=asked.sentence))
    return "\n".join(written)


def write_texts(source: Path, folder: Path, *, facts: bool) -> tuple[Path, Path]:
    """A calibration folder from the training part of the texts, and a file from their held-out part."""
    from data import read_text

    calibration, held_out = folder / "calibration", folder / "held-out.txt"
    calibration.mkdir()
    for name in TEXTS:
        text = read_text(source, name)
        start = len(text) // 3
        (calibration / name).write_text(text[start : start + CALIBRATION_CHARACTERS], encoding="utf-8")
    if facts:
        (calibration / "chats.txt").write_text(chats(read_text(source, "tinystories_train.txt")), encoding="utf-8")
    held_out.write_text(held_out_text(source), encoding="utf-8")
    return calibration, held_out


def calibration_pieces(source: Path, tokenizer: Any, tokens: int, length: int) -> list[str]:
    """Pieces of the training part of the texts that have exactly `length` tokens, together about `tokens`.

    A piece begins with a line and ends with a word, so that it has the same tokens alone, behind another piece and
    behind a special token. Thereby two programs that cut texts differently can be given the same sequences.

    Args:
        source: folder of the texts.
        tokenizer: a `tokenizers.Tokenizer`.
        tokens: wanted in all, spread evenly over the texts.
        length: tokens of a piece.
    """
    from data import read_text

    count = max(1, tokens // (length * len(TEXTS)))
    pieces: list[str] = []
    for name in TEXTS:
        text = read_text(source, name)
        for i in range(count):
            pieces.append(_piece(text, i * (len(text) // count), tokenizer, length, first=not pieces))
    return pieces


def _piece(text: str, start: int, tokenizer: Any, length: int, *, first: bool) -> str:
    """The next piece of a text from `start` on; the first of all has no line end before it, which would be stripped."""
    for place in LINE_START.finditer(text, start):
        window = text[place.start() : place.start() + 16 * length]
        if first:
            window = window.lstrip()
        encoded = tokenizer.encode(window, add_special_tokens=False)
        if len(encoded.ids) <= length:
            break
        end = encoded.offsets[length - 1][1]
        ends_with_word = window[end - 1].isascii() and window[end - 1].isalpha() and not window[end].isalpha()
        if ends_with_word and tokenizer.encode(window[:end], add_special_tokens=False).ids == encoded.ids[:length]:
            return window[:end]
    raise SystemExit(f"no piece of {length} tokens from character {start} of a text on: choose shorter ones")
