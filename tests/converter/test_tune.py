"""The tuning pass: what it hands to the steps, against the whole model; resuming; refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.deep import build_deep, hidden_states, load, random_tokens
from ziggurat.converter import linears, upstream
from ziggurat.converter.activations import unpack
from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings, calibrate
from ziggurat.converter.calibration_work import WorkFolder
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.errors import CalibrationError
from ziggurat.converter.repair import Fold
from ziggurat.converter.tune import Captured, TunedModel, found, tune

MakeCheckpoint = Callable[..., Path]

TOKENS = random_tokens(10, 24)
HELD_OUT = (2, 7)  # a fifth, evenly spread
FIT = tuple(i for i in range(10) if i not in HELD_OUT)
SETTINGS = CalibrateSettings(batch_tokens=72, threads=1)


@dataclasses.dataclass
class Step:
    """Keeps what it is handed, and may stop the pass."""

    name: str = "step"
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grams: bool = True
    stop_at: int | None = None
    seen: list[Captured] = dataclasses.field(default_factory=list)

    def __call__(self, captured: Captured) -> dict[str, np.ndarray]:
        if captured.place == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(captured)
        return {name: rows.sum(0).numpy() for name, rows in captured.samples.items()}


def model_of(folder: Path, **options: Any) -> TunedModel:
    checkpoint = open_checkpoint(folder)
    return TunedModel(
        Blocks(checkpoint), linears.tensor_names(checkpoint, upstream.plan(checkpoint, "bf16")), **options
    )


def run(folder: Path, work: Path, *steps: Step, settings: CalibrateSettings = SETTINGS, **options: Any) -> WorkFolder:
    how = dataclasses.replace(settings, work=work)
    return tune(model_of(folder, **options), TOKENS, steps, how)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deep(tmp_path_factory.mktemp("deep") / "model", 4)


def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What every linear layer reads, [sequences, positions, columns]."""
    seen: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_pre_hook(lambda m, args, path=path: seen.update({path: args[0]}))
    hidden_states(model, TOKENS.ids)
    return seen


