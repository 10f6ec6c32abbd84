"""Greedy search, repair and whole conversions taken up again after a kill; when a work folder is refused or dropped."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from helpers.deep import build_deep, random_tokens
from helpers.plain import PLAIN_FLAGS
from ziggurat.converter import cli
from ziggurat.converter import prune as choice
from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings
from ziggurat.converter.calibration_text import CalibrationTokens, TextSettings
from ziggurat.converter.calibration_work import WorkFolder, discard, kept_text
from ziggurat.converter.checkpoint import Checkpoint, open_checkpoint
from ziggurat.converter.correction import RepairSettings
from ziggurat.converter.display import Display
from ziggurat.converter.errors import CalibrationError
from ziggurat.converter.pipeline import ConvertSettings, convert, work_folder
from ziggurat.converter.prune import PruneSettings
from ziggurat.converter.removal_search import remembered_losses
from ziggurat.converter.repair_pass import Repaired, cut

TOKENS = random_tokens(16, 32)
SETTINGS = CalibrateSettings(batch_tokens=512, threads=1)  # a batch to solve on, another to judge by
REMOVED, REPAIR = (2, 3), RepairSettings()
# Of each kept block the batches that go through it and the removed ones behind it: of the whole model, of the cut one,
# and of the corrected one.
CALLS = (2, 3 * 2 + 1 + 2, 2 + 1 + 2, 2 + 1 + 2)
TEXT = TextSettings(tokens=512, sequence=64)

pytestmark = pytest.mark.usefixtures("quick_fit")


class Watcher:
    """Counts the steps, and may stop after some of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.total = self.done = self.calls = 0
        self._stop_after = stop_after

    def planned(self, estimate: object) -> None:
        """Nothing."""

    def stage(self, name: str, total: int) -> None:
        self.total += total

    def step(self, count: int, what: str) -> None:
        self.done += count
        self._count()

    def advance(self, parameters: int, tensor: str) -> None:
        self._count()

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("deep") / "model"
    return open_checkpoint(build_deep(folder, 6, hidden_size=64, intermediate_size=96, num_attention_heads=4))


@functools.lru_cache(1)
def blocks_of(folder: Path) -> Blocks:
    return Blocks(open_checkpoint(folder))


def mend(
    deep: Checkpoint, work: Path | None, watcher: Watcher | None = None, tokens: CalibrationTokens = TOKENS,
    how: RepairSettings | None = REPAIR, **settings: Any,
) -> Repaired:  # fmt: skip
    removed = settings.pop("removed", REMOVED)
    calibrating = dataclasses.replace(SETTINGS, work=work, **settings)
    return cut(blocks_of(deep.folder), tokens, removed, calibrating, how, watcher)


def assert_same(got: Repaired, wanted: Repaired) -> None:
    """Bit for bit."""
    assert list(got.folds) == list(wanted.folds)
    for index, fold in wanted.folds.items():
        assert fold.add is not None
        assert np.array_equal(got.folds[index].add, fold.add)
    assert dataclasses.replace(got, folds={}) == dataclasses.replace(wanted, folds={})


@pytest.fixture(scope="module")
def whole(deep: Checkpoint) -> Repaired:
    """The repair without a work folder."""
    watcher = Watcher()
    repaired = mend(deep, None, watcher)
    assert len(repaired.folds) > 1  # else comparing them would say little
    assert watcher.calls == sum(CALLS) and watcher.done == watcher.total
    return repaired


# Repair


