"""What the tests of the build backend share."""

import os
import shutil
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).resolve().parents[2] / "patches"
sys.path.insert(0, str(PATCHES / "backend"))  # as pip does for the backend-path of pyproject.toml


@pytest.fixture(scope="session")
def patches():
    """The patches folder of this checkout."""
    return PATCHES


@pytest.fixture
def own_patches(tmp_path):
    """A copy of the patches folder that a test may change."""
    return shutil.copytree(PATCHES, tmp_path / "patches", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="session")
def archive():
    """The pinned upstream archive: from the cache where a build leaves it, else fetched as a build does."""
    from llama_patches import kept, source
    from llama_patches.pin import Pin

    return source.kept_archive(Pin.read(PATCHES), kept.cache_folder(os.environ))


@pytest.fixture(scope="session")
def upstream(archive, tmp_path_factory):
    """The upstream files that a build takes, as they are released. Not to be changed."""
    from llama_patches import source
    from llama_patches.pin import Pin, read_hashes

    tree = tmp_path_factory.mktemp("upstream")
    hashes = read_hashes(PATCHES / "upstream.sha256")
    source.unpack(str(archive), Pin.read(PATCHES), hashes, tree / "no-cache", tree)
    return tree


@pytest.fixture
def touched(upstream, tmp_path):
    """A copy of just the upstream files that the patches touch."""
    from llama_patches.series import read_series

    tree = tmp_path / "touched"
    for path in {d.path for patch in read_series(PATCHES) for d in patch.diffs}:
        if (upstream / path).exists():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(upstream / path, tree / path)
    return tree


@pytest.fixture(scope="session")
def assembled(archive, tmp_path_factory):
    """The tree that is built. Not to be changed."""
    from llama_patches.assemble import assemble

    tree = tmp_path_factory.mktemp("assembled") / "tree"
    assemble(PATCHES, str(archive), tree, tree)
    return tree
