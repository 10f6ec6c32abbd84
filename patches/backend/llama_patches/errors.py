"""The one exception that the backend shows to people."""

from __future__ import annotations


class BuildError(Exception):
    """Something that a person can mend; the message says what, where, and the next step, in one line."""