@pytest.mark.parametrize(
    ("stop_after", "in_memory"), [(1, True), (2, False), (3, True), (11, False), (12, True), (16, False), (21, True)]
)
def test_a_killed_repair_goes_on(
    deep: Checkpoint, whole: Repaired, tmp_path: Path, stop_after: int, in_memory: bool
) -> None:
    share = 0.25 if in_memory else 0.0
    with pytest.raises(KeyboardInterrupt):
        mend(deep, tmp_path, Watcher(stop_after), memory_share=share)
    # steps are told before a block is finished: the last one of a block stops it as well
    finished = sum(sum(CALLS[: i + 1]) < stop_after for i in range(len(CALLS)))
    kept = sorted(path.name for path in (tmp_path / "repair").glob("*.f32"))
    streams = [] if not finished else ["whole"] if finished == 1 else ["mended", "plain", "whole"]
    assert kept == [f"{name}-{finished:04}.f32" for name in streams]
    watcher = Watcher()
    assert_same(mend(deep, tmp_path, watcher, memory_share=share), whole)
    assert watcher.calls == sum(CALLS[finished:]) and watcher.done == watcher.total
    again = Watcher()
    assert_same(mend(deep, tmp_path, again), whole)
    assert again.calls == again.total == 0
    assert not list(tmp_path.glob("repair/*.f32")) and not (tmp_path / "repair" / "scratch").exists()


@pytest.mark.parametrize("how", [None, RepairSettings(inputs=False, behind=False)])
def test_other_repairs_go_on_too(deep: Checkpoint, tmp_path: Path, how: RepairSettings | None) -> None:
    watcher = Watcher()
    wanted = mend(deep, None, watcher, how=how)
    assert watcher.done == watcher.total
    with pytest.raises(KeyboardInterrupt):
        mend(deep, tmp_path, Watcher(watcher.calls), how=how)
    again = Watcher()
    got = mend(deep, tmp_path, again, how=how)
    assert again.calls < watcher.calls / 2 and again.done == again.total
    assert [np.array_equal(fold.times, wanted.folds[i].times) for i, fold in got.folds.items()] == [True] * len(
        wanted.folds
    )
    assert dataclasses.replace(got, folds={}) == dataclasses.replace(wanted, folds={})


@pytest.mark.parametrize(
    ("what", "change"),
    [
        (r"removed blocks \(2, 3, now 2\)", {"removed": (2,)}),
        (r"corrections \(.*'weighted': True.*'weighted': False", {"how": RepairSettings(weighted=False)}),
        (r"corrections \(.*now nothing", {"how": None}),
        ("text", {"tokens": random_tokens(16, 32, seed=1)}),
        ("batch", {"batch_tokens": 64}),
    ],
)
def test_a_changed_repair_is_refused_by_name(
    deep: Checkpoint, tmp_path: Path, what: str, change: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        mend(deep, tmp_path, Watcher(3))
    with pytest.raises(CalibrationError, match=rf"unfinished repair that differs in {what}.*remove the folder") as no:
        mend(deep, tmp_path, **change)
    assert "\n" not in str(no.value) and str(tmp_path / "repair") in str(no.value)
    assert (tmp_path / "repair" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["whole-0002.f32", "plain-0002.f32", "mended-0002.f32", "block-0001.npz"])
@pytest.mark.parametrize("content", [None, b"short"])
def test_a_damaged_repair_is_refused(deep: Checkpoint, tmp_path: Path, name: str, content: bytes | None) -> None:
    with pytest.raises(KeyboardInterrupt):
        mend(deep, tmp_path, Watcher(14))
    path = tmp_path / "repair" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=f"{name} is missing or damaged: remove"):
        mend(deep, tmp_path)


@pytest.mark.parametrize("renamed", [True, False])
def test_a_repair_killed_while_it_saves(
    deep: Checkpoint, whole: Repaired, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool
) -> None:
    """Killed at every file that gets its name, just behind or just before that."""
    real, seen = os.replace, set[str]()

    def replace(source: Path, target: Path) -> None:
        manifest = target.name == "manifest.json"
        what = str(json.loads(source.read_text())["finished"]) if manifest else target.name
        new = what not in seen
        seen.add(what)
        if renamed or not new:
            real(source, target)
        if new:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    kills = 0
    while True:
        try:
            assert_same(mend(deep, tmp_path), whole)
            break
        except KeyboardInterrupt:
            kills += 1
    # of each kept block the whole model's states, from the second on two more, figures and manifest; the judgement
    assert kills == len(seen) == 4 * 3 + 3 * 2 + 2


