"""The calibration pass: its figures against those of the whole model, resuming, spilling, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.deep import build_deep, hidden_states, load, random_tokens
from ziggurat.converter import hidden as hidden_module
from ziggurat.converter.activations import ChannelStatistics
from ziggurat.converter.calibrate import CalibrateSettings, Calibration, calibrate, torch_threads
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.errors import CalibrationError, UnsupportedModelError

TOKENS = random_tokens(5, 24)
SETTINGS = CalibrateSettings(batch_tokens=48)  # batches of two sequences, and one of one


class Watcher:
    """Counts the steps, and may stop after some."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.total = self.done = 0
        self.names: list[str] = []
        self._stop_after = stop_after

    def stage(self, name: str, total: int) -> None:
        self.total += total

    def step(self, count: int, what: str) -> None:
        self.done += count
        self.names.append(what)
        if self._stop_after is not None and self.done >= self._stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deep(tmp_path_factory.mktemp("deep") / "model", 5)


@pytest.fixture(scope="module")
def whole(deep: Path) -> Calibration:
    return calibrate(open_checkpoint(deep), TOKENS, SETTINGS)


def assert_same(got: Calibration, wanted: Calibration) -> None:
    """Bit for bit."""
    assert got.influence.tolist() == wanted.influence.tolist()
    assert got.angular is not None and wanted.angular is not None
    assert got.angular.tobytes() == wanted.angular.tobytes()
    assert list(got.channels) == list(wanted.channels)
    for name, statistics in wanted.channels.items():
        for field in dataclasses.fields(ChannelStatistics):
            assert np.array_equal(getattr(got.channels[name], field.name), getattr(statistics, field.name)), name
    assert got.tokens == wanted.tokens


# Figures against the whole model


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


