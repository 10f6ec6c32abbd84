from __future__ import annotations

import random
import re

import pytest

from helpers import tiny_models
from helpers.fake_engine import FakeEngine
from ziggurat.runtime.bindings import Model, Vocab
from ziggurat.runtime.errors import InvalidRequestError, TemplateError
from ziggurat.runtime.evaluate import filler
from ziggurat.runtime.evaluate.monitor import Monitor
from ziggurat.runtime.evaluate.needle import Needle, Piece, TextNeedles, TokenNeedles, Wording, grid, place
from ziggurat.runtime.evaluate.retrieval import Trial, ask, is_correct, raw_frame, results, template_frame

SENTENCE = re.compile(r"The code of (\w+'s \w+ \w+) is (\d+)\.")


def writer(vocab: Vocab, template: str | None = tiny_models.CHATML, *, raw: bool = False, text: str = filler.TEXT):
    frame = raw_frame(vocab) if raw else template_frame(vocab, template)
    return TextNeedles(vocab, text, frame, Wording(), answer_tokens=10, raw=raw)


@pytest.fixture(params=["spm", "bpe"])
def vocab(request: pytest.FixtureRequest) -> Vocab:
    model: Model = request.getfixturevalue(f"{request.param}_model")
    return model.vocab


# --- documents of text


@pytest.mark.parametrize("length", [700, 701, 3000])
@pytest.mark.parametrize("depth", [0.0, 0.33, 1.0])
def test_length_is_exact_and_each_fact_is_there_once(bpe_model: Model, length: int, depth: float) -> None:
    vocab = bpe_model.vocab
    needle = writer(vocab)(random.Random(1), length, depth, 5)
    assert len(needle.prompt) == length - 10
    text = vocab.detokenize(needle.prompt, special=True)
    facts = SENTENCE.findall(text)
    assert len(facts) == len(set(facts)) == len({key for key, _ in facts}) == len({value for _, value in facts}) == 5
    assert (needle.key, needle.expected) in facts
    assert text.count(needle.expected) == 1
    assert re.fullmatch(r"\d{4}", needle.expected)
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith(f"\n\nWhat is the code of {needle.key}?<|im_end|>\n<|im_start|>assistant\n")


def test_the_fact_is_where_it_was_asked_for(vocab: Vocab) -> None:
    write = writer(vocab, raw=True)
    for depth in (0.0, 0.2, 0.5, 0.9, 1.0):
        needle = write(random.Random(7), 4000, depth, 4)
        text = vocab.detokenize(needle.prompt)
        body = text[: text.rindex("The code of")]  # without the stem at the end
        before, after = body.split(f"The code of {needle.key} is {needle.expected}.")
        assert len(before.strip()) / len((before + after).strip()) == pytest.approx(depth, abs=0.06)
        assert needle.actual_depth == pytest.approx(depth, abs=0.06)
        assert before.strip() == "" or before.rstrip(' "').endswith((".", "!", "?"))


def test_a_raw_prompt_ends_with_the_beginning_of_the_fact(vocab: Vocab) -> None:
    needle = writer(vocab, raw=True)(random.Random(3), 600, 0.5, 2)
    text = vocab.detokenize(needle.prompt, special=True)
    assert text.endswith(f" The code of {needle.key} is")
    assert "  " not in text.removeprefix("<s>").strip()
    if vocab.adds_bos:
        assert needle.prompt[0] == vocab.bos
        assert vocab.bos not in needle.prompt[1:]


def test_documents_are_the_same_for_the_same_seed_whatever_else_is_in_the_grid(vocab: Vocab) -> None:
    write = writer(vocab, raw=True)
    one = list(grid(write, [700], [0.5], [3], 2, seed=5))
    among = list(grid(write, [600, 700], [0.0, 0.5], [1, 3], 3, seed=5))
    assert set(one) <= set(among)
    assert len(among) == len(set(among)) == 2 * 2 * 2 * 3
    assert one != list(grid(write, [700], [0.5], [3], 2, seed=6))


def test_too_short_a_length_says_how_long_it_must_be(bpe_model: Model) -> None:
    write = writer(bpe_model.vocab)
    with pytest.raises(InvalidRequestError, match=r"100 tokens have no room for 6 facts.*at least (\d+)") as caught:
        write(random.Random(0), 100, 0.5, 6)
    least = int(str(caught.value).split()[-1])
    assert len(write(random.Random(0), least, 0.5, 6).prompt) == least - 10


def test_fillers_that_cannot_be_used(bpe_model: Model) -> None:
    with pytest.raises(InvalidRequestError, match="fewer than 8 tokens"):
        writer(bpe_model.vocab, text="in")
    digits = " ".join(f"{number}." for number in range(100, 1000))
    wording = Wording(digits=2)
    write = TextNeedles(bpe_model.vocab, digits, raw_frame(bpe_model.vocab), wording, answer_tokens=4, raw=True)
    with pytest.raises(InvalidRequestError, match="contains too many numbers"):
        write(random.Random(0), 900, 0.5, 6)


def test_wording() -> None:
    wording = Wording("{key} holds {value}!", "And {key}?", 7)
    assert wording.state("K", "12") == "K holds 12!"
    assert wording.stem("K") == "K holds"
    assert wording.ask("K") == "And K?"
    for bad in ({"fact": "no key {value}"}, {"fact": "{key}"}, {"question": "what?"}, {"digits": 0}):
        with pytest.raises(InvalidRequestError):
            Wording(**bad)  # type: ignore[arg-type]


