from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import heads
import pytest
import torch
from data import Corpus, Mixture, Rows
from model import Llama, Shape
from muon import Muon, orthogonalise
from notebooks import COLOURS, DIGIT_WEIGHT, NAMES, THINGS
from paths import FOLDER, STORY
from train import DEFAULT_PLAN, Stage, Trainer, read_plan
from trials import draw_trials
from vocabulary import load_tokenizer

MICRO = Shape(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=32, rope_base=1e6, context=128)
PLAN = [
    Stage(768, 0.5, {"128": 0.5, "160": 0.5}, 64, text=0.5, chat=0.2, copy=0.3, rate=(0.1, 1.0), step_tokens=256),
    Stage(800, 0.0, {"128": 1.0}, 64, text=0.3, chat=0.3, copy=0.4, rate=(1.0, 0.0), step_tokens=256, dropout=0.2),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def rows(seed: int) -> Rows:
    tokenizer = load_tokenizer(FOLDER)
    chats = [[("user", "Hello."), ("assistant", "Hi, Tom. How are you?")]]
    return Rows(tokenizer, {"story": Corpus.encode(tokenizer, STORY * 40)}, chats, seed)


def trainer(seed: int = 0) -> Trainer:
    return Trainer(rows(seed), MICRO, seed, constructed=False)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer()
    whole.run(PLAN, 6)
    half = trainer()
    half.run(PLAN, 3)
    half.save(tmp_path / "checkpoint.pt")
    other = trainer(seed=5)  # nothing of it may survive loading
    other.load(tmp_path / "checkpoint.pt")
    other.run(PLAN, 3)
    assert (other.step, other.stage, other.tokens) == (whole.step, whole.stage, whole.tokens)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    trainer().save(tmp_path / "checkpoint.pt")
    other = Trainer(rows(0), dataclasses.replace(MICRO, ffn=64), 0, constructed=False)
    with pytest.raises(SystemExit, match="made for"):
        other.load(tmp_path / "checkpoint.pt")


def test_training_lowers_the_loss_and_ends_with_the_plan() -> None:
    run = trainer()
    plan = [Stage(40 * 512, 0.0, {"128": 1.0}, 128, text=1.0, chat=0.0, copy=0.0, rate=(1.0, 0.2), step_tokens=512)]
    first = run.run(plan, 4)
    last = run.run(plan, 36)
    assert first is not None and last is not None and last["text"] < first["text"] - 1.0
    assert run.run(plan, 1) is None


def test_plans_are_read_and_wrong_ones_refused(tmp_path: Path) -> None:
    assert all(stage.tokens > 0 for stage in read_plan(DEFAULT_PLAN))
    wrong = tmp_path / "plan.json"
    wrong.write_text(json.dumps([{"tokens": 1, "rate": [1, 1], "colour": "red"}]))
    with pytest.raises(SystemExit, match="not a plan"):
        read_plan(wrong)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for size in ((3, 24, 16), (3, 16, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(size, generator=torch.Generator().manual_seed(0))))
        assert 0.5 < float(values.min()) and float(values.max()) < 1.4


def test_muon_scales_its_groups() -> None:
    slow, fast = (torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    optimizer = Muon([{"params": [slow], "scale": 0.1}, {"params": [fast]}], lr=0.5)
    slow.grad = fast.grad = torch.eye(8)
    optimizer.step()
    torch.testing.assert_close(fast.detach(), 10 * slow.detach())


def test_constructed_heads_find_codes_before_any_training() -> None:
    data, generator = rows(0), torch.Generator().manual_seed(0)
    model = Llama(Shape())
    model.initialise(generator)
    keys = [data.encoder(f" {word}")[0] for word in (*NAMES, *COLOURS, *THINGS)] + data.encoder("0123456789")
    heads.install(model, data.batch(4, 256, Mixture(0, 0, 0))[0], keys, generator)
    held_out = Corpus.encode(load_tokenizer(FOLDER), STORY * 40)
    hits = []
    for trial in draw_trials(data.encoder, held_out, 512, 24, seed=0):
        ids, weights = torch.tensor([trial.answered.ids]), torch.tensor([trial.answered.weights])
        with torch.no_grad():
            hits.append(model.losses(ids[:, :-1], ids[:, 1:], (weights[:, 1:] == DIGIT_WEIGHT).float())[2])
    assert float(torch.cat(hits).float().mean()) > 0.4  # guessing among ten digits: 0.1


def test_constructed_heads_refuse_another_shape() -> None:
    with pytest.raises(ValueError, match="laid out"):
        heads.install(Llama(MICRO), torch.zeros(1, 4, dtype=torch.long), [], torch.Generator())