@pytest.mark.parametrize(
    "name", ["llama31_rope", "qwen2", "qwen3_moe", "gemma2", "gemma3", "phi3", "mixtral", "gpt2", "olmo2"]
)
def test_influence_and_angles_are_those_of_the_whole_model(name: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(name)
    got = calibrate(open_checkpoint(folder), TOKENS, SETTINGS)
    states, _ = hidden_states(load(folder), TOKENS.ids)
    wanted = [float(1 - _cosine(a, b).mean()) for a, b in zip(states, states[1:], strict=False)]
    assert got.influence == pytest.approx(wanted, abs=1e-5)
    assert min(wanted) > 1e-2  # else zeros would pass
    assert got.angular is not None and got.angular.shape == (len(wanted), len(wanted) + 1)
    for i, before in enumerate(states[:-1]):
        assert np.isnan(got.angular[i, : i + 1]).all()
        for j in range(i + 1, len(states)):
            angle = torch.arccos(_cosine(before, states[j]).clamp(-1, 1)).mean() / math.pi
            assert got.angular[i, j] == pytest.approx(float(angle), abs=1e-5)


def test_angles_of_a_sample(deep: Path) -> None:
    states, _ = hidden_states(load(deep), TOKENS.ids)
    got = calibrate(open_checkpoint(deep), TOKENS, dataclasses.replace(SETTINGS, angular_tokens=7)).angular
    places = [i * 120 // 7 for i in range(7)]
    angles = torch.arccos(_cosine(states[1].flatten(0, 1)[places], states[4].flatten(0, 1)[places])) / math.pi
    assert got is not None
    assert got[1, 4] == pytest.approx(float(angles.mean()), abs=1e-5)
    assert calibrate(open_checkpoint(deep), TOKENS, dataclasses.replace(SETTINGS, angular_tokens=0)).angular is None


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "phi3", "gemma2"])
def test_channels_are_the_inputs_of_every_linear_layer(name: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(name)
    model, seen = load(folder), {}
    for path, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and path != "lm_head":
            module.register_forward_pre_hook(lambda m, args, path=path: seen.update({path: args[0].flatten(0, 1)}))
    hidden_states(model, TOKENS.ids)
    got = calibrate(open_checkpoint(folder), TOKENS, SETTINGS).channels
    assert set(got) == set(seen)
    assert all(f"{path}.weight" in open_checkpoint(folder).tensors for path in got)
    for path, x in seen.items():
        assert int(got[path].count) == TOKENS.ids.size
        assert got[path].mean_absolute == pytest.approx(x.abs().double().mean(0).numpy(), rel=1e-4)
        assert got[path].mean_squares == pytest.approx(x.double().square().mean(0).numpy(), rel=1e-4)


@pytest.mark.parametrize(("name", "mixture"), [("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")])
def test_channels_of_experts(name: str, mixture: str, checkpoint: Callable[..., Path]) -> None:
    """Each expert's inputs, from the checkpoint's own tensors and what transformers hands to the mixture."""
    folder = checkpoint(name)
    model, seen = load(folder), []
    block = model.model.layers[1]
    block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    hidden_states(model, TOKENS.ids)
    (x,), tensors = seen, load_file(folder / "model.safetensors")
    place = f"model.layers.1.{mixture}"
    router = tensors[f"{place}.gate.weight"].float()
    chosen = (x @ router.T).topk(2).indices
    gate, up, down = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    got = calibrate(open_checkpoint(folder), TOKENS, SETTINGS).channels
    for expert in range(len(router)):
        mine = x[(chosen == expert).any(-1)]
        weights = [tensors[f"{place}.experts.{expert}.{part}.weight"].float() for part in (gate, up)]
        inner = torch.nn.functional.silu(mine @ weights[0].T) * (mine @ weights[1].T)
        for part, values in ((gate, mine), (up, mine), (down, inner)):
            statistics = got[f"{place}.experts.{part}"]
            assert statistics.count[expert] == len(mine)
            wanted = values.double().square().sum(0).numpy()
            assert statistics.squares[expert] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert int(got[f"{place}.experts.{down}"].count.sum()) == 2 * TOKENS.ids.size
    assert f"{place}.experts.gate_up_proj" not in got


# Resuming


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("stop_after", [1, 120, 121, 300, 600])
def test_an_interrupted_calibration_goes_on(
    deep: Path, whole: Calibration, tmp_path: Path, stop_after: int, in_memory: bool
) -> None:
    """Wherever it stops, what is finished is not computed again, and the figures are the same."""
    share = 0.25 if in_memory else 0.0
    settings = dataclasses.replace(SETTINGS, work=tmp_path / "work", memory_share=share)
    with pytest.raises(KeyboardInterrupt):
        calibrate(open_checkpoint(deep), TOKENS, settings, Watcher(stop_after))
    # steps are told before a block is finished: the one that completes a block's tokens stops it as well
    finished = (stop_after - 1) // 120
    watcher = Watcher()
    assert_same(calibrate(open_checkpoint(deep), TOKENS, settings, watcher), whole)
    assert watcher.done == watcher.total == (5 - finished) * 120
    assert watcher.names[0] == f"block {finished}"
    again = Watcher()
    assert_same(calibrate(open_checkpoint(deep), TOKENS, settings, again), whole)
    assert again.done == again.total == 0


def test_what_a_kill_leaves_behind_does_no_harm(deep: Path, whole: Calibration, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, work=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        calibrate(open_checkpoint(deep), TOKENS, settings, Watcher(300))
    folder = tmp_path / "calibration"
    # a kill between the files of a block and the manifest: newer files than it counts, and halves
    for name in ("hidden.partial", "block.partial", "manifest.partial"):
        (folder / name).write_bytes(b"half")
    for name in ("block-0002.npz", "sample-0003.npy", "hidden-0003.f32"):
        (folder / name).write_bytes(b"not of this run")
    assert_same(calibrate(open_checkpoint(deep), TOKENS, settings), whole)


def test_hidden_states_are_removed_or_kept(deep: Path, tmp_path: Path) -> None:
    calibrate(open_checkpoint(deep), TOKENS, dataclasses.replace(SETTINGS, work=tmp_path / "a"))
    assert [path.name for path in (tmp_path / "a" / "calibration").glob("hidden*")] == ["hidden-0005.f32"]
    calibrate(open_checkpoint(deep), TOKENS, dataclasses.replace(SETTINGS, work=tmp_path / "b", keep_hidden=True))
    kept = sorted((tmp_path / "b" / "calibration").glob("hidden*"))
    assert [path.name for path in kept] == [f"hidden-{i:04}.f32" for i in range(6)]
    states, _ = hidden_states(load(deep), TOKENS.ids)
    for path, wanted in zip(kept, states, strict=True):
        assert np.fromfile(path, np.float32) == pytest.approx(wanted.numpy().ravel(), abs=1e-3)


@pytest.mark.parametrize(
    ("what", "settings", "tokens"),
    [
        ("text", {}, random_tokens(5, 24, seed=1)),
        ("sequence length", {}, random_tokens(5, 20)),
        ("sequences", {}, random_tokens(4, 24)),
        ("batch", {"batch_tokens": 24}, TOKENS),
        ("dtype", {"dtype": "bfloat16"}, TOKENS),
        ("angular tokens", {"angular_tokens": 5}, TOKENS),
    ],
)
def test_a_changed_parameter_is_refused_by_name(
    deep: Path, tmp_path: Path, what: str, settings: dict[str, object], tokens: CalibrationTokens
) -> None:
    old = dataclasses.replace(SETTINGS, work=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        calibrate(open_checkpoint(deep), TOKENS, old, Watcher(121))
    with pytest.raises(CalibrationError, match=rf"differs in .*{what} \(.*remove the folder") as refusal:
        calibrate(open_checkpoint(deep), tokens, dataclasses.replace(old, **settings))  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)
    unimportant = dataclasses.replace(old, memory_share=0.0, threads=1, keep_hidden=True)
    calibrate(open_checkpoint(deep), TOKENS, unimportant)


def test_changed_weights_are_refused(deep: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(deep, copy)
    settings = dataclasses.replace(SETTINGS, work=tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        calibrate(open_checkpoint(copy), TOKENS, settings, Watcher(121))
    tensors = load_file(copy / "model.safetensors")
    save_file({n: t * 1.5 for n, t in tensors.items()}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"differs in weights \("):
        calibrate(open_checkpoint(copy), TOKENS, settings)


@pytest.mark.parametrize("damage", ["{", "[]", '{"finished": 1}', '{"finished": "x", "identity": {}}'])
def test_a_damaged_manifest_is_refused(deep: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "manifest.json").write_text(damage)
    with pytest.raises(CalibrationError, match="manifest.json is damaged: remove"):
        calibrate(open_checkpoint(deep), TOKENS, dataclasses.replace(SETTINGS, work=tmp_path))


@pytest.mark.parametrize("name", ["hidden-0002.f32", "block-0001.npz", "sample-0000.npy"])
@pytest.mark.parametrize("content", [None, b"short"])
def test_damaged_files_are_refused(deep: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    settings = dataclasses.replace(SETTINGS, work=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        calibrate(open_checkpoint(deep), TOKENS, settings, Watcher(300))
    path = tmp_path / "calibration" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=f"{name} is missing or damaged: remove"):
        calibrate(open_checkpoint(deep), TOKENS, settings)


def test_a_folder_in_use_is_refused(deep: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, work=tmp_path)

    class Intruder(Watcher):
        def step(self, count: int, what: str) -> None:
            with pytest.raises(CalibrationError, match="in use by another conversion"):
                calibrate(open_checkpoint(deep), TOKENS, settings)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(open_checkpoint(deep), TOKENS, settings, Intruder())


def test_a_work_folder_that_cannot_be(deep: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="cannot be written"):
        calibrate(open_checkpoint(deep), TOKENS, dataclasses.replace(SETTINGS, work=tmp_path / "file"))


# Where the hidden states are kept


def test_spilling_changes_nothing(deep: Path, whole: Calibration, tmp_path: Path) -> None:
    assert_same(calibrate(open_checkpoint(deep), TOKENS, dataclasses.replace(SETTINGS, memory_share=0.0)), whole)


@pytest.mark.parametrize(("available", "spilled"), [(1 << 40, False), (4 * 4 * 120 * 256, False), (300_000, True)])
def test_when_it_spills(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int, spilled: bool
) -> None:
    """A quarter of what is free is the limit; 120 tokens of 256 floats are 122 880 bytes."""
    made: list[Path | None] = []
    create = hidden_module.HiddenStates.__init__

    def spy(self: hidden_module.HiddenStates, shape: object, path: Path | None = None, **options: object) -> None:
        made.append(path)
        create(self, shape, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(hidden_module.HiddenStates, "__init__", spy)
    monkeypatch.setattr(hidden_module.psutil, "virtual_memory", lambda: type("", (), {"available": available}))
    calibrate(open_checkpoint(deep), TOKENS, SETTINGS)
    assert all(path is not None for path in made) if spilled else made == [None]


def test_no_room_for_hidden_states(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden_module.os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match=r"no room for 0.1 MB of hidden states \(No space left"):
        calibrate(open_checkpoint(deep), TOKENS, dataclasses.replace(SETTINGS, work=tmp_path, memory_share=0.0))


@pytest.mark.parametrize("name", ["savez", "save"])
def test_no_room_for_figures(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, name, full)
    with pytest.raises(CalibrationError, match=r"cannot be written \(No space left"):
        calibrate(open_checkpoint(deep), TOKENS, dataclasses.replace(SETTINGS, work=tmp_path))


# Refusals


def _poisoned(source: Path, target: Path, tensor: str, value: float) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[tensor].view(-1)[3] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers(deep: Path, tmp_path: Path, value: float) -> None:
    folder = _poisoned(deep, tmp_path / "model", "model.layers.2.mlp.down_proj.weight", value)
    with pytest.raises(CalibrationError, match="block 2 gives NaN or infinite values") as refusal:
        calibrate(open_checkpoint(folder), TOKENS, SETTINGS)
    assert "\n" not in str(refusal.value)


def test_unknown_families_are_refused_before_any_work(deep: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(deep, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OlmoForCausalLM"]}))
    work = tmp_path / "work"
    with pytest.raises(UnsupportedModelError, match="OlmoForCausalLM"):
        calibrate(open_checkpoint(folder), TOKENS, dataclasses.replace(SETTINGS, work=work))
    assert not work.exists()


def test_the_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(CalibrationError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise CalibrationError("any")
    assert torch.get_num_threads() == before
