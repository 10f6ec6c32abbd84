"""Conversions to a size: never above it, within 1 % below, the same every time, and said in one line where it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from llama_cpp import _gguf as gguf

from helpers.deep import build_deep
from helpers.plain import PLAIN_FLAGS
from ziggurat.converter import mix_losses, mix_pass
from ziggurat.converter.cli import convert as command
from ziggurat.converter.loadable import check_loadable

MakeCheckpoint = Callable[..., Path]
REFERENCE = Path(__file__).parents[1] / "reference_model"
QUICK = ("--calibration-tokens", 256, "--calibration-sequence", 64, "--threads", 1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of few rows."""
    few = mix_losses.LossSettings(least_values=1 << 11, least_rows=8, most_rows=8, head_rows=16)
    monkeypatch.setattr(mix_pass, "MixSettings", lambda **options: Settings(losses=few, **options))


Settings = mix_pass.MixSettings


def run(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def converted(folder: Path, out: Path, *words: object) -> dict[str, Any]:
    result = run(folder, out, "--report", out.with_suffix(".json"), *QUICK, *words)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    return report


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.usefixtures("quick", "quiet")
@pytest.mark.parametrize(
    ("size", "number"), [("1750kB", 1_750_000), ("0.7 MiB", 0.7 * (1 << 20)), ("1050000", 1_050_000)]
)
def test_sizes(size: str, number: float, small: Path, tmp_path: Path) -> None:
    """The first of the reference model."""
    out = tmp_path / "out.gguf"
    report = converted(REFERENCE if size == "1750kB" else small, out, "--size", size, "--no-awq")
    assert 0.99 * number < out.stat().st_size <= number
    check_loadable(out)
    mixed = report["mix"]
    chosen = types_of(out)
    for name, tensor in mixed["tensors"].items():
        assert chosen[name] == tensor["type"].lower()
    assert len(set(chosen.values())) > 2
    assert sum(tensor["loss"] for tensor in mixed["tensors"].values()) == pytest.approx(mixed["loss"])
    assert sum(kind["share"] for kind in mixed["kinds"].values()) == pytest.approx(1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deep(tmp_path_factory.mktemp("small") / "model", 2)


@pytest.mark.usefixtures("quick", "quiet")
@pytest.mark.parametrize("bits", [2.75, 4.5])
def test_bits_per_weight_are_the_reports(bits: float, small: Path, tmp_path: Path) -> None:
    report = converted(small, tmp_path / "out.gguf", "--bpw", bits, "--no-awq")
    assert 0.99 * bits < report["bits_per_weight"] <= bits
    assert report["mix"]["note"] is None


@pytest.mark.usefixtures("quick", "quick_fit", "quiet")
def test_twice_the_same(tmp_path: Path) -> None:
    """With scales, which the losses are measured with."""
    folder = build_deep(tmp_path / "model", 1)
    for name in ("a", "b"):
        converted(folder, tmp_path / f"{name}.gguf", "--bpw", 4.25)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.usefixtures("quick", "quiet")
def test_more_room_than_can_be_used(small: Path, tmp_path: Path) -> None:
    result = run(small, tmp_path / "out.gguf", "--bpw", 12, "--no-awq", *QUICK)
    assert result.exit_code == 0
    assert "a larger file would gain nothing" in result.stderr
    assert set(types_of(tmp_path / "out.gguf").values()) == {"q8_0", "f32"}


@pytest.mark.usefixtures("quick", "quiet")
def test_without_importance_data_no_type_that_needs_it(small: Path, tmp_path: Path) -> None:
    converted(small, tmp_path / "out.gguf", "--bpw", 2.8, *PLAIN_FLAGS)
    assert not {"iq2_xxs", "iq2_xs"} & set(types_of(tmp_path / "out.gguf").values())


@pytest.mark.usefixtures("quick", "quiet")
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_families(name: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    report = converted(checkpoint(name), tmp_path / "out.gguf", "--bpw", 5, "--no-awq")
    assert 4.95 < report["bits_per_weight"] <= 5
    assert all(np.isfinite(tensor["loss"]) for tensor in report["mix"]["tensors"].values())


@pytest.mark.usefixtures("quick", "quiet")
def test_of_a_pruned_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = build_deep(tmp_path_factory.mktemp("deep") / "model", 3)
    report = converted(folder, tmp_path / "out.gguf", "--bpw", 4.5, "--prune-blocks", 1, "--no-repair", "--no-awq")
    assert 4.45 < report["bits_per_weight"] <= 4.5
    assert {name.split(".")[1] for name in report["mix"]["tensors"] if name.startswith("blk.")} == {"0", "1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "33XB"), "is no size"),
        (("--bpw", "0"), "is no number of bits"),
        (("--bpw", "4", "--size", "1GB"), "exclude each other"),
    ],
)
def test_bad_input(words: tuple[str, ...], message: str, small: Path, tmp_path: Path) -> None:
    result = run(small, tmp_path / "out.gguf", *words)
    assert result.exit_code != 0
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_type_is_a_recipe_of_its_own(small: Path, tmp_path: Path) -> None:
    result = run(small, tmp_path / "out.gguf", "--type", "q4_k_m", "--bpw", 4)
    assert result.exit_code == 2
    assert "--type" in result.stderr


@pytest.mark.usefixtures("quiet")
def test_too_small_is_said_before_any_work(small: Path, tmp_path: Path) -> None:
    for words, unit in ((("--bpw", 1.5), "bits per weight"), (("--size", "200kB"), "bytes")):
        result = run(small, tmp_path / "out.gguf", *words)
        assert result.exit_code == 1
        assert f"{unit} are too few for this model" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not list(tmp_path.iterdir())
