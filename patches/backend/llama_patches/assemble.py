"""The tree that is built: upstream's files, patched, with our own files and the moved packages in it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from .errors import BuildError
from .kept import source_digest
from .pin import Pin, read_hashes
from .relocate import LLAMA_CPP, relocate
from .series import apply_series, read_series
from .source import unpack

VERSION_LINE = re.compile(r'^__version__ = "([^"]*)"$', re.MULTILINE)

OWN_FILES = LLAMA_CPP / "src" / "ziggurat"


def assemble(folder: Path, source: str | None, cache: Path, tree: Path) -> None:
    """Make the tree that upstream's build takes. On a tree that is assembled already, nothing changes.

    Args:
        folder: the patches folder.
        source: where the upstream files come from, see `source.unpack`.
        cache: where the upstream archive is kept.
        tree: the folder to make.

    Raises:
        BuildError: the source differs from the pin, a patch does not fit, or a moved package still uses its old name.
    """
    pin = Pin.read(folder)
    patches = read_series(folder)
    unpack(source, pin, read_hashes(folder / "upstream.sha256"), cache, tree)
    apply_series(patches, tree)
    add_own_files(folder, tree, pin)
    relocate(tree)


def add_own_files(folder: Path, tree: Path, pin: Pin) -> None:
    """Copy our C++ files to where the CMake hook looks for them, and label the version.

    Raises:
        BuildError: upstream's version is not stated where it is expected.
    """
    target = tree / OWN_FILES
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / "src", target)
    (target / "ziggurat-build.h").write_text(
        "#pragma once\n\n"
        f'#define ZIGGURAT_VERSION "{pin.full_version}"\n'
        f'#define ZIGGURAT_SOURCE_HASH "{source_digest(folder)}"\n',
        encoding="utf-8",
    )
    init = tree / "llama_cpp" / "__init__.py"
    text = init.read_text(encoding="utf-8")
    if VERSION_LINE.findall(text) not in ([pin.version], [pin.full_version]):
        raise BuildError(f"llama_cpp/__init__.py does not state __version__ = {pin.version!r} once")
    init.write_text(VERSION_LINE.sub(f'__version__ = "{pin.full_version}"', text), encoding="utf-8")
