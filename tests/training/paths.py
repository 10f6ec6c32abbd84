from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "reference_model"
STORY = (
    'Once upon a time there was a girl named Mia. She had a red boat. "Look at my boat!" she said. '
    "Her friend Ben came to the lake and they played until the sun was low. "
)
