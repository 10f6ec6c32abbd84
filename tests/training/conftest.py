"""Makes the scripts of the reference model importable as they import each other: by bare name."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "reference_model"):
    sys.path.insert(0, str(folder))
