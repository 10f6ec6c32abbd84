from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_models
from ziggurat.runtime.bindings import Context, ContextSettings, Model
from ziggurat.runtime.budget import parse_budget
from ziggurat.runtime.engine import draft_loader
from ziggurat.runtime.engine.draft_loader import load_draft, plan_draft
from ziggurat.runtime.engine.draft_model import DraftModel
from ziggurat.runtime.engine.speculation import Drafter, Wanted
from ziggurat.runtime.errors import DecodeAborted, DecodeError, ModelFileError, UnsupportedError
from ziggurat.runtime.kv_policy import KVPolicy

SETTINGS = ContextSettings(n_ctx=512, n_ubatch=64, n_seq_max=3, n_threads=1)
PROMPTS = [[1, *range(260 + slot, 280, slot + 1)] for slot in range(3)]
LONG = [1] + [3 + (7 * n) % 250 for n in range(299)]
POLICY = KVPolicy(budget=parse_budget("96"), window=16)


@pytest.fixture
def drafter(spm_path: Path, spm_model: Model) -> Iterator[DraftModel]:
    """The target itself as its draft, of which every token is taken."""
    made = load_draft(spm_path, spm_model, SETTINGS, threshold=0.0)
    yield made
    made.close()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every batch that is decoded."""
    sizes: list[int] = []
    original = Context.decode

    def decode(context: Context, batch: Any) -> None:
        sizes.append(len(batch))
        original(context, batch)

    monkeypatch.setattr(Context, "decode", decode)
    return sizes


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> None:
    original, left = Context.decode, [times]

    def decode(context: Context, batch: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise error
        original(context, batch)

    monkeypatch.setattr(Context, "decode", decode)


def greedy(model: Model, tokens: Sequence[int], count: int) -> list[int]:
    with Context(model, ContextSettings(n_ctx=1024, n_threads=1)) as context:
        batch, out, part, position = context.new_batch(), [], list(tokens), 0
        for _ in range(count):
            batch.clear()
            index = batch.add(part, position, 0, output_last=True)
            context.decode(batch)
            position += len(part)
            part = [int(context.logits(index).argmax())]
            out += part
    return out


def read(drafter: DraftModel, slot: int, tokens: Sequence[int]) -> int:
    """Let it read; return the number of steps."""
    reader, steps = drafter.reader(slot, tokens), 0
    if reader is not None:
        seen = [reader.progress]
        while not reader.step():
            seen.append(reader.progress)
        assert reader.step()  # nothing more happens
        assert seen == sorted(seen)
        assert reader.progress == 1.0
        steps = len(seen)
    return steps


def one(drafter: DraftModel, tokens: Sequence[int], limit: int = 5, slot: int = 0) -> list[int]:
    return drafter.draft([Wanted(slot, tokens, limit)])[0]


def test_all_sequences_get_the_models_own_choice(drafter: DraftModel, spm_model: Model, decoded: list[int]) -> None:
    as_drafter: Drafter = drafter
    steps = [read(drafter, slot, prompt) for slot, prompt in enumerate(PROMPTS)]
    assert steps == [1, 1, 0]  # the last is short enough to be read with the draft
    decoded.clear()
    drafts = as_drafter.draft([Wanted(slot, prompt, 3 + slot) for slot, prompt in enumerate(PROMPTS)])
    assert decoded[1:] == [3, 3, 2, 1]  # one batch for all
    for prompt, draft, count in zip(PROMPTS, drafts, (3, 4, 5), strict=True):
        assert draft == greedy(spm_model, prompt, count)


@pytest.mark.parametrize("accepted", [0, 2, 5])
def test_what_was_not_accepted_is_taken_back(
    drafter: DraftModel, spm_model: Model, decoded: list[int], accepted: int
) -> None:
    tokens = list(PROMPTS[0])
    read(drafter, 0, tokens)
    for _ in range(3):
        draft = one(drafter, tokens)
        other = (draft[accepted] + 1) % 290 if accepted < 5 else 17
        tokens += [*draft[:accepted], other]
        decoded.clear()
        assert drafter.reader(0, tokens) is None
        again = one(drafter, tokens)
        assert decoded == [1 + (accepted == 5), 1, 1, 1, 1]  # what it had not seen, and its drafts
        assert again == greedy(spm_model, tokens, 5)
        assert one(drafter, list(tokens), 2) == greedy(spm_model, tokens, 2)  # another list, the same tokens


def test_another_prompt_in_the_slot(drafter: DraftModel, spm_model: Model) -> None:
    for tokens in (LONG, [*LONG[:200], 9, 9, 9], LONG[:250], [1, *range(260, 290)]):
        read(drafter, 1, tokens)
        assert one(drafter, tokens, slot=1) == greedy(spm_model, tokens, 5)
    assert drafter.context.last_position(1) == 30 + 4
    drafter.forget(1)
    assert drafter.context.last_position(1) == -1
    read(drafter, 1, LONG)
    assert one(drafter, LONG, slot=1) == greedy(spm_model, LONG, 5)


def test_prompts_are_read_in_ubatches(drafter: DraftModel, decoded: list[int], spm_model: Model) -> None:
    reader = drafter.reader(0, LONG)
    assert reader is not None
    assert not reader.step()
    assert one(drafter, LONG) == []  # not while something is to be read
    assert drafter.reader(0, [*LONG, 5]) is reader
    assert not reader.step()
    assert decoded == [64, 64]
    reader.cancel()
    reader.cancel()
    assert reader.step()
    assert read(drafter, 0, LONG) == 3  # on from where it was
    assert decoded == [64, 64, 64, 64, 300 - 4 * 64]
    assert one(drafter, LONG) == greedy(spm_model, LONG, 5)
    first = drafter.reader(1, LONG)
    other = drafter.reader(1, PROMPTS[0])
    assert first is not other is not None
    assert first is not None and first.step()  # given up


def test_a_full_context_ends_drafting(drafter: DraftModel, spm_model: Model) -> None:
    tokens = (LONG * 2)[:508]
    read(drafter, 0, tokens)
    assert len(one(drafter, tokens, 15)) == 5  # the last of them needs no row
    tokens += [5] * 4
    assert len(one(drafter, tokens, 15)) == 1
    tokens += [5]
    assert one(drafter, tokens, 15) == []
    tokens += [5] * 100
    assert drafter.reader(0, tokens) is None
    assert drafter.draft([Wanted(0, tokens, 3), Wanted(2, PROMPTS[2], 3)]) == [[], greedy(spm_model, PROMPTS[2], 3)]


def test_an_unlikely_token_ends_the_draft(spm_path: Path, spm_model: Model) -> None:
    lengths = []
    for threshold in (0.0, 0.2, 1.0):
        made = load_draft(spm_path, spm_model, SETTINGS, threshold=threshold)
        lengths.append([len(one(made, tokens, 15)) for tokens in ([1, first] for first in range(262, 282))])
        made.close()
    everything, some, nothing = lengths
    assert set(everything) == {15} and set(nothing) == {0}
    assert 0 < sum(some) < sum(everything)


def test_an_end_is_not_drafted(drafter: DraftModel, spm_model: Model) -> None:
    expected = greedy(spm_model, PROMPTS[0], 5)
    drafter._ends = frozenset(expected[3:4])
    assert expected[3] not in expected[:3]
    read(drafter, 0, PROMPTS[0])
    assert one(drafter, PROMPTS[0]) == expected[:3]


def test_more_than_a_batch_takes(spm_path: Path, spm_model: Model) -> None:
    settings = ContextSettings(n_ctx=256, n_batch=4, n_ubatch=4, n_seq_max=3, n_threads=1)
    made = load_draft(spm_path, spm_model, settings, threshold=0.0)
    prompts = [[1, 270 + slot, 265, 266, 267, 268, 269] for slot in range(3)]
    drafts = made.draft([Wanted(slot, prompt, 3) for slot, prompt in enumerate(prompts)])
    assert drafts == [greedy(spm_model, prompt, 3) for prompt in prompts]
    made.close()


# --- faults


def test_a_failed_decode_means_no_drafts(
    drafter: DraftModel, spm_model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = PROMPTS[0]
    read(drafter, 0, tokens)
    failing(monkeypatch, DecodeError("out of memory", -3), 2)
    with caplog.at_level(logging.WARNING):
        assert one(drafter, tokens) == []
        reader = drafter.reader(0, tokens)
        assert reader is not None and reader.step()  # the second fault
    assert [record.message for record in caplog.records] == ["no drafts: out of memory"] * 2
    read(drafter, 0, tokens)
    assert one(drafter, tokens) == greedy(spm_model, tokens, 5)


def test_it_is_left_alone_after_three_failures(
    drafter: DraftModel, decoded: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, DecodeError("out of memory", -3), 99)
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            assert one(drafter, PROMPTS[2]) == []
    assert len(caplog.records) == 3
    assert "there will be none any more" in caplog.text
    assert drafter.reader(0, LONG) is None


def test_an_abort_is_no_failure(drafter: DraftModel, spm_model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            drafter.context.abort.set()
            assert one(drafter, PROMPTS[2]) == []
            drafter.context.abort.clear()
    assert not caplog.records
    assert one(drafter, PROMPTS[2]) == greedy(spm_model, PROMPTS[2], 5)
    assert issubclass(DecodeAborted, DecodeError)


def test_tokens_that_only_the_target_has(drafter: DraftModel) -> None:
    n_vocab = drafter.model.vocab.n_tokens
    assert one(drafter, [1, n_vocab, 270]) == []
    assert drafter.reader(0, [*LONG, n_vocab]) is None


def test_a_closed_one_drafts_nothing(drafter: DraftModel) -> None:
    read(drafter, 0, PROMPTS[0])
    drafter.close()
    drafter.close()
    assert one(drafter, PROMPTS[0]) == []
    assert drafter.reader(0, LONG) is None


# --- with a KV budget


@pytest.fixture
def bounded(spm_path: Path, spm_model: Model, budgets: None) -> Iterator[DraftModel]:
    made = load_draft(spm_path, spm_model, SETTINGS, POLICY, threshold=0.0)
    assert made.context.kv_active
    yield made
    made.close()


def test_a_budget_reads_in_steps_and_never_ends(bounded: DraftModel) -> None:
    assert read(bounded, 0, LONG) == 5
    assert sum(bounded.context.kv_rows(0)) == 2 * 96
    tokens = [*LONG, 17]
    for _ in range(100):
        draft = one(bounded, tokens)
        assert len(draft) == 5
        assert bounded.reader(0, tokens) is None
        tokens += [*draft, 17]
    assert len(tokens) > 512
    rows, allocated = bounded.context.kv_rows(0), bounded.context.kv_capacity()
    assert all(used <= most for used, most in zip(rows, allocated, strict=True))


def test_drafts_can_be_taken_back_wherever_rows_are_selected(bounded: DraftModel) -> None:
    read(bounded, 0, LONG)
    tokens = [*LONG, 17]
    for count in range(200):
        draft = one(bounded, tokens, 15)
        assert len(draft) == 15
        tokens += [*draft[: count % 4], 17]
        assert bounded.reader(0, tokens) is None  # not read anew


def test_short_sequences_get_the_models_own_choice_with_a_budget(bounded: DraftModel, spm_model: Model) -> None:
    tokens = list(PROMPTS[0])
    read(bounded, 0, tokens)
    tokens.append(17)
    for _ in range(4):
        draft = one(bounded, tokens)
        assert draft == greedy(spm_model, tokens, 5)
        tokens += [*draft[:2], 17]


def test_a_prefix_whose_rows_were_evicted_is_read_anew(bounded: DraftModel) -> None:
    read(bounded, 0, LONG)
    other = [*LONG[:150], *LONG[:100]]
    assert read(bounded, 0, other) == 4  # all of it
    expected = one(bounded, [*other, 17])
    read(bounded, 1, other)
    assert one(bounded, [*other, 17], slot=1) == expected


def test_with_a_budget_one_prompt_is_read_at_a_time(bounded: DraftModel) -> None:
    first, second = (bounded.reader(slot, LONG) for slot in range(2))
    assert first is not None and second is None
    assert one(bounded, [*LONG, 17], slot=1) == []
    first.step()
    first.cancel()
    assert bounded.context.last_position(0) == -1
    assert read(bounded, 1, LONG) == 5
    longer = [*LONG, *range(260, 290)]
    assert read(bounded, 1, longer) == 1  # only what is new
    assert len(one(bounded, [*longer, 17], slot=1)) == 5
    bounded.reader(0, LONG)
    bounded.forget(0)
    assert read(bounded, 2, LONG) == 5


def test_what_a_sequence_went_on_by_is_caught_up_with(bounded: DraftModel) -> None:
    read(bounded, 0, LONG)
    tokens = [*LONG, *range(260, 275)]
    steps = 0
    while not (draft := one(bounded, tokens)):
        reader = bounded.reader(0, tokens)
        assert reader is not None
        reader.step()
        tokens.append(17)  # meanwhile
        steps += 1
    assert (len(draft), steps) == (5, 1)


# --- loading


def model_file(path: Path, change: Callable[[tiny_models.Tokens], None] = lambda tokens: None, **shape: Any) -> Path:
    tokens = tiny_models.spm_tokens()
    change(tokens)
    return tiny_models.write_model(path, tiny_models.Shape(**shape), tokens, seed=3)


def longer(count: int) -> Callable[[tiny_models.Tokens], None]:
    def change(tokens: tiny_models.Tokens) -> None:
        for index in range(count):
            tokens.texts.append(f"[PAD{index}]")
            tokens.scores.append(0.0)
            tokens.types.append(tiny_models.NORMAL)

    return change


def renamed(tokens: tiny_models.Tokens) -> None:
    tokens.texts[270] = "zz"


def test_another_vocabulary_is_refused(tmp_path: Path, spm_model: Model) -> None:
    path = model_file(tmp_path / "a.gguf", renamed)
    with pytest.raises(UnsupportedError, match=r"a\.gguf has another vocabulary: token 270 is 'zz', in the model '.'"):
        load_draft(path, spm_model, SETTINGS)
    path = model_file(tmp_path / "b.gguf", longer(1100))
    with pytest.raises(UnsupportedError, match="it has 1402 tokens, the model 302"):
        load_draft(path, spm_model, SETTINGS)
    with pytest.raises(ModelFileError):
        load_draft(tmp_path / "none.gguf", spm_model, SETTINGS)


def test_a_padded_vocabulary_is_taken(tmp_path: Path, spm_model: Model) -> None:
    made = load_draft(model_file(tmp_path / "a.gguf", longer(300)), spm_model, SETTINGS, threshold=0.0)
    n_vocab = spm_model.vocab.n_tokens
    drafts = [one(made, [1, first], 15) for first in range(262, 290)]
    assert all(len(draft) == 15 and max(draft) < n_vocab for draft in drafts)
    alone = [greedy(made.model, [1, first], 15) for first in range(262, 290)]
    assert max(map(max, alone)) >= n_vocab  # which the draft model itself would have chosen
    made.close()


def test_what_cannot_take_tokens_back_is_refused(
    spm_path: Path, spm_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "remove", lambda *_: False)
    with pytest.raises(UnsupportedError, match="cannot take back tokens"):
        load_draft(spm_path, spm_model, SETTINGS)
    monkeypatch.setattr(Model, "generates_text", False)
    with pytest.raises(UnsupportedError, match="does not generate text"):
        load_draft(spm_path, spm_model, SETTINGS)


def test_a_model_that_cannot_have_a_budget_keeps_every_row(
    spm_path: Path, spm_model: Model, budgets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_loader.kv, "unsupported", lambda _model: "no")
    made = load_draft(spm_path, spm_model, SETTINGS, POLICY)
    assert not made.context.kv_active
    made.close()


def test_rows_that_do_not_fit_its_heads_are_refused_by_its_name(tmp_path: Path) -> None:
    path = model_file(tmp_path / "a.gguf")
    with pytest.raises(UnsupportedError, match=r"the draft model .*a\.gguf: --cache-type-v q4_0 needs heads"):
        plan_draft(path, replace(SETTINGS, type_v="q4_0"))


def test_its_memory_is_planned(tmp_path: Path) -> None:
    path = model_file(tmp_path / "a.gguf", n_layer=3)
    full, bounded = plan_draft(path, SETTINGS), plan_draft(path, SETTINGS, POLICY)
    assert full.context == 3 * 512 * 3 * 2 * 32 * 2
    assert bounded.budget is not None
    assert sum(bounded.budget.kept_per_layer) < full.context
    with Model(path) as model:
        assert full.weights == model.n_bytes
