"""Conversions that measure nothing: only what the checkpoint says decides the file."""

from __future__ import annotations

from typing import Any

from ziggurat.converter.pipeline import ConvertSettings

PLAIN_FLAGS = ("--no-awq", "--no-imatrix")


def plain(**options: Any) -> ConvertSettings:
    """Settings of a conversion without a calibration text."""
    return ConvertSettings(gather_imatrix=False, awq=False, **options)
