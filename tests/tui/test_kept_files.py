"""Files of rows: none of conversations that are gone, and not more than may be."""

from __future__ import annotations

import os
from pathlib import Path

from ziggurat.runtime.files import state_file
from ziggurat.tui.kept_files import KeptFiles


def test_files_of_other_conversations_go(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path / "rows")
    for name in ("a", "b"):
        state_file(kept.folder, name).touch()
    (kept.folder / "other.txt").touch()
    kept.keep_only(["a"])
    assert sorted(kept.folder.iterdir()) == sorted([state_file(kept.folder, "a"), kept.folder / "other.txt"])


def test_oldest_files_go_first(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path, limit=250)
    for age, name in enumerate("abc"):
        path = state_file(tmp_path, name)
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    kept.prune()
    assert sorted(tmp_path.iterdir()) == sorted([state_file(tmp_path, "a"), state_file(tmp_path, "b")])


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = KeptFiles(tmp_path / "file" / "rows")
    kept.keep_only([])
    kept.prune()
