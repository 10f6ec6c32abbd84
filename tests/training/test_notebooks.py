from __future__ import annotations

import random

import pytest
from data import Corpus, Mixture, Rows, parse_dialogues, parse_stories, read_text
from notebooks import DIGIT_WEIGHT, Encoder, draw_facts, notebook, write_notebook
from paths import FOLDER, STORY
from tokenizers import Tokenizer
from trials import draw_trials
from vocabulary import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer) -> Corpus:
    return Corpus.encode(tokenizer, STORY * 80)


def test_facts_have_distinct_keys_and_codes() -> None:
    facts = draw_facts(random.Random(0), 200, digits=(3, 4, 5))
    assert len({fact.key for fact in facts}) == len({fact.code for fact in facts}) == 200
    assert {len(fact.code) for fact in facts} == {3, 4, 5}


def test_alike_facts_differ_from_another_in_one_word() -> None:
    facts = draw_facts(random.Random(0), 12, alike=1.0)
    assert len({fact.key for fact in facts}) == 12
    for index, fact in enumerate(facts[1:], 1):
        words = fact.key.split()
        assert any(sum(a != b for a, b in zip(words, other.key.split(), strict=True)) == 1 for other in facts[:index])


@pytest.mark.parametrize("length", [128, 256, 1024])
def test_every_fact_is_stated_once_and_the_weights_mark_the_digits(
    tokenizer: Tokenizer, corpus: Corpus, length: int
) -> None:
    rng, encoder = random.Random(length), Encoder(tokenizer)
    for _ in range(20):
        row = notebook(rng, encoder, length, lambda room: corpus.filler(rng, room))
        assert len(row.ids) == len(row.weights) <= length
        text = tokenizer.decode(row.ids, skip_special_tokens=False)
        question, *answers = text.split("assistant<|end_header_id|>\n\n")
        marked = "".join(tokenizer.decode([i]) for i, w in zip(row.ids, row.weights, strict=True) if w == DIGIT_WEIGHT)
        codes = []
        for answer in answers:
            sentence = answer.split("<|eot_id|>")[0]
            assert question.count(sentence) == 1
            codes.append(sentence.split(" is ")[1].rstrip("."))
        assert marked == "".join(codes)


def test_a_notebook_that_cannot_fit_is_refused(tokenizer: Tokenizer, corpus: Corpus) -> None:
    rng = random.Random(0)
    facts = draw_facts(rng, 12)
    with pytest.raises(ValueError, match="12 facts"):
        write_notebook(rng, Encoder(tokenizer), facts, facts, 128, lambda room: corpus.filler(rng, room))


def test_every_digit_is_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(" 4821.", add_special_tokens=False).tokens == ["Ġ", "4", "8", "2", "1", "."]


def test_filler_starts_with_a_sentence_and_says_where_others_do(tokenizer: Tokenizer, corpus: Corpus) -> None:
    ids, starts = corpus.filler(random.Random(3), 200)
    assert len(ids) == 200 and starts[0] == 0
    assert all(tokenizer.decode(ids[:start]).rstrip(' "')[-1] in ".!?" for start in starts[1:])


def test_trials_are_reproducible_and_of_exact_length(tokenizer: Tokenizer, corpus: Corpus) -> None:
    first, again = (draw_trials(Encoder(tokenizer), corpus, 256, 5, seed=7) for _ in range(2))
    assert [trial.prompt for trial in first] == [trial.prompt for trial in again]
    for trial in first:
        assert len(trial.answered.ids) == 256
        assert trial.answered.ids[: len(trial.prompt)] == trial.prompt
        text = tokenizer.decode(trial.prompt)
        assert text.count("The code of") == 6 and text.count(trial.fact.sentence) == 1


def test_every_kind_of_row_fills_its_length(tokenizer: Tokenizer, corpus: Corpus) -> None:
    rows = Rows(tokenizer, {"story": corpus}, [[("user", "Hello."), ("assistant", "Hi, Tom.")]], seed=0)
    for mixture in (Mixture(1, 0, 0), Mixture(0, 1, 0), Mixture(0, 0, 1), Mixture(0, 0, 0)):
        ids, targets, weights = rows.batch(3, 128, mixture)
        assert ids.shape == targets.shape == weights.shape == (3, 128)
        assert bool((ids[:, 1:] == targets[:, :-1]).all()) and bool((weights > 0).any())


def test_copied_tokens_can_be_known(tokenizer: Tokenizer, corpus: Corpus) -> None:
    row = Rows(tokenizer, {"story": corpus}, [], seed=1).copying(128)
    period = row.weights.index(1.0) - 1
    assert row.ids[1 + period :] == row.ids[1:-period]


def test_texts_are_split_and_parsed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.txt").write_text("x" * 95 + "y" * 5)
    assert read_text(tmp_path, "a.txt") == "x" * 95
    assert read_text(tmp_path, "a.txt", held_out=True) == "y" * 5
    chats = parse_dialogues("User: Hey.\nBot: Hello.<|endoftext|>\nBot: Who?\nUser: Me.<|endoftext|>")
    assert chats == [[("user", "Hey."), ("assistant", "Hello.")]]
    stories = parse_stories("Some end.\n\n" + STORY * 3 + "\n\nOnce upon a time it was short.")
    assert len(stories) == 1 and stories[0][1] == ("assistant", (STORY * 3).strip())
