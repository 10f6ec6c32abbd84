"""The README's tables of the scores are those of the committed results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_readme_has_the_measured_table(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "tests" / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    spec = importlib.util.spec_from_file_location("kv_policies", folder / "kv_policies.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    files = ("kv_policies.json", "kv_studies.json")
    results = [result for name in files for result in json.loads((folder / name).read_text())]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(results) == 3
    for result in results:
        rows = script.table(result).partition("\n\n")[0]
        assert rows in readme
