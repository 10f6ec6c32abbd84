"""Reads multiple-choice questions: a plain form, and the forms that ARC, MMLU and HellaSwag are published in.

A file is a JSON list or one JSON object per line. An item is one of

- plain and MMLU: ``{"question": "…", "choices": ["…", …], "answer": 0}``; the answer is an index from 0, a choice's
  text, or a letter;
- ARC: ``{"question": "…", "choices": {"text": […], "label": […]}, "answerKey": "B"}``, or the original with
  ``{"question": {"stem": "…", "choices": [{"text": "…", "label": "A"}, …]}, "answerKey": "B"}``;
- HellaSwag: ``{"ctx": "…", "endings": ["…", …], "label": "3"}``; the endings continue the context itself;
- instructions: ``{"instruction": "…: QUESTION Answer1: … Answer2: … Answer format: …", "answer": "answer2"}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziggurat.runtime.errors import InvalidRequestError

DEFAULT_PROMPT = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Question:
    """A question with at least two choices, ``answer`` the index of the right one.

    ``continues``: the choices continue the text itself, which then is the prompt as it stands.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    continues: bool = False

    def prompt(self, form: str = DEFAULT_PROMPT) -> str:
        """Return what stands before a choice; ``{question}`` in ``form`` is replaced."""
        return self.text if self.continues else form.replace("{question}", self.text)


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Return a file's questions, the first ``limit`` of them.

    Raises InvalidRequestError naming the item that is malformed, or when the file is unreadable or empty.
    """
    items = _items(path)
    if not items:
        raise InvalidRequestError(f"{path}: holds no questions")
    questions = []
    for number, item in enumerate(items[:limit], 1):
        try:
            questions.append(parse_question(item))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InvalidRequestError(f"{path}: item {number}: {what}") from None
    return questions


def _items(path: Path) -> list[Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path}: is not UTF-8 text (at byte {error.start})") from None
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{path}: is not valid JSON ({error})") from None
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InvalidRequestError(f"{path}: line {number} is not valid JSON ({error})") from None
    return items


def parse_question(item: Any) -> Question:
    """Return an item as a Question. Raises ValueError or KeyError saying what is wrong with it."""
    if not isinstance(item, dict):
        raise ValueError("is not a JSON object")
    if "instruction" in item:
        return _instruction(item)
    if "endings" in item:
        return _question(item["ctx"], item["endings"], None, item["label"], continues=True)
    question, choices = item["question"], item.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    labels = None
    if isinstance(choices, dict):
        choices, labels = choices["text"], choices.get("label")
    elif isinstance(choices, list) and choices and isinstance(choices[0], dict):
        choices, labels = [one["text"] for one in choices], [one["label"] for one in choices]
    answer = item["answerKey"] if "answerKey" in item else item["answer"]
    return _question(question, choices, labels, answer)


def _instruction(item: dict[str, Any]) -> Question:
    body = re.split(r"\s*Answer format:", item["instruction"])[0]
    question, *rest = re.split(r"\s*Answer(\d+):\s*", body)
    question = re.sub(r"^Please choose the correct answer to the question:\s*", "", question)
    labels = [f"answer{number}" for number in rest[::2]]
    return _question(question.strip(), [text.strip() for text in rest[1::2]], labels, item["answer"])


def _question(text: Any, choices: Any, labels: Sequence[Any] | None, answer: Any, continues: bool = False) -> Question:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the question is empty or no text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("there are fewer than two choices")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("a choice is empty or no text")
    if labels is not None and len(labels) != len(choices):
        raise ValueError(f"there are {len(labels)} labels for {len(choices)} choices")
    index = _index(choices, labels, answer)
    return Question(text.rstrip(), tuple(choice.strip() for choice in choices), index, continues)


def _index(choices: list[str], labels: Sequence[Any] | None, answer: Any) -> int:
    if labels is not None:
        if answer in labels:
            return list(labels).index(answer)
        raise ValueError(f"the answer {answer!r} is none of the labels")
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if re.fullmatch(r"\d+", answer):
            answer = int(answer)
        elif re.fullmatch(r"[A-Za-z]", answer):
            answer = ord(answer.upper()) - ord("A")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"the answer {answer!r} is none of the {len(choices)} choices")
    return answer
