"""What an answer consists of, piece by piece: text, and calls of tools."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

from ziggurat.runtime.server.tools.forms import Form

_SHORT_ID = string.ascii_letters + string.digits


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A call begins, the ``index``-th of the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of the arguments, a JSON object's text, of the call with this ``index``."""

    index: int
    text: str


Delta = TextDelta | CallDelta | ArgumentsDelta


def new_id(form: Form) -> str:
    """Return an id for a call that the form's template will take back."""
    if form.short_ids:
        return "".join(secrets.choice(_SHORT_ID) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
