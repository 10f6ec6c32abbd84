"""Pruning from end to end: what was solved is what stands in the file, noted and shown; bad wishes are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from llama_cpp import _gguf

from helpers import families
from helpers.plain import PLAIN_FLAGS
from helpers.stock import Gguf
from ziggurat.converter import depth, prune_report
from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings, Silent
from ziggurat.converter.calibration_text import TextSettings, read_tokens
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.cli import convert as command
from ziggurat.converter.correction import RepairSettings
from ziggurat.converter.errors import PruneError
from ziggurat.converter.pipeline import ConvertSettings, convert, work_folder
from ziggurat.converter.prune import PruneSettings
from ziggurat.converter.repair_pass import cut
from ziggurat.runtime.command_inspect import inspect

TEXT = TextSettings(tokens=1024, sequence=64)

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "model"
    return families.build("llama_gqa", folder, layers=5, dtype="float32", narrow=True)


def settings(repair: bool = True, **prune: object) -> ConvertSettings:
    how = PruneSettings(repair=repair, **prune)  # type: ignore[arg-type]
    return ConvertSettings(type="f32", threads=1, prune=how, calibration=TEXT)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in _gguf.GGUFReader(path).tensors}


def test_the_solved_repair_is_in_the_file(model: Path, tmp_path: Path) -> None:
    plain, mended = tmp_path / "plain.gguf", tmp_path / "mended.gguf"
    convert(model, plain, settings(repair=False, blocks=(2, 3)))
    report = convert(model, mended, settings(blocks=(2, 3)))
    assert report.prune is not None and report.prune.repair.method == depth.METHOD
    assert not work_folder(mended).exists()
    checkpoint = open_checkpoint(model)
    how = CalibrateSettings(threads=1)
    found = cut(Blocks(checkpoint), read_tokens(checkpoint, TEXT), (2, 3), how, RepairSettings())
    assert found.helps and set(found.folds) <= {1, 4}
    before, after = tensors(plain), tensors(mended)
    assert list(before) == list(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"blk.{ {1: 1, 4: 2}[i] }.ffn_down.weight" for i in found.folds}
    for block, fold in found.folds.items():
        name = f"blk.{ {1: 1, 4: 2}[block] }.ffn_down.weight"
        np.testing.assert_allclose(after[name], before[name] + fold.add, atol=1e-5)
    with Gguf(mended) as loaded:
        assert np.isfinite(loaded.logits([5, 6, 7])).all()


def test_inspect_shows_what_was_done(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(model, out, settings(count=2))
    shown = CliRunner().invoke(inspect, [str(out)], standalone_mode=False).output
    assert "removed blocks" in shown and "by influence" in shown and "repair" in shown
    fields = json.loads(CliRunner().invoke(inspect, [str(out), "--json"], standalone_mode=False).output)["ziggurat"]
    assert len(fields["ziggurat.prune.blocks"]) == 2
    tokens = read_tokens(open_checkpoint(model), TEXT)
    assert fields["ziggurat.prune.calibration.hash"] == tokens.sha256
    assert fields["ziggurat.prune.calibration.tokens"] == tokens.ids.size


def test_a_repair_that_harms_is_dropped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from ziggurat.converter import repair_pass

    real = repair_pass.cut

    def worse(*args: object) -> repair_pass.Repaired:
        return dataclasses.replace(real(*args), divergence_repaired=99.0)  # type: ignore[arg-type]

    monkeypatch.setattr(repair_pass, "cut", worse)
    report = convert(model, tmp_path / "out.gguf", settings(blocks=(2,)))
    assert report.prune is not None and report.prune.repair.method == "none"
    assert "no nearer" in (report.prune.repair.reason or "")
    monkeypatch.undo()
    convert(model, tmp_path / "plain.gguf", settings(repair=False, blocks=(2,)))
    before, after = tensors(tmp_path / "plain.gguf"), tensors(tmp_path / "out.gguf")
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("by", ["influence", "angular", "perplexity"])
def test_every_criterion(model: Path, by: str) -> None:
    measuring = depth.Measuring(open_checkpoint(model), TEXT, CalibrateSettings(threads=1), Silent())
    blocks = measuring.choose(by, 2)  # type: ignore[arg-type]
    assert len(blocks) == 2 and set(blocks) <= {1, 2, 3}


def run(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def test_report(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(
        model, "--prune-report", "--prune", 2, "--report", tmp_path / "r.json", "--plot", tmp_path / "r.png",
        "--calibration-tokens", 512, "--calibration-sequence", 64, "--threads", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["count"] for row in found["rows"]] == [1, 2]
    assert len(found["influence"]) == 5 and found["perplexity"] > 1
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "influence" in done.output and "removed" in done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.png"]


def test_report_refuses_too_many(model: Path) -> None:
    with pytest.raises(PruneError, match="3 at most"):
        prune_report.report(model, most=4, text=TEXT, settings=CalibrateSettings(threads=1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prune", "5"], "the first and the last always stay"),
        (["--prune", "9"], "the model has 5"),
        (["--prune", "x"], "neither a number"),
        (["--prune-blocks", "0"], "first"),
        (["--prune", "99%"], "of 5 the first and the last always stay, so at most 3"),
        (["--prune-blocks", "7"], "no block 7"),
        (["--prune-blocks", "0-4"], "first"),
        (["--prune", "1", "--prune-blocks", "2"], "exclude each other"),
        (["--prune-by", "angular"], "needs --prune"),
        (["--no-repair"], "nothing is repaired"),
        (["--prune", "1", "--calibration", "EMPTY"], "is empty"),
        (["--prune", "1", "--calibration", "TINY"], "two sequences"),
        (["--prune", "1", "--calibration", "TINY", "--prune-by", "perplexity"], "two sequences"),
        (["--prune", "1", "--calibration", "TINY", "--no-repair"], "two sequences"),
        (["--prune", "1", "--calibration", "BINARY"], "no UTF-8 text"),
    ],
)
def test_bad_wishes_are_one_line(model: Path, tmp_path: Path, words: list[str], message: str) -> None:
    contents = {"EMPTY": b"", "TINY": b"a few words", "BINARY": b"\xff\xfe\x00\x80"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    places = [tmp_path / word if word in contents else word for word in words]
    done = run(model, tmp_path / "out.gguf", "--threads", 1, *places)
    assert done.exit_code == 1
    errors = [line for line in done.output.splitlines() if line.startswith("convert: error:")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out.gguf").exists() and not work_folder(tmp_path / "out.gguf").exists()


def test_nan_weights_are_refused(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out.gguf"
    text = ["--calibration-tokens", 512, "--calibration-sequence", 64]
    for number, kept, words in (
        ("block 2", True, ["--prune", "1"]),
        ("block 2", False, ["--prune", "1", "--prune-by", "perplexity"]),
        ("block 2", True, ["--prune-blocks", "1"]),
        ("blk.1", False, ["--prune-blocks", "1", "--no-repair", *PLAIN_FLAGS]),
    ):
        done = run(damaged, out, "--threads", 1, *text, *words)
        assert done.exit_code == 1
        (error,) = [line for line in done.output.splitlines() if line.startswith("convert: error:")]
        assert number in error and "NaN" in error
        assert error.endswith(f"{work_folder(out)} keeps what is finished for the same command to go on from") == kept
        assert work_folder(out).exists() == kept
        shutil.rmtree(work_folder(out), ignore_errors=True)


@pytest.mark.parametrize(
    "words", [["--prune-report", "OUT"], ["--prune-report", "--prune-blocks", "1"], ["OUT", "--plot", "x.png"], []]
)
def test_wrong_calls(model: Path, words: list[str]) -> None:
    assert run(model, *words).exit_code == 2


def test_a_norm_behind_the_projection(tmp_path: Path) -> None:
    """Such blocks can go, but no correction can be folded: said before anything is measured."""
    folder = families.build("olmo2", tmp_path / "olmo2", layers=4, narrow=True)
    options = ["--type", "q4_0", "--threads", 1, "--calibration-tokens", 256, "--calibration-sequence", 64]
    for words in ([tmp_path / "out.gguf", "--prune", 1], [tmp_path / "out.gguf", "--prune-blocks", 2]):
        done = run(folder, *words, *options)
        assert done.exit_code == 1
        assert done.output.splitlines() == [
            "convert: error: removed blocks of Olmo2ForCausalLM cannot be made up for: a norm follows the down "
            "projection, so no correction can be folded into it; leave the repair out with --no-repair"
        ]
    with pytest.raises(PruneError, match="--no-repair"):
        prune_report.report(folder)
    for by in ("influence", "perplexity"):
        out = tmp_path / f"{by}.gguf"
        assert run(folder, out, "--prune", 1, "--prune-by", by, "--no-repair", *options).exit_code == 0
        with Gguf(out) as loaded:
            assert np.isfinite(loaded.logits([5, 6, 7])).all()
    report = prune_report.report(folder, repair=False, most=1, text=TEXT, settings=CalibrateSettings(threads=1))
    assert report.rows[0].perplexity_repaired is None and report.rows[0].divergence_pruned > 0