# Greedy search


def search(deep: Checkpoint, work: Path | None, n: int, watcher: Watcher, **settings: Any) -> tuple[int, ...]:
    how, blocks = dataclasses.replace(SETTINGS, work=work, **settings), blocks_of(deep.folder)
    with remembered_losses(blocks, settings.pop("tokens", TOKENS), how, watcher) as losses:
        return choice.by_perplexity(losses, blocks.n_layer, n)


def test_a_killed_search_goes_on_from_the_last_removal(deep: Checkpoint, tmp_path: Path) -> None:
    first, whole = Watcher(), Watcher()
    search(deep, None, 1, first)
    wanted = search(deep, None, 2, whole)
    for i, (stop_after, spared) in enumerate([(3, 0), (first.calls, 0), (first.calls + 1, 1), (whole.calls, 1)]):
        work = tmp_path / str(i)
        with pytest.raises(KeyboardInterrupt):
            search(deep, work, 2, Watcher(stop_after), memory_share=0.0)
        assert not (work / "perplexity" / "scratch").exists()
        again = Watcher()
        assert search(deep, work, 2, again) == wanted
        assert again.calls == whole.calls - spared * first.calls and again.done == again.total


def test_a_longer_search_takes_up_a_shorter_one(deep: Checkpoint, tmp_path: Path) -> None:
    """Losses of a removal do not depend on how many follow."""
    one, two = Watcher(), Watcher()
    search(deep, tmp_path, 1, one)
    wanted = search(deep, None, 2, two)
    again = Watcher()
    assert search(deep, tmp_path, 2, again) == wanted
    assert again.calls == two.calls - one.calls
    with pytest.raises(CalibrationError, match="perplexity search that differs in batch"):
        search(deep, tmp_path, 2, Watcher(), batch_tokens=64)


# The whole conversion


def settings(**options: Any) -> ConvertSettings:
    prune = PruneSettings(count=2, by=options.pop("by", "influence"))
    return ConvertSettings(**{"type": "q4_0", "threads": 1, "prune": prune, "calibration": TEXT, **options})


