from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ziggurat.runtime.bindings import Context, ContextSettings, Model
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.evaluate.choices import ChoicesResult, encode, evaluate_choices
from ziggurat.runtime.evaluate.choices_file import DEFAULT_PROMPT, Question, parse_question, read_questions
from ziggurat.runtime.evaluate.decoder import DecodeSettings
from ziggurat.runtime.evaluate.monitor import Monitor
from ziggurat.runtime.evaluate.scoring import log_softmax

SETTINGS = DecodeSettings(n_batch=64, n_ubatch=64, flash_attention="off", threads=1)
QUESTIONS = [
    Question("what is in the hat", ("a cat", "an ant and the tent", "b"), 1),
    Question("and the", ("end", "the the the the"), 0, continues=True),
    Question("the cat sat in the tent and then the cat sat in the hat " * 3, ("a", "an", "the", "hat", "tent"), 4),
]
CHOICES = ["one", "two", "three"]


def alone(model: Model, prompt: str, choice: str) -> tuple[float, int]:
    """The log-likelihood of a choice, computed without sharing anything."""
    context_tokens = model.vocab.tokenize(prompt, add_special=True, parse_special=False)
    tokens = model.vocab.tokenize(f"{prompt} {choice}", add_special=True, parse_special=False)
    assert tokens[: len(context_tokens)] == context_tokens
    with Context(model, ContextSettings(n_ctx=256, n_threads=1, flash_attention="off")) as context:
        batch = context.new_batch()
        batch.add(tokens, 0, 0, output_last=False)
        batch.want(0, len(tokens))
        context.decode(batch)
        rows = log_softmax(context.output_logits())
    first = len(context_tokens)
    scored = tokens[first:]
    return float(rows[np.arange(first - 1, len(tokens) - 1), scored].sum()), len(scored)


def test_scores_are_those_of_every_choice_on_its_own(spm_model: Model) -> None:
    result = evaluate_choices(spm_model, QUESTIONS, SETTINGS, Monitor(), DEFAULT_PROMPT)
    for question, scores, counts in zip(QUESTIONS, result.log_likelihoods, result.n_tokens, strict=True):
        for choice, got, count in zip(question.choices, scores, counts, strict=True):
            wanted, n_tokens = alone(spm_model, question.prompt(), choice)
            assert got == pytest.approx(wanted, abs=2e-3)
            assert count == n_tokens


def test_a_merge_over_the_seam_shortens_the_prefix(bpe_model: Model) -> None:
    # "Ġthe" is one token of this vocabulary, so "th" of the prompt would not be a prefix of it
    item = encode(bpe_model.vocab, Question("in th", ("e", "in"), 0, continues=True), DEFAULT_PROMPT)
    text = bpe_model.vocab.detokenize([*item.prefix, *item.endings[0]])
    assert text == "in th e"


def test_accuracies_by_hand() -> None:
    questions = [Question("q", ("aa", "bbbbbbbb"), 1), Question("q", ("aa", "bb"), 0), Question("q", ("a", "b"), 1)]
    result = ChoicesResult(questions, [[-2.0, -3.0], [-1.0, -2.0], [-1.0, -1.0]], [[1, 4], [1, 1], [1, 1]])
    figures = result.as_json(items=True)
    assert result.picks() == {
        "accuracy": [0, 0, 0],  # of equals the first
        "accuracy_per_token": [1, 0, 0],
        "accuracy_per_byte": [1, 0, 0],
    }
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert figures["accuracy_per_token"] == pytest.approx(2 / 3)
    assert figures["accuracy_se"] == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    assert figures["chance"] == 0.5
    assert [item["picked"] for item in figures["by_item"]] == [0, 0, 0]
    assert "by_item" not in result.as_json()


