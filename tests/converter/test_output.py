"""What a conversion leaves behind: the whole file, or nothing at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.plain import PLAIN_FLAGS, plain
from ziggurat.converter import cli, pipeline, write
from ziggurat.converter.errors import OutputError
from ziggurat.converter.pipeline import convert
from ziggurat.converter.report import Estimate

MakeCheckpoint = Callable[..., Path]


class Recorder:
    def __init__(self) -> None:
        self.estimates: list[Estimate] = []
        self.parameters = 0

    def planned(self, estimate: Estimate) -> None:
        self.estimates.append(estimate)

    def advance(self, parameters: int, tensor: str) -> None:
        self.parameters += parameters


def test_report_and_progress(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out, recorder = tmp_path / "out.gguf", Recorder()
    settings = plain(report=tmp_path / "report.json", threads=2)
    report = convert(checkpoint("llama_gqa"), out, settings, recorder)
    assert report.output_bytes == out.stat().st_size
    assert sum(share.parameters for share in report.types.values()) == report.parameters == recorder.parameters
    assert report.bits_per_weight == pytest.approx(8 * sum(s.bytes for s in report.types.values()) / report.parameters)
    assert recorder.estimates[0].output_bytes < report.output_bytes
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["types"].keys() == report.types.keys() and written["type"] == "q4_k_m"
    assert written["pre_tokenizer"] == "llama-bpe"


def test_same_file_for_any_number_of_threads(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    for threads in (1, 3):
        convert(checkpoint("qwen3"), tmp_path / f"{threads}.gguf", plain(threads=threads))
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_force_replaces(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("old")
    with pytest.raises(OutputError):
        convert(checkpoint("llama_gqa"), out, plain())
    convert(checkpoint("llama_gqa"), out, plain(force=True))
    assert out.read_bytes()[:4] == b"GGUF"


def test_sharded_checkpoint_gives_the_same_file(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The index file decides what belongs to the model, wherever the tensors lie."""
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(checkpoint("llama_gqa", dtype="float32"), tmp_path / "a" / "model"))
    convert(folder, tmp_path / "single.gguf", plain())
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for i, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        shard = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert(folder, tmp_path / "sharded.gguf", plain())
    assert (tmp_path / "single.gguf").read_bytes() == (tmp_path / "sharded.gguf").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")])
