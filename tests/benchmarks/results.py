"""Result files of benchmarks that are run in pieces: a JSON list, one line for each piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(path: Path, result: dict[str, Any]) -> None:
    """Add a result to the file's list; the file may not be there yet."""
    known = json.loads(path.read_text()) if path.exists() else []
    path.write_text("[\n" + ",\n".join(json.dumps(each) for each in [*known, result]) + "\n]\n")