@pytest.mark.parametrize("name", ["llama_gqa", "phi3", "gpt2", "mixtral", "qwen3_moe", "gemma3"])
def test_statistics_of_all_tokens_are_the_calibrations(name: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint(name)
    work = run(folder, tmp_path)
    wanted = calibrate(open_checkpoint(folder), TOKENS, SETTINGS).channels
    got = {key: value for place in range(work.finished) for key, value in unpack(work.block(place)).items()}
    assert set(wanted) == set(got) - {linears.HEAD}
    for key, statistics in wanted.items():
        assert np.array_equal(got[key].count, statistics.count)
        np.testing.assert_allclose(got[key].squares, statistics.squares, rtol=1e-4)
        np.testing.assert_allclose(got[key].absolute, statistics.absolute, rtol=1e-4)


def test_what_the_head_reads(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint("llama_gqa")
    work = run(folder, tmp_path)
    wanted = inputs(load(folder))["lm_head"].double().square().sum((0, 1))
    got = unpack(work.block(1))[linears.HEAD]
    np.testing.assert_allclose(got.squares, wanted.numpy(), rtol=1e-4)
    assert int(got.count) == TOKENS.ids.size
    assert linears.HEAD not in model_of(checkpoint("llama_tied")).tensors


def test_what_a_step_gets(deep: Path, tmp_path: Path) -> None:
    step = Step()
    run(deep, tmp_path, step)
    model = load(deep)
    read, (states, _) = inputs(model), hidden_states(model, TOKENS.ids)
    assert [captured.place for captured in step.seen] == [0, 1, 2, 3]
    captured = step.seen[2]
    layers = {layer for layer in read if layer.startswith("model.layers.2.")}
    for mapping in (captured.tensors, captured.channels, captured.all_channels, captured.samples, captured.grams):
        assert set(mapping) == layers
    assert captured.tensors["model.layers.2.mlp.down_proj"] == "blk.2.ffn_down.weight"
    torch.testing.assert_close(captured.held_out, states[2][list(HELD_OUT)], atol=1e-4, rtol=1e-4)
    for layer in layers:
        fit = read[layer][list(FIT)].flatten(0, 1)
        assert int(captured.channels[layer].count) == len(fit)
        np.testing.assert_allclose(captured.channels[layer].squares, fit.double().square().sum(0), rtol=1e-4)
        assert int(captured.all_channels[layer].count) == TOKENS.ids.size
        torch.testing.assert_close(captured.grams[layer], fit.T @ fit, atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(captured.samples[layer], fit, atol=1e-4, rtol=1e-4)  # fewer rows than wanted
    q, k, gate = (f"model.layers.2.{part}" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))
    assert captured.samples[q] is captured.samples[k] and captured.grams[q] is captured.grams[k]
    assert captured.samples[q] is not captured.samples[gate]


def test_samples_are_spread_evenly(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 192 tokens to fit on in batches of three sequences, the last shorter, every batch gives its share."""
    monkeypatch.setattr("ziggurat.converter.tune.SAMPLE_ROWS", 30)
    step = Step(grams=False)
    run(deep, tmp_path, step)
    fit = inputs(load(deep))["model.layers.1.mlp.down_proj"][list(FIT)].flatten(0, 1)
    places = [i * 72 // 10 for i in range(10)]
    chosen = fit[[*places, *(72 + i for i in places), *(144 + i * 48 // 10 for i in range(10))]]
    torch.testing.assert_close(step.seen[1].samples["model.layers.1.mlp.down_proj"], chosen, atol=1e-4, rtol=1e-4)
    assert not step.seen[1].grams


def test_samples_of_experts(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    step = Step()
    run(checkpoint("mixtral"), tmp_path, step)
    captured, place = step.seen[1], "model.layers.1.block_sparse_moe"
    gate, up, down = (f"{place}.experts.{part}" for part in ("w1", "w3", "w2"))
    rows, experts = captured.samples[gate], captured.sample_experts[gate]
    assert captured.samples[up] is rows and len(rows) == len(experts)
    assert experts.unique().tolist() == [0, 1, 2, 3]
    router = captured.block.layer.mlp.gate.weight
    assert bool(((rows @ router.T).topk(2).indices == experts[:, None]).any(-1).all())
    module = captured.block.layer.mlp.experts
    first = torch.nn.functional.linear(rows[0], module.gate_up_proj[experts[0]])
    half = len(first) // 2
    inner = torch.nn.functional.silu(first[:half]) * first[half:]
    torch.testing.assert_close(captured.samples[down][0], inner, atol=1e-4, rtol=1e-4)
    assert down not in captured.grams and f"{place}.gate" in captured.grams


def test_later_steps_see_what_earlier_ones_found(deep: Path, tmp_path: Path) -> None:
    first, second = Step("first"), Step("second")
    work = run(deep, tmp_path, first, second)
    assert not first.seen[1].found
    assert set(second.seen[1].found) == {"first"}
    kept = found(work, 1, "first")
    assert set(kept) == set(second.seen[1].found["first"])
    for name, array in second.seen[1].found["first"].items():
        assert np.array_equal(kept[name], array)


# The model that will be written


def test_removed_blocks_are_left_out(deep: Path, tmp_path: Path) -> None:
    step = Step()
    work = run(deep, tmp_path, step, removed=(1, 2))
    assert work.finished == 2
    assert [(captured.place, captured.block.index) for captured in step.seen] == [(0, 0), (1, 3)]
    model = load(deep)
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[3]])
    wanted = inputs(model)["model.layers.1.mlp.down_proj"].double().square().sum((0, 1))
    got = unpack(work.block(1))["model.layers.3.mlp.down_proj"].squares
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4)


def test_names_without_removed_blocks(deep: Path) -> None:
    from ziggurat.converter import surgery

    checkpoint = open_checkpoint(deep)
    plan = surgery.remove_blocks(upstream.plan(checkpoint, "bf16"), (1, 2))
    names = linears.tensor_names(checkpoint, plan, (1, 2))
    assert names["model.layers.3.mlp.down_proj"] == "blk.1.ffn_down.weight"
    assert not any(name.startswith(("model.layers.1.", "model.layers.2.")) for name in names)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "mixtral"])
def test_repair_is_folded_in(name: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The second block reads what the first one gives with its down projection changed."""
    folder, times = checkpoint(name), np.diag(np.linspace(0.5, 1.5, 256)).astype(np.float32)
    work = run(folder, tmp_path, folds={0: Fold(times=times)})
    model = load(folder)
    base = model.transformer.h if name == "gpt2" else model.model.layers
    with torch.no_grad():
        scale = torch.from_numpy(times.diagonal().copy())
        if name == "gpt2":
            base[0].mlp.c_proj.weight *= scale
            base[0].mlp.c_proj.bias *= scale
        elif name == "mixtral":
            base[0].mlp.experts.down_proj *= scale[:, None]
        else:
            base[0].mlp.down_proj.weight *= scale[:, None]
    layer = "transformer.h.1.attn.c_attn" if name == "gpt2" else "model.layers.1.self_attn.q_proj"
    wanted = inputs(model)[layer].double().square().sum((0, 1))
    np.testing.assert_allclose(unpack(work.block(1))[layer].squares, wanted.numpy(), rtol=1e-3)


# Resuming and refusals


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_an_interrupted_pass_goes_on(deep: Path, tmp_path: Path, stop_at: int, in_memory: bool) -> None:
    settings = dataclasses.replace(SETTINGS, memory_share=0.25 if in_memory else 0.0)
    whole = run(deep, tmp_path / "whole", Step(), settings=settings)
    with pytest.raises(KeyboardInterrupt):
        run(deep, tmp_path / "work", Step(stop_at=stop_at), settings=settings)
    rest = Step()
    resumed = run(deep, tmp_path / "work", rest, settings=settings)
    assert [captured.place for captured in rest.seen] == list(range(stop_at, 4))
    for place in range(4):
        got, wanted = resumed.block(place), whole.block(place)
        assert list(got) == list(wanted)
        assert all(got[name].tobytes() == wanted[name].tobytes() for name in wanted)


@pytest.mark.parametrize(
    ("what", "step", "options"),
    [
        (r"step type \(q4_0, now q6_k\)", Step(identity={"type": "q6_k"}), {}),
        (r"steps \(", Step(name="other", identity={"type": "q4_0"}), {}),
        (r"removed blocks \(", Step(identity={"type": "q4_0"}), {"removed": (2,)}),
        (r"repair \(", Step(identity={"type": "q4_0"}), {"folds": {1: Fold(times=np.eye(256, dtype=np.float32))}}),
    ],
)
def test_a_changed_parameter_is_refused_by_name(
    deep: Path, tmp_path: Path, what: str, step: Step, options: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(deep, tmp_path, Step(identity={"type": "q4_0"}, stop_at=1))
    with pytest.raises(CalibrationError, match=f"differs in .*{what}"):
        run(deep, tmp_path, step, **options)


def test_one_pass_in_all(deep: Path, tmp_path: Path) -> None:
    """Every token goes through every block once."""
    calls: list[tuple[str, int]] = []

    class Watcher:
        def stage(self, name: str, total: int) -> None:
            calls.append((name, total))

        def step(self, count: int, what: str) -> None:
            calls.append((what, count))

    tune(model_of(deep), TOKENS, [Step()], dataclasses.replace(SETTINGS, work=tmp_path), Watcher())
    assert calls[0] == ("tuning", 4 * 240)
    assert sum(count for _, count in calls[1:]) == 4 * 240
    assert list(dict.fromkeys(what for what, _ in calls[1:])) == [f"block {i}" for i in range(4)]


def test_one_sequence_is_too_little(deep: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="at least two sequences"):
        tune(model_of(deep), random_tokens(1, 24), [], dataclasses.replace(SETTINGS, work=tmp_path))
