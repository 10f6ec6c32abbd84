"""A flag that stops a computation from another thread without Python in the loop."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


class AbortFlag:
    """Set from any thread; llama.cpp reads it before every graph node through a C callback.

    A Python callback would take the interpreter lock a thousand times per token and, in a busy server, wait for it each
    time. So the callback is the C library's ``strlen`` and the flag a two-byte string: empty means go on (0), one
    character means stop (1). ``bool (*)(void *)`` and ``size_t (*)(const char *)`` pass and return 0 and 1 alike in
    every ABI that llama.cpp's wheels exist for. A patched library may offer a named function instead.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)
        self.address = ctypes.addressof(self._text)
        self.function: Any = _strlen()

    def set(self) -> None:
        """Ask the computation to stop."""
        self._text[0] = b"x"

    def clear(self) -> None:
        """Let the next computation run."""
        self._text[0] = b"\0"

    @property
    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._text[0] != b"\0"


def _strlen() -> Any:
    if sys.platform == "win32":
        return ctypes.cdll.msvcrt.strlen
    return ctypes.CDLL(None).strlen
