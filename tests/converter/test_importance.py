"""The importance matrix of one's own: its numbers, its file, its way into the model's, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from llama_cpp import _gguf
from safetensors.torch import load_file, save_file

from helpers.plain import plain
from helpers.quantizer import quantize
from ziggurat.converter import fitting, importance
from ziggurat.converter.activations import ChannelStatistics, pack
from ziggurat.converter.calibration_text import CalibrationTokens, TextSettings, read_tokens
from ziggurat.converter.calibration_work import WorkFolder
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.cli import convert as command
from ziggurat.converter.errors import CalibrationError, OutputError, UnsupportedModelError
from ziggurat.converter.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from ziggurat.converter.pipeline import ConvertSettings, convert, work_folder
from ziggurat.converter.prune import PruneSettings
from ziggurat.converter.recipes import FTYPES
from ziggurat.runtime.command_inspect import inspect

MakeCheckpoint = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("quiet", "quick_fit")

TEXT = TextSettings(tokens=1024, sequence=64)
FLAGS = ("--calibration-tokens", "1024", "--calibration-sequence", "64", "--threads", "1")


def settings(**options: object) -> ConvertSettings:
    return ConvertSettings(**{"threads": 1, "awq": False, "calibration": TEXT, **options})  # type: ignore[arg-type]


def tensors(path: Path) -> dict[str, tuple[int, bytes]]:
    return {t.name: (int(t.tensor_type), t.data.tobytes()) for t in _gguf.GGUFReader(path).tensors}


def run(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


# Numbers


def _gathered(folder: Path, *layers: dict[str, ChannelStatistics]) -> importance.Gathered:
    with WorkFolder(folder, {}) as work:
        for place, statistics in enumerate(layers):
            work.finish(place, {**pack(statistics), "scale/x": np.zeros(1)}, keep=False)
        names = {layer: f"blk.0.{layer}.weight" for layer in ("dense", "experts")}
        return importance.gather(work, names, CalibrationTokens(np.zeros((3, 8), np.int32), "text"))


def statistics(squares: object, count: object) -> ChannelStatistics:
    values = np.array(squares, float)
    return ChannelStatistics(np.abs(values), values, np.array(count))


def test_experts_that_no_token_came_to_get_the_mean_of_the_others(tmp_path: Path) -> None:
    dense, routed = statistics([2, 4], 2), statistics([[4, 8], [0, 0], [3, 30], [0, 0]], [2, 0, 3, 0])
    got = _gathered(tmp_path, {"dense": dense, "unknown": dense}, {"experts": routed})
    assert got.unrouted == {"blk.0.experts.weight": (1, 3)}
    assert got.matrix.counts["blk.0.experts.weight"].tolist() == [[2], [1], [3], [1]]
    means = got.matrix.means
    assert set(means) == {"blk.0.dense.weight", "blk.0.experts.weight"}
    assert means["blk.0.dense.weight"].tolist() == [[1, 2]]
    assert means["blk.0.experts.weight"].tolist() == [[2, 4], [1.5, 7], [1, 10], [1.5, 7]]
    assert (got.matrix.datasets, got.matrix.chunks, got.matrix.chunk_size) == (("text",), 3, 8)


def test_sums_beyond_float32(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="what dense reads is too large"):
        _gathered(tmp_path, {"dense": statistics([1e39, 1], 2)})


def test_the_file(tmp_path: Path) -> None:
    """As llama-imatrix writes it: without an architecture, sums and counts as matrices."""
    sums = {"blk.1.b.weight": np.ones((3, 8), np.float32), "blk.0.a.weight": np.full((1, 4), 6, np.float32)}
    counts = {name: np.full((len(total), 1), 2, np.float32) for name, total in sums.items()}
    write_imatrix(tmp_path / "m.gguf", ImportanceMatrix(sums, counts, ("text",), 7, 64))
    reader = _gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix", "imatrix.datasets": ["text"], "imatrix.chunk_count": 7, "imatrix.chunk_size": 64,
    }  # fmt: skip
    shapes = {t.name: t.data.shape for t in reader.tensors}
    assert shapes == {
        "blk.0.a.weight.in_sum2": (1, 4), "blk.0.a.weight.counts": (1, 1),
        "blk.1.b.weight.in_sum2": (3, 8), "blk.1.b.weight.counts": (3, 1),
    }  # fmt: skip
    means = read_imatrix(tmp_path / "m.gguf")
    assert means["blk.0.a.weight"].tolist() == [[3] * 4] and means["blk.1.b.weight"].tolist() == [[0.5] * 8] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


# In a conversion


@pytest.mark.parametrize(
    ("family", "type_name"), [("llama_gqa", "q4_k_m"), ("llama_gqa", "iq2_xxs"), ("mixtral", "q4_0")]
)
def test_equal_to_llama_cpps_quantizer_with_the_exported_matrix(
    checkpoint: MakeCheckpoint, gguf: Callable[[Path, str], Path], tmp_path: Path, family: str, type_name: str
) -> None:
    folder, exported = checkpoint(family), tmp_path / "imatrix.gguf"
    report = convert(folder, tmp_path / "own.gguf", settings(type=type_name, export_imatrix=exported))
    means = {name: mean.reshape(-1) for name, mean in read_imatrix(exported).items()}
    quantize(gguf(folder, "bf16"), tmp_path / "ref.gguf", FTYPES[type_name], means)
    assert tensors(tmp_path / "own.gguf") == tensors(tmp_path / "ref.gguf")
    convert(folder, tmp_path / "again.gguf", settings(type=type_name, imatrix=exported))
    assert tensors(tmp_path / "again.gguf") == tensors(tmp_path / "own.gguf")
    assert report.importance is not None and report.importance.tensors == len(means)
    convert(folder, tmp_path / "plain.gguf", plain(type="q4_0", threads=1))
    assert tensors(tmp_path / "plain.gguf") != tensors(tmp_path / "own.gguf")


def test_of_a_model_without_some_blocks(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The matrix is that of the repaired model, under the names that its blocks have then."""
    folder, prune = checkpoint("llama_gqa", layers=5, narrow=True), PruneSettings(blocks=(1, 3))
    exported, floats = tmp_path / "imatrix.gguf", tmp_path / "bf16.gguf"
    convert(folder, tmp_path / "own.gguf", settings(type="q4_0", prune=prune, export_imatrix=exported))
    convert(folder, floats, settings(type="bf16", prune=prune))
    means = {name: mean.reshape(-1) for name, mean in read_imatrix(exported).items()}
    assert "blk.2.ffn_down.weight" in means and "blk.3.ffn_down.weight" not in means
    quantize(floats, tmp_path / "ref.gguf", FTYPES["q4_0"], means)
    assert tensors(tmp_path / "own.gguf") == tensors(tmp_path / "ref.gguf")