@pytest.fixture(scope="module")
def wanted(deep: Checkpoint, quick_fit: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of conversions that nothing interrupts."""
    files = {}
    for by in ("influence", "perplexity"):
        out = tmp_path_factory.mktemp(by) / "out.gguf"
        convert(deep.folder, out, settings(by=by))
        files[by] = out.read_bytes()
    return files


@pytest.mark.parametrize(
    ("by", "limits"), [("influence", [4, 12, 12, 12, 12]), ("perplexity", [30, 25, 12, 12, 12, 12, 12])]
)
def test_a_conversion_killed_again_and_again_gives_the_same_file(
    deep: Checkpoint, wanted: dict[str, bytes], tmp_path: Path, by: str, limits: list[int]
) -> None:
    """Every run finishes a block or a removal more, the last one is killed while it writes."""
    out = tmp_path / "out.gguf"
    for limit in limits:
        with pytest.raises(KeyboardInterrupt):
            convert(deep.folder, out, settings(by=by), Watcher(limit))
        assert {path.name for path in tmp_path.iterdir()} <= {work_folder(out).name}
    last = Watcher()
    convert(deep.folder, out, settings(by=by), last)
    assert last.total == 0  # nothing was left to measure
    assert out.read_bytes() == wanted[by]
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_conversion_to_the_same_place_with_other_settings(
    deep: Checkpoint, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """What another number of blocks can use is used, what it cannot is refused by name; the type does not matter."""
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(deep.folder, out, settings(), Watcher(20))
    with pytest.raises(CalibrationError, match=r"unfinished repair that differs in removed blocks \("):
        convert(deep.folder, out, settings(prune=PruneSettings(count=1)))
    with pytest.raises(CalibrationError, match=r"calibration that differs in text \(.*, sequences \(8, now 4"):
        convert(deep.folder, out, settings(calibration=TextSettings(tokens=256, sequence=64)))
    other = Watcher()
    convert(deep.folder, out, settings(type="q8_0"), other)
    assert other.total < TOKENS.ids.size * 20  # no calibration, and not all of the repair
    assert not work_folder(out).exists()
    convert(deep.folder, out, settings(force=True))
    assert out.read_bytes() == wanted["influence"]


def test_the_work_is_dropped_when_its_place_is_taken(deep: Checkpoint, tmp_path: Path) -> None:
    """A conversion that has no use for it leaves it until the output is there, and then nothing can go on from it."""
    out, plain = tmp_path / "out.gguf", settings(prune=None)
    with pytest.raises(KeyboardInterrupt):
        convert(deep.folder, out, settings(), Watcher(20))
    with pytest.raises(KeyboardInterrupt):
        convert(deep.folder, out, plain, Watcher(3))
    assert (work_folder(out) / "repair" / "manifest.json").exists()
    convert(deep.folder, out, plain)
    assert not work_folder(out).exists()


def test_work_in_use_is_not_dropped(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name in ("repair", "calibration"):
        with WorkFolder(work / name, {}) as stage:
            stage.finish(0, {})
    with WorkFolder(work / "repair", {}) as stage:
        discard(work)
        assert [path.name for path in work.iterdir()] == ["repair"]
        stage.finish(1, {})
    discard(work)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_stay(tmp_path: Path) -> None:
    """A folder that somebody names may hold more than work."""
    (tmp_path / "repair").mkdir()
    (tmp_path / "repair" / "notes.txt").write_text("mine")
    with WorkFolder(tmp_path / "repair", {}):
        pass
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["repair", "repair/notes.txt"]


# What the command says


def interrupted(
    monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, calls: int, *words: str, error: type = KeyboardInterrupt
) -> Result:
    """Run `convert` until it has reported so many steps."""

    class Stopping(Display):
        left = calls

        def _count(self, *_: Any) -> None:
            Stopping.left -= 1
            if Stopping.left < 0:
                raise error

    monkeypatch.setattr(cli, "Display", Stopping)
    options = ["--type", "q4_0", "--threads", "1", "--calibration-tokens", "512", "--calibration-sequence", "64"]
    return CliRunner().invoke(cli.convert, [str(folder), str(out), *options, *words])


@pytest.mark.parametrize(
    ("error", "code", "says"), [(KeyboardInterrupt, 130, "interrupted"), (MemoryError, 1, "out of memory")]
)
def test_what_is_kept_is_told(
    deep: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type, code: int, says: str
) -> None:
    out = tmp_path / "out.gguf"
    early = interrupted(monkeypatch, deep.folder, out, 0, "--prune", "2", error=error)
    assert says in early.output and "keeps" not in early.output
    assert list(tmp_path.iterdir()) == []
    for calls in (2, 4, 30):  # calibration, repair, writing
        done = interrupted(monkeypatch, deep.folder, out, calls, "--prune", "2", error=error)
        assert done.exit_code == code
        (line,) = [line for line in done.output.splitlines() if line.startswith("convert: error:")]
        assert line.startswith(f"convert: error: {says}, nothing was written")
        assert line.endswith(f"; {work_folder(out)} keeps what is finished for the same command to go on from")
    refused = interrupted(monkeypatch, deep.folder, out, 99, "--prune", "1")  # by the repair, which names its folder
    assert "unfinished repair that differs in removed blocks" in refused.output and "keeps" not in refused.output


def test_what_another_command_keeps_is_not_told(
    deep: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    interrupted(monkeypatch, deep.folder, out, 4, "--prune", "2")
    assert kept_text(work_folder(out))
    (work_folder(out) / "calibration" / "lock").write_text("another process")
    done = interrupted(monkeypatch, deep.folder, out, 4, *PLAIN_FLAGS)
    assert done.exit_code == 130 and done.output.splitlines()[-1] == "convert: error: interrupted, nothing was written"
    assert (work_folder(out) / "calibration" / "manifest.json").exists()
