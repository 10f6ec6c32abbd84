"""How sizes are written for people, and by them."""

from __future__ import annotations

import re

from ziggurat.runtime.errors import InvalidRequestError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def human_bytes(count: float) -> str:
    """Return bytes with a binary unit: 4.21 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def human_count(count: float) -> str:
    """Return a number with a decimal unit: 8.03 B."""
    for unit in ("", " K", " M", " B"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f} T"


def parse_bytes(text: str) -> int:
    """Return the bytes of a size as a person writes it: 48GiB, 33 GB (decimal), 512MiB, 1000000.

    Raises InvalidRequestError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    unit = match[2].lower() if match else ""
    # "48G" could be meant either way and "48i" is nothing
    if match is None or bool(unit) != bool(match[4]) or (match[3] and not unit):
        raise InvalidRequestError(f"{text!r} is not a size: write 48GiB, 33GB or a number of bytes")
    return int(float(match[1]) * (_BINARY_UNITS if match[3] else _UNITS)[unit])