def test_templates_that_do_not_show_the_message(bpe_model: Model) -> None:
    vocab = bpe_model.vocab
    with pytest.raises(TemplateError, match="no chat template.*--raw"):
        template_frame(vocab, None)
    for source, times in (("fixed", 0), ("{{ messages[0].content * 2 }}", 2)):
        with pytest.raises(TemplateError, match=f"shows the message {times} times"):
            template_frame(vocab, source)


def test_place_takes_the_nearest_opening() -> None:
    pieces = [Piece([1, 1]), Piece([2, 2, 2, 2], opens=False), Piece([3, 3, 3, 3])]
    assert place(pieces, [9], 0.0) == ([9, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3], 0.0)
    assert place(pieces, [9], 0.3) == ([9, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3], 0.0)  # 0.2 is closed
    assert place(pieces, [9], 0.5) == ([1, 1, 2, 2, 2, 2, 9, 3, 3, 3, 3], 0.6)
    assert place(pieces, [9], 1.0) == ([1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 9], 1.0)
    assert place([], [9], 0.5) == ([9], 0.0)


# --- documents of tokens


def test_token_documents(vocab: Vocab) -> None:
    needle = TokenNeedles(vocab)(random.Random(2), 400, 0.5, 3)
    value, key = needle.expected_tokens, needle.prompt[-2:]
    assert len(needle.prompt) + len(value) == needle.length == 400
    places = [i for i in range(len(needle.prompt) - 2) if needle.prompt[i : i + 2] == key]
    assert len(places) == 1
    assert needle.prompt[places[0] + 2 : places[0] + 6] == value
    for token in (*key, *value):
        assert needle.prompt.count(token) == (2 if token in key else 1)
    assert needle.actual_depth == pytest.approx(0.5, abs=0.02)
    assert all(vocab.is_normal(token) for token in needle.prompt[1:])
    assert (needle.prompt[0] == vocab.bos) == vocab.adds_bos


def test_token_documents_that_are_not_possible(spm_model: Model) -> None:
    write = TokenNeedles(spm_model.vocab)
    with pytest.raises(InvalidRequestError, match="60 tokens of ordinary vocabulary"):
        write(random.Random(0), 400, 0.5, 10)
    with pytest.raises(InvalidRequestError, match="take at least"):
        write(random.Random(0), 20, 0.5, 3)


# --- asking


def needle_of(length: int, depth: float, facts: int = 1, expected: str = "4821") -> Needle:
    return Needle((1, 2, 3), length, depth, depth, facts, "Tom's red box", expected, ())


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The code of Tom's red box is 4821.", True),
        (" 4821", True),
        ("4821 or 1111", True),
        ("1111 or 4821", False),
        ("48210", False),
        ("482", False),
        ("04821", False),
        ("", False),
        ("I do not know.", False),
    ],
)
def test_only_the_exact_number_is_right(answer: str, right: bool) -> None:
    assert is_correct(needle_of(512, 0.5), answer, [5]) is right


def test_tokens_must_be_exact() -> None:
    needle = Needle((1,), 10, 0.5, 0.5, 1, "k", "", (7, 8))
    assert is_correct(needle, "", [7, 8])
    assert is_correct(needle, "", [7, 8, 9])
    assert not is_correct(needle, "", [7])
    assert not is_correct(needle, "", [7, 9])


def test_results_make_grids() -> None:
    cells = [(512, 0.0, True), (512, 0.0, False), (512, 1.0, True), (512, 1.0, True)]
    cells += [(1024, 0.0, False), (1024, 0.0, False), (1024, 1.0, True), (1024, 1.0, False)]
    trials = [Trial(needle_of(length, depth, 6), "x", right) for length, depth, right in cells]
    trials.append(Trial(needle_of(512, 0.0, 1), "x", True))
    figures = results(trials)
    assert figures["accuracy"] == 5 / 9
    assert [one["facts"] for one in figures["grids"]] == [1, 6]
    many = figures["grids"][1]
    assert many["lengths"] == [512, 1024]
    assert many["depths"] == [0.0, 1.0]
    assert many["by_cell"] == [[0.5, 1.0], [0.0, 0.5]]
    assert many["by_length"] == [0.75, 0.25]
    assert many["accuracy"] == 0.5
    assert figures["by_trial"][0]["expected"] == "4821"


def test_questions_are_asked_greedily_and_in_order() -> None:
    reports: list[tuple[str, int, int]] = []
    monitor = Monitor(lambda *args: reports.append(args))
    needles = [needle_of(512, depth / 10, expected="4821" if depth % 2 else "1111") for depth in range(11)]
    engine = FakeEngine(["It is ", "48", "21."])
    engine.load()
    trials = ask(engine, needles, len(needles), monitor, answer_tokens=12)
    engine.close()
    assert [trial.correct for trial in trials] == [bool(depth % 2) for depth in range(11)]
    assert [trial.needle for trial in trials] == needles
    assert {request.sampling.temperature for request in engine.requests} == {0.0}
    assert {request.max_tokens for request in engine.requests} == {12}
    assert {request.tokens for request in engine.requests} == {(1, 2, 3)}
    assert reports[-1] == ("documents", 11, 11)
