"""Conversions that measure nothing, where only what the checkpoint says decides the file; and that measure little."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ziggurat.converter import fitting
from ziggurat.converter.compensate import CompensateSettings
from ziggurat.converter.compensate_step import Compensation
from ziggurat.converter.pipeline import ConvertSettings
from ziggurat.converter.scale import ScaleSearch, ScaleSettings

PLAIN_FLAGS = ("--no-awq", "--no-imatrix")
QUICK_SCALES = ScaleSettings(grid=2, values=1 << 12, samples=64, finalists=1, final_values=1 << 14, final_tokens=64)
QUICK_COMPENSATION = CompensateSettings(shrinkages=(1.0,), passes=1, trial_rows=1)


def plain(**options: Any) -> ConvertSettings:
    """Settings of a conversion without a calibration text."""
    return ConvertSettings(gather_imatrix=False, awq=False, **options)


@contextmanager
def fitted_quickly() -> Iterator[None]:
    """Let conversions fit weights to activations with the least of everything that is tried out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "ScaleSearch", functools.partial(ScaleSearch, settings=QUICK_SCALES))
        patch.setattr(fitting, "Compensation", functools.partial(Compensation, settings=QUICK_COMPENSATION))
        yield
