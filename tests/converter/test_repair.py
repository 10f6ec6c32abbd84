"""The least-squares repair: exact where it has to be, never worse on held-out tokens, and folded as it was solved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import families
from ziggurat.converter import repair
from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.checkpoint import Checkpoint, open_checkpoint
from ziggurat.converter.correction import RepairSettings
from ziggurat.converter.errors import CalibrationError, PruneError
from ziggurat.converter.removal_search import removal_losses
from ziggurat.converter.repair_pass import cut

SETTINGS = CalibrateSettings(batch_tokens=64, threads=1)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(x: torch.Tensor, lacking: torch.Tensor) -> repair.Sums:
    return repair.sums(x, lacking, torch.ones(len(x), dtype=torch.float64))


@pytest.mark.parametrize("on_inputs", [True, False])
def test_exact_when_the_removed_blocks_are_linear(on_inputs: bool) -> None:
    """What is lacking is A M: W' z has to be M + A M on any token, with W' the folded projection."""
    w, a = random(6, 9, seed=1), random(6, 6, seed=2)
    z = {part: random(200, 9, seed=seed) for part, seed in (("fit", 3), ("held out", 4), ("other", 5))}
    x = {part: values if on_inputs else values @ w.T for part, values in z.items()}
    lacking = {part: values @ w.T @ a.T for part, values in z.items()}
    correction = repair.choose(sums(x["fit"], lacking["fit"]), sums(x["held out"], lacking["held out"]))
    assert correction is not None and correction.left < 1e-9
    fold = repair.fold_inputs(correction) if on_inputs else repair.fold_outputs(correction)
    got = z["other"].numpy() @ fold.weight(w.numpy()).T
    wanted = (z["other"] @ w.T + lacking["other"]).numpy()
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_outputs_fold_into_every_expert_and_into_a_bias() -> None:
    fold = repair.Fold(times=random(3, 3, seed=0).float().numpy())
    experts, bias = random(4, 3, 5, seed=1).numpy(), random(3, seed=2).numpy()
    for expert, new in zip(experts, fold.weight(experts), strict=True):
        np.testing.assert_allclose(new, fold.times @ expert, rtol=1e-5)
    np.testing.assert_allclose(fold.bias(bias), fold.times @ bias, rtol=1e-5)


def test_sums_of_parts_are_the_sum() -> None:
    x, d, w = random(50, 4, seed=0), random(50, 3, seed=1), random(50, seed=2).abs()
    parts = repair.sums(x[:20], d[:20], w[:20]) + repair.sums(x[20:], d[20:], w[20:])
    whole = repair.sums(x, d, w)
    torch.testing.assert_close(parts.xtx, whole.xtx)
    torch.testing.assert_close(parts.xtd, whole.xtd)
    assert parts.dtd == pytest.approx(whole.dtd)


def test_left_is_the_share_of_the_error() -> None:
    x, d, w, b = random(50, 4, seed=0), random(50, 3, seed=1), random(50, seed=2).abs(), random(4, 3, seed=3)
    share = (((x @ b - d).square().sum(-1) * w).sum() / (d.square().sum(-1) * w).sum()).item()
    assert repair.left(repair.sums(x, d, w), b) == pytest.approx(share)


def test_nothing_is_corrected_where_it_would_harm() -> None:
    """The held-out tokens lack the opposite of what the others lack."""
    x, other, a = random(80, 10, seed=0), random(80, 10, seed=1), random(10, 5, seed=2)
    assert repair.choose(sums(x, x @ a), sums(other, -other @ a)) is None


def test_more_regularization_for_fewer_tokens() -> None:
    a = random(20, 6, seed=9)

    def chosen(n: int) -> float:
        def part(n: int, seed: int) -> repair.Sums:
            x = random(n, 20, seed=seed)
            return sums(x, x @ a + 3 * random(n, 6, seed=seed + 1))

        correction = repair.choose(part(n, 1), part(2000, 3))
        assert correction is not None
        return correction.ridge

    assert chosen(24) > chosen(5000)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_sums_correct_nothing(value: float) -> None:
    good = sums(random(20, 4, seed=0), random(20, 3, seed=1))
    bad = repair.Sums(good.xtx * value, good.xtd * value, value)
    assert repair.choose(bad, good) is None
    assert repair.choose(good, bad) is None


def test_weights_even_out_the_size_of_states() -> None:
    states = random(3, 8, seed=0) * torch.tensor([[1.0], [100.0], [0.0]])
    weights = repair.weights(states)
    assert weights[0] * states[0].square().mean() == pytest.approx(1)
    assert weights[1] * states[1].square().mean() == pytest.approx(1)
    assert torch.isfinite(weights).all()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(families.build("llama_gqa", tmp_path_factory.mktemp("deep") / "model", layers=5))


def tokens(sequences: int = 6, positions: int = 16) -> CalibrationTokens:
    return CalibrationTokens(np.random.default_rng(0).integers(5, 250, (sequences, positions)).astype(np.int32))


def test_pass_measures_the_cut_model(deep: Checkpoint) -> None:
    """Losses and divergence of the pass are those of transformers on the held-out sequences."""
    text = tokens()
    found = cut(Blocks(deep), text, (2, 3), SETTINGS)
    assert found.folds == {} and found.loss_repaired is None and not found.helps
    held_out = [int(i) for i in text.ids[3]]  # one of six, from the middle
    whole = families.reference(deep.folder, held_out).logits[:-1].double().log_softmax(-1)
    pruned = families.reference(deep.folder, held_out, without=(2, 3)).logits[:-1].double().log_softmax(-1)
    true = torch.tensor(held_out[1:])
    assert found.loss_whole == pytest.approx(-whole.gather(-1, true[:, None]).mean().item(), rel=1e-5)
    assert found.loss_pruned == pytest.approx(-pruned.gather(-1, true[:, None]).mean().item(), rel=1e-5)
    divergence = (whole.exp() * (whole - pruned)).sum(-1).mean().item()
    assert found.divergence_pruned == pytest.approx(divergence, rel=1e-4)


@pytest.mark.parametrize("behind", [True, False])
def test_pass_corrects_the_right_blocks(deep: Checkpoint, behind: bool) -> None:
    found = cut(Blocks(deep), tokens(16, 32), (1, 3), SETTINGS, RepairSettings(behind=behind))
    assert set(found.folds) <= {0, 2, 4} if behind else set(found.folds) <= {0, 2}
    assert found.folds and all(share < 1 for share in found.left.values())
    fold = next(iter(found.folds.values()))
    assert fold.add is not None and fold.add.shape == (256, 512)


def test_nothing_removed_is_the_whole_model(deep: Checkpoint) -> None:
    found = cut(Blocks(deep), tokens(), (), SETTINGS, RepairSettings())
    assert found.loss_pruned == found.loss_whole and found.divergence_pruned == 0 and not found.helps


def test_single_removals(deep: Checkpoint) -> None:
    text = tokens(4)
    losses = removal_losses(Blocks(deep), text, (2,), (1, 3), SETTINGS)
    for block, loss in zip((1, 3), losses, strict=True):
        wanted = []
        for row in text.ids:
            ids = [int(i) for i in row]
            logits = families.reference(deep.folder, ids, without=(2, block)).logits[:-1].double().log_softmax(-1)
            wanted.append(-logits.gather(-1, torch.tensor(ids[1:])[:, None]).mean().item())
        assert loss == pytest.approx(np.mean(wanted), rel=1e-5)


def test_post_norm_blocks_refuse(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(families.build("gemma2", tmp_path / "model"))
    with pytest.raises(PruneError, match="--no-repair"):
        cut(Blocks(checkpoint), tokens(), (1,), SETTINGS, RepairSettings())


def test_one_sequence_is_too_few(deep: Checkpoint) -> None:
    with pytest.raises(CalibrationError, match="two sequences"):
        cut(Blocks(deep), tokens(1), (2,), SETTINGS, RepairSettings())


@pytest.mark.parametrize(("tokens", "noise"), [(30, 0.0), (30, 1.0), (60, 5.0), (400, 1.0), (400, 20.0)])
def test_the_search_finds_the_ridge_that_trying_all_finds(tokens: int, noise: float) -> None:
    a = random(40, 6, seed=1)
    x, other = random(tokens, 40, seed=2), random(100, 40, seed=3)
    train = sums(x, x @ a + noise * random(tokens, 6, seed=4))
    held_out = sums(other, other @ a + noise * random(100, 6, seed=5))
    shares = {ridge: repair.left(held_out, repair.solve(train, ridge)) for ridge in repair.RIDGES}
    correction = repair.choose(train, held_out)
    best = min(shares, key=lambda ridge: shares[ridge])
    assert correction is not None and correction.ridge == best and correction.left == pytest.approx(shares[best])


def test_wide_matrices_are_solved_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    x, other, a = random(300, 50, seed=1), random(100, 50, seed=2), random(50, 6, seed=3)
    noisy = x @ a + random(300, 6, seed=4)
    exact = repair.choose(sums(x, noisy), sums(other, other @ a))
    monkeypatch.setattr(repair, "EXACT_COLUMNS", 10)
    single = repair.choose(sums(x, noisy), sums(other, other @ a))
    assert exact is not None and single is not None and single.ridge == exact.ridge
    assert not torch.equal(single.matrix, exact.matrix)  # it was another way
    torch.testing.assert_close(single.matrix, exact.matrix, rtol=1e-3, atol=1e-4)