@pytest.mark.parametrize(
    "item",
    [
        {"question": "q?", "choices": CHOICES, "answer": 1},
        {"question": "q?", "choices": CHOICES, "answer": "1"},
        {"question": "q?", "choices": CHOICES, "answer": "B"},
        {"question": "q?", "choices": CHOICES, "answer": "two"},
        {"question": "q?", "choices": {"text": CHOICES, "label": ["A", "B", "C"]}, "answerKey": "B"},
        {"question": "q?", "choices": {"text": CHOICES, "label": ["1", "2", "3"]}, "answerKey": "2"},
        {
            "question": {
                "stem": "q?",
                "choices": [{"text": c, "label": x} for c, x in zip(CHOICES, "ABC", strict=True)],
            },
            "answerKey": "B",
        },
        {
            "instruction": "Please choose the correct answer to the question: q?\n\nAnswer1: one Answer2: two "
            "Answer3: three\n\nAnswer format: answer1/answer2/answer3",
            "input": "",
            "answer": "answer2",
        },
    ],
)
def test_forms_of_a_question(item: dict[str, Any]) -> None:
    question = parse_question(item)
    assert question == Question("q?", ("one", "two", "three"), 1)
    assert question.prompt() == "Question: q?\nAnswer:"
    assert question.prompt("{question} =") == "q? ="


def test_hellaswag_endings_continue_the_context() -> None:
    question = parse_question({"ctx": "A man sits. He", "endings": [" runs. ", "eats."], "label": "1", "ind": 4})
    assert question == Question("A man sits. He", ("runs.", "eats."), 1, continues=True)
    assert question.prompt() == "A man sits. He"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([1], "is not a JSON object"),
        ({"choices": CHOICES, "answer": 0}, "'question' is missing"),
        ({"question": "q", "choices": CHOICES}, "'answer' is missing"),
        ({"question": " ", "choices": CHOICES, "answer": 0}, "the question is empty"),
        ({"question": "q", "choices": ["one"], "answer": 0}, "fewer than two choices"),
        ({"question": "q", "answer": 0}, "fewer than two choices"),
        ({"question": "q", "choices": ["one", ""], "answer": 0}, "a choice is empty"),
        ({"question": "q", "choices": ["one", 2], "answer": 0}, "a choice is empty or no text"),
        ({"question": "q", "choices": CHOICES, "answer": 3}, "the answer 3 is none of the 3 choices"),
        ({"question": "q", "choices": CHOICES, "answer": "D"}, "none of the 3 choices"),
        ({"question": "q", "choices": CHOICES, "answer": True}, "none of the 3 choices"),
        ({"question": "q", "choices": CHOICES, "answer": "four"}, "none of the 3 choices"),
        ({"question": "q", "choices": {"text": CHOICES, "label": ["A"]}, "answerKey": "A"}, "1 labels for 3"),
        ({"question": "q", "choices": {"text": CHOICES, "label": ["A", "B", "C"]}, "answerKey": "D"}, "of the labels"),
        ({"instruction": 5, "answer": "answer1"}, "expected string"),
        ({"instruction": "no answers here", "answer": "answer1"}, "fewer than two choices"),
    ],
)
def test_a_malformed_item_is_named(tmp_path: Path, item: Any, message: str) -> None:
    good = {"question": "q", "choices": CHOICES, "answer": 0}
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([good, item]))
    with pytest.raises(InvalidRequestError, match=r"questions\.json: item 2: .*" + message):
        read_questions(path)
    assert len(read_questions(path, limit=1)) == 1


def test_json_lines_and_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    line = json.dumps({"question": "q\u2028?", "choices": CHOICES, "answer": 0}, ensure_ascii=False)
    path.write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    assert len(read_questions(path)) == 2
    for text, message in (
        (line + "\n{", "line 2 is not valid JSON"),
        ("[" + line, "is not valid JSON"),
        ("", "holds no questions"),
        ("[]", "holds no questions"),
        ("[" * 100_000, "is not valid JSON"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InvalidRequestError, match=message):
            read_questions(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InvalidRequestError, match="is not UTF-8 text"):
        read_questions(path)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_questions(tmp_path / "missing.json")


def test_a_question_beyond_the_trained_context_is_named(spm_model: Model) -> None:
    long = Question("the cat " * 1000, ("a", "b"), 0)
    with pytest.raises(InvalidRequestError, match=r"question 2 takes \d+ tokens, the model was trained for 1024"):
        evaluate_choices(spm_model, [QUESTIONS[0], long], SETTINGS, Monitor(), DEFAULT_PROMPT)
