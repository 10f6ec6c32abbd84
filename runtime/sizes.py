"""How sizes are written for people."""

from __future__ import annotations


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
