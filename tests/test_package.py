"""What gets installed, who imports whom, and that importing does nothing else."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = ("converter", "runtime", "tui")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = [contract["name"] for contract in PROJECT["tool"]["importlinter"]["contracts"]]
# Whatever else lies in the folders belongs to an installation as well: style sheets, type markers, data.
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.egg-info")


def sources(root: Path) -> set[str]:
    """Files of the three packages by the path they have when installed."""
    files = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file())
    return {f"ziggurat/{path.relative_to(root).as_posix()}" for path in files}


def modules(root: Path) -> list[str]:
    names = {path.removesuffix(".py").removesuffix("/__init__") for path in sources(root) if path.endswith(".py")}
    return sorted(name.replace("/", ".") for name in names if not name.endswith("__main__"))


def copy(target: Path, *, build_files: bool = False) -> Path:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=IGNORED)
    if build_files:
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, target)
    return target


# The wheel


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without what a working tree collects. Left-overs of old builds would hide a missing entry."""
    folder = copy(tmp_path_factory.mktemp("wheel") / "clean", build_files=True)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_nothing.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def wheel(clean: Path) -> zipfile.ZipFile:
    listed = sources(clean)  # before the build leaves its own folders
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", clean.parent, clean]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sources(clean) == listed
    (path,) = clean.parent.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile, clean: Path) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources(clean)
    assert {f"ziggurat/{folder}/py.typed" for folder in FOLDERS} <= names
    assert "ziggurat/__init__.py" not in names  # one namespace, which other distributions may add to


def test_the_wheel_holds_the_licence(wheel: zipfile.ZipFile) -> None:
    (licence,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def entry_points(wheel: zipfile.ZipFile) -> dict[str, dict[str, str]]:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    parser = ConfigParser()
    parser.read_string(wheel.read(name).decode())
    return {section: dict(parser[section]) for section in parser.sections()}


def test_entry_points(wheel: zipfile.ZipFile, clean: Path) -> None:
    declared = entry_points(wheel)
    assert set(declared["console_scripts"]) == {"convert", "ziggurat"}
    assert {"convert", "run", "inspect", "doctor"} <= set(declared["ziggurat.commands"])
    for group in declared.values():
        for name, target in group.items():
            module, _, attribute = target.partition(":")
            assert module in modules(clean), name
            assert callable(getattr(importlib.import_module(module), attribute)), name


# The contracts between the packages

LINT = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename=sys.argv[1], no_cache=True, no_logo=True))
"""


def lint(root: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts on the packages of `root`, without a look at what is installed."""
    tree = tmp_path / "tree" / "ziggurat"
    tree.mkdir(parents=True)
    for folder in FOLDERS:
        (tree / folder).symlink_to(root / folder, target_is_directory=True)
    command = [sys.executable, "-c", LINT, str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=tree.parent, capture_output=True, text=True)


def test_contracts_are_kept(tmp_path: Path) -> None:
    result = lint(ROOT, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(CONTRACTS)} kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("converter/write.py", "from ziggurat.runtime import errors", 0),
        ("runtime/engine.py", "import torch", 1),
        ("runtime/engine.py", "import ziggurat.converter.errors", 1),
        ("runtime/engine.py", "import llama_cpp", 2),
        ("tui/__init__.py", "import llama_cpp", 2),
        ("runtime/server/app.py", "import ziggurat.runtime.engine.llama_engine", 3),
        ("runtime/server/app.py", "from ziggurat.runtime.bindings import Vocab", 3),
    ],
)
def test_contracts_can_be_broken(tmp_path: Path, module: str, line: str, contract: int) -> None:
    root = copy(tmp_path / "copy")
    with (root / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint(root, tmp_path)
    assert result.returncode == 1
    assert f"{CONTRACTS[contract]} BROKEN" in " ".join(result.stdout.split())
    assert f"{len(CONTRACTS) - 1} kept, 1 broken" in result.stdout


# What happens at import: nothing. Each module in a fresh interpreter would take minutes, so they share one, and the
# state is compared after every import. Heavy libraries are stopped at the door; numpy comes first, since it adds
# warning filters of its own.

STATE = """
import json, logging, os, signal, sys, threading, warnings
import numpy
warnings.simplefilter("error")
heavy = {"torch", "transformers", "llama_cpp", "huggingface_hub", "tokenizers", "sentencepiece"}

class Door:
    def find_spec(self, name, path=None, target=None):
        if name in heavy:
            raise AssertionError(f"imports {name}")

sys.meta_path.insert(0, Door())

def state():
    return {
        "handlers": [repr(h) for h in logging.getLogger().handlers],
        "level": logging.getLogger().level,
        "logger class": logging.getLoggerClass().__name__,
        "path": list(sys.path),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "threads": threading.active_count(),
        "filters": len(warnings.filters),
        "hooks": [repr(sys.excepthook), repr(sys.displayhook)],
    }

import importlib
changes, before = {}, state()
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
        after = state()
        found = {k: [before[k], after[k]] for k in after if after[k] != before[k]}
    except BaseException as e:
        after, found = before, repr(e)
    if found:
        changes[name] = found
    before = after
print(json.dumps(changes))
"""


def effects(names: list[str], tmp_path: Path) -> dict[str, object]:
    command = [sys.executable, "-c", STATE, json.dumps(names)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    changes: dict[str, object] = json.loads(result.stdout)
    return changes


# The only module of the runtime that loads the library, see the contracts.
LIBRARY = [name for name in modules(ROOT) if name.startswith("ziggurat.runtime.bindings")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_importing_does_nothing_else(tmp_path: Path, folder: str) -> None:
    names = [name for name in modules(ROOT) if name.startswith(f"ziggurat.{folder}") and name not in LIBRARY]
    assert names
    assert effects(names, tmp_path) == {}


def test_effects_of_an_import_would_be_seen(tmp_path: Path) -> None:
    lines = {
        "heavy": "import torch",
        "environment": "import os; os.environ['ZIGGURAT'] = '1'",
        "handlers": "import logging; logging.basicConfig()",
        "path": "import sys; sys.path.append('/somewhere')",
        "warned": "import warnings; warnings.warn('old')",
        "quiet": "import json",
    }
    for name, line in lines.items():
        (tmp_path / f"effect_{name}.py").write_text(line)
    found = effects([f"effect_{name}" for name in lines], tmp_path)
    assert {name.removeprefix("effect_") for name in found} == set(lines) - {"quiet"}