def test_nothing_is_left_after_a_failure_in_mid_file(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    class Failing(Recorder):
        def advance(self, parameters: int, tensor: str) -> None:
            super().advance(parameters, tensor)
            if tensor.startswith("blk.1"):
                raise error

    failing = Failing()
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        convert(checkpoint("llama_gqa"), tmp_path / "out.gguf", plain(), failing)
    assert failing.parameters > 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A limit on the file size stands for a disk that fills up: the write fails in the kernel."""
    folder, limits = checkpoint("llama_gqa"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        result = CliRunner().invoke(cli.convert, [str(folder), str(tmp_path / "out.gguf"), *PLAIN_FLAGS])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("convert: error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_reserves_nothing(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(checkpoint("llama_gqa"), tmp_path / "reserved.gguf", plain())

    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(write, "_reserve_blocks", refuse)
    convert(checkpoint("llama_gqa"), tmp_path / "plain.gguf", plain())
    assert (tmp_path / "reserved.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_signals(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A conversion stopped in the middle ends at once, says so and leaves nothing: three of them in one process."""
    code = (
        "import time, sys\n"
        "from ziggurat.converter import cli\n"
        "def slow(self, parameters, tensor):\n"
        "    print('working', flush=True)\n"
        "    time.sleep(0.05)\n"
        "cli.Display.advance = slow\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        cli.main()\n"
        "    except SystemExit as e:\n"
        "        print('ended', e.code, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(checkpoint("llama_gqa")), str(tmp_path / "out.gguf"), *PLAIN_FLAGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        said = next(line for line in process.stdout if line != "working\n")
        assert said == "ended 130\n", number
        assert list(tmp_path.iterdir()) == [], number
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert stderr.count("interrupted, nothing was written") == 3 and "Traceback" not in stderr


def test_what_a_killed_conversion_left_is_removed_by_the_next(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Not what a running one is writing, nor anybody else's file."""
    out = tmp_path / "out.gguf"
    killed, running, foreign = (tmp_path / f".{name}.part" for name in ("out.gguf.1", "out.gguf.2", "other.gguf.1"))
    for path in (killed, running, foreign):
        path.write_bytes(b"GGUF")
    with running.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        convert(checkpoint("llama_gqa"), out, plain())
    assert sorted(tmp_path.iterdir()) == sorted([out, running, foreign])

    class Looking(Recorder):
        def advance(self, parameters: int, tensor: str) -> None:
            (partial,) = set(tmp_path.glob(".out.gguf.*"))
            with partial.open("r+b") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            super().advance(parameters, tensor)

    looking = Looking()
    running.unlink()
    convert(checkpoint("llama_gqa"), out, plain(force=True), looking)
    assert looking.parameters > 0


def test_the_report_on_standard_output(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    read, write = os.pipe()
    stdout = os.dup(1)
    os.dup2(write, 1)
    try:
        command = [checkpoint("llama_gqa"), tmp_path / "out.gguf", *PLAIN_FLAGS, "--report", "/dev/stdout"]
        result = CliRunner().invoke(cli.convert, [str(word) for word in command])
    finally:
        os.dup2(stdout, 1)
        for fd in (stdout, write):
            os.close(fd)
    with open(read) as pipe:
        assert json.load(pipe)["type"] == "q4_k_m"
    assert result.exit_code == 0 and result.stdout == "", result.output


def test_a_link_stays_and_the_file_behind_it_is_written(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("out.gguf", "report.json"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    convert(checkpoint("llama_gqa"), tmp_path / "out.gguf", plain(report=tmp_path / "report.json"))
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["out.gguf", "report.json"]
    assert all((tmp_path / name).is_symlink() for name in ("out.gguf", "report.json"))


def test_the_final_name_appears_only_at_the_end(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"

    class Watching(Recorder):
        def advance(self, parameters: int, tensor: str) -> None:
            assert not out.exists()
            super().advance(parameters, tensor)

    watching = Watching()
    convert(checkpoint("llama_gqa"), out, plain(), watching)
    assert out.exists() and watching.parameters > 0
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize(
    ("model", "out", "where"),
    [
        ("Ein Türm 塔 1B", "out.gguf", "."),
        ("./Ein Türm 塔 1B/", "ein Türm.塔", "."),  # any name will do for the output
        (".", "../out.gguf", "Ein Türm 塔 1B"),
        ("..", "out.gguf", "Ein Türm 塔 1B/inside"),
    ],
)
def test_names_and_relative_paths(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, out: str, where: str
) -> None:
    """The model is called by its folder, however that was named on the command line."""
    folder = Path(shutil.copytree(checkpoint("llama_gqa"), tmp_path / "Ein Türm 塔 1B"))
    (folder / "inside").mkdir()
    monkeypatch.chdir(tmp_path / where)
    report = convert(model, out, plain())
    assert report.name == "Ein Türm 塔 1B"
    assert Path(out).read_bytes()[:4] == b"GGUF"


def test_a_read_only_model_folder(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Root may write everywhere, so what counts is that nothing in the folder changed."""
    folder = Path(shutil.copytree(checkpoint("llama_gqa"), tmp_path / "model"))
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    for path in before:
        path.chmod(0o555)
    try:
        convert(folder, tmp_path / "out.gguf", plain())
        assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before
    finally:
        for path in before:
            path.chmod(0o755)


@pytest.mark.parametrize("card", [b"---\nname: [\n---\n", b"---\nname: \xff\n---\n"], ids=["yaml", "bytes"])
def test_a_model_card_that_cannot_be_read(
    checkpoint: MakeCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, card: bytes
) -> None:
    folder = Path(shutil.copytree(checkpoint("llama_gqa"), tmp_path / "model"))
    (folder / "README.md").write_bytes(card)
    report = convert(folder, tmp_path / "out.gguf", plain())
    assert report.name == "model"
    assert any("README.md is left aside" in message for message in caplog.messages)


def test_default_threads_follow_the_affinity(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    report = convert(checkpoint("llama_gqa"), tmp_path / "out.gguf", plain())
    assert report.threads == len(os.sched_getaffinity(0))


def test_time_is_measured(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    start = time.perf_counter()
    report = pipeline.convert(checkpoint("llama_gqa"), tmp_path / "out.gguf", plain())
    assert 0 < report.seconds <= time.perf_counter() - start