def test_what_is_noted(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder, out, report = checkpoint("llama_gqa", narrow=True), tmp_path / "out.gguf", tmp_path / "report.json"
    done = run(folder, out, "--report", report, "--export-imatrix", tmp_path / "matrix.gguf", "--type", "q4_0", *FLAGS)
    assert done.exit_code == 0, done.output
    tokens = read_tokens(open_checkpoint(folder), TEXT)
    written = json.loads(report.read_text())
    assert written["calibration"] == {
        "source": "built-in", "tokens": tokens.ids.size, "sequence": 64, "sha256": tokens.sha256,
    }  # fmt: skip
    assert written["importance"]["tensors"] == 16 and written["importance"]["exported"] == "matrix.gguf"
    assert f"{tokens.ids.size} tokens of built-in" in done.output and tokens.sha256[:12] in done.output
    fields = {key: field.contents() for key, field in _gguf.GGUFReader(out).fields.items()}
    assert fields["quantize.imatrix.dataset"] == "built-in" and fields["quantize.imatrix.file"] == "matrix.gguf"
    assert fields["quantize.imatrix.entries_count"] == 16
    assert fields["quantize.imatrix.chunks_count"] == len(tokens.ids)
    shown = CliRunner().invoke(inspect, [str(out)], standalone_mode=False).output
    assert "calibrated on" in shown and f"{tokens.ids.size} tokens of built-in" in shown
    assert not work_folder(out).exists()


def test_unrouted_experts_are_named(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random routers leave no expert out, so one is taken away behind their backs."""
    real = importance._entry

    def entry(found: ChannelStatistics) -> object:
        if found.count.ndim:
            count, squares = found.count.copy(), found.squares.copy()
            count[2], squares[2] = 0, 0
            found = dataclasses.replace(found, count=count, squares=squares)
        return real(found)

    monkeypatch.setattr(importance, "_entry", entry)
    done = run(checkpoint("mixtral"), tmp_path / "out.gguf", "--report", tmp_path / "r.json", "--no-awq", *FLAGS)
    assert done.exit_code == 0
    unrouted = json.loads((tmp_path / "r.json").read_text())["importance"]["unrouted"]
    assert len(unrouted) == 6 and set(map(tuple, unrouted.values())) == {(2,)}
    assert "2 of blk.0.ffn_" in done.output


def test_floats_need_no_calibration(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "fit", None)
    report = convert(checkpoint("llama_gqa"), tmp_path / "out.gguf", ConvertSettings(type="bf16"))
    assert report.calibration is None and report.importance is None


# Interruption


class _Stop:
    """Interrupts a conversion in a stage, after some steps."""

    def __init__(self, stage: str, steps: int) -> None:
        self._wanted, self._left, self._stage = stage, steps, ""

    def planned(self, estimate: object) -> None: ...

    def advance(self, parameters: int, tensor: str) -> None:
        self._count("write")

    def stage(self, name: str, total: int) -> None:
        self._stage = name

    def step(self, count: int, what: str) -> None:
        self._count(self._stage)

    def _count(self, stage: str) -> None:
        self._left -= stage == self._wanted
        if self._left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stage", "steps"), [("tuning", 2), ("tuning", 5), ("write", 2)])
def test_an_interrupted_conversion_goes_on_to_the_same_file(
    checkpoint: MakeCheckpoint, tmp_path: Path, stage: str, steps: int
) -> None:
    folder, whole, out = checkpoint("llama_gqa", layers=4, narrow=True), tmp_path / "whole.gguf", tmp_path / "out.gguf"
    how = settings(type="q4_0")
    convert(folder, whole, how)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, how, _Stop(stage, steps))
    assert not out.exists() and work_folder(out).is_dir()
    with pytest.raises(CalibrationError, match=r"differs in .*sequence length \(64, now 32\)"):
        convert(folder, out, dataclasses.replace(how, calibration=dataclasses.replace(TEXT, sequence=32)))
    convert(folder, out, how)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


# Refusals


def refused(done: Result, out: Path, *words: str) -> None:
    lines = [line for line in done.output.splitlines() if line.startswith("convert: error: ")]
    assert done.exit_code == 1 and len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"a few words", "two sequences"), (b"\xff\xfe\x00\x80", "no UTF-8")]
)
def test_texts_that_will_not_do(checkpoint: MakeCheckpoint, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    out = tmp_path / "out.gguf"
    refused(run(checkpoint("llama_gqa"), out, "--calibration", tmp_path / "text"), out, message)
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_activations_that_are_no_numbers(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder, out = Path(shutil.copytree(checkpoint("llama_gqa"), tmp_path / "model")), tmp_path / "out.gguf"
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(run(folder, out, *FLAGS), out, "block 1 gives NaN or infinite values")


@pytest.mark.parametrize("words", [(), ("--no-awq",), ("--export-imatrix", "m.gguf")])
def test_families_that_cannot_be_streamed(checkpoint: MakeCheckpoint, tmp_path: Path, words: Sequence[str]) -> None:
    folder, out = checkpoint("t5"), tmp_path / "out.gguf"
    refused(run(folder, out, *words), out, "--no-awq --no-imatrix", "--imatrix FILE --no-awq")
    assert not list(tmp_path.iterdir())


def test_quantized_checkpoints(checkpoint: MakeCheckpoint) -> None:
    found = dataclasses.replace(open_checkpoint(checkpoint("llama_gqa")), config={"quantization_config": {"bits": 4}})
    with pytest.raises(UnsupportedModelError, match="convert this with --no-awq --no-imatrix, or with --imatrix FILE"):
        fitting.check(found)


def test_places_of_the_exported_matrix(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, export = checkpoint("llama_gqa"), tmp_path / "out.gguf", "--export-imatrix"
    (tmp_path / "there").write_text("precious")
    monkeypatch.chdir(tmp_path)
    refused(run(folder, out, export, "out.gguf"), out, "cannot be the importance matrix as well")
    refused(run(folder, out, "--report", "r", export, tmp_path / "r"), out, "cannot be the importance matrix as well")
    refused(run(folder, out, export, tmp_path / "no" / "m.gguf"), out, "does not exist")
    refused(run(folder, out, export, "there"), out, "exists already")
    refused(run(folder, out, export, tmp_path), out, "is a folder")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_an_export_that_fails_at_last(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder goes away in the meantime; what was gathered stays for the next attempt."""
    place, real = tmp_path / "place", importance.gather
    place.mkdir()

    def gather(*args: object) -> object:
        place.rmdir()
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(importance, "gather", gather)
    with pytest.raises(OutputError):
        convert(checkpoint("llama_gqa"), tmp_path / "out.gguf", settings(export_imatrix=place / "m.gguf"))
    assert not (tmp_path / "out.gguf").exists() and work_folder(tmp_path / "out.gguf").is_dir()


@pytest.mark.parametrize("words", [("--no-imatrix",), ("--imatrix", "IMATRIX"), ("--type", "bf16")])
def test_nothing_to_export(checkpoint: MakeCheckpoint, tmp_path: Path, words: Sequence[str]) -> None:
    out = tmp_path / "out.gguf"
    refused(run(checkpoint("llama_gqa"), out, "--export-imatrix", tmp_path / "m", *words), out, "nothing to export")
