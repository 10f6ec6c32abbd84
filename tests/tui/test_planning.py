"""Plans and lists of models, by arithmetic."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny_models
from ziggurat.runtime.plan import machine
from ziggurat.tui.backend import BackendError, ModelSetup
from ziggurat.tui.planning import model_files, plan

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.write_model(folder / "tiny.gguf")
    (folder / "below").mkdir()
    tiny_models.write_split_model(folder / "below")
    (folder / "broken.gguf").write_bytes(b"GGUF")
    (folder / "notes.txt").touch()
    return folder


def have(monkeypatch: pytest.MonkeyPatch, total: int, available: int, gpus: tuple[int, ...] = ()) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: machine.Machine(total, available, 0, gpus))


def test_budget_takes_less(folder: Path) -> None:
    whole = asyncio.run(plan(ModelSetup(folder / "tiny.gguf", ctx=4096)))
    bounded = asyncio.run(plan(ModelSetup(folder / "tiny.gguf", ctx=4096, kv_budget="10%")))
    assert whole.kv == whole.kv_full and whole.rows == () and whole.n_ctx == 4096
    assert bounded.kv < whole.kv / 2
    assert (
        sum(bounded.rows) / len(bounded.rows) == pytest.approx(4096 / 10, abs=1) and bounded.rows[0] > bounded.rows[-1]
    )
    assert whole.shortage is None and 0 < whole.weights < whole.total


def test_what_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = ModelSetup(folder / "tiny.gguf", ctx=1_000_000)
    have(monkeypatch, 8192 * MIB, 10 * MIB)
    found = asyncio.run(plan(setup))
    assert found.shortage is not None and "10.00 MiB are free" in found.shortage and found.free == 10 * MIB
    assert asyncio.run(plan(setup, freed=8000 * MIB)).shortage is None


def test_gpu_that_is_too_small_where_the_host_may_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 8192 * MIB, 8000 * MIB, (MIB,))
    assert asyncio.run(plan(ModelSetup(folder / "tiny.gguf"))).shortage is None
    have(monkeypatch, 8192 * MIB, MIB, (MIB,))
    shortage = asyncio.run(plan(ModelSetup(folder / "tiny.gguf"))).shortage
    assert shortage is not None and "GPU" in shortage


def test_policy_that_there_is_not(folder: Path) -> None:
    with pytest.raises(BackendError, match="there is no policy '25%': write one of none, pyramid"):
        asyncio.run(plan(ModelSetup(folder / "tiny.gguf", kv_budget="64", kv_policy="25%")))


def test_settings_that_make_no_sense(folder: Path) -> None:
    for setup in (ModelSetup(folder / "none.gguf"), ModelSetup(folder / "tiny.gguf", kv_policy="snapkv")):
        with pytest.raises(BackendError):
            asyncio.run(plan(setup))


def test_models_of_folders(folder: Path) -> None:
    found = asyncio.run(model_files((folder, folder / "below", folder / "none"), ModelSetup(Path(), ctx=512)))
    names = [each.path.name for each in found]
    assert names[0] == "broken.gguf" and names[-1] == "tiny.gguf" and len(names) == 3
    assert "-00001-of-" in names[1]
    broken, _, tiny = found
    assert broken.trouble is not None and str(folder) not in broken.trouble
    assert tiny.trouble is None and tiny.architecture == "llama" and tiny.kv > 0 and tiny.total > tiny.kv
    assert tiny.size == tiny.path.stat().st_size


def test_no_library_is_loaded_for_it(folder: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from ziggurat.tui.backend import ModelSetup\n"
        "from ziggurat.tui.planning import plan\n"
        "asyncio.run(plan(ModelSetup(pathlib.Path(sys.argv[1]), kv_budget='10%')))\n"
        "assert 'llama_cpp' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "tiny.gguf")], check=True)
