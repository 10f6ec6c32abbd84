"""Takes llama.cpp's log lines: into ``logging``, and into captures that give a failed call its reason.

The library reports why a load failed only in its log, so every call that can fail runs inside ``capture()``.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

_logger = logging.getLogger("ziggurat.runtime.llama_cpp")

# enum ggml_log_level of ggml.h (llama_cpp's own table is off by one)
_DEBUG, _INFO, _WARN, _ERROR, _CONT = 1, 2, 3, 4, 5
# One step quieter than llama.cpp's own labels: what matters is raised as an exception with the reason in it.
_PYTHON_LEVEL = {_INFO: logging.DEBUG, _WARN: logging.INFO, _ERROR: logging.INFO}


class LogRelay:
    """The one receiver of the library's log. Called from whatever thread the library logs in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captures: list[list[tuple[int, str]]] = []
        self._level = _INFO
        self._partial = ""

    def receive(self, level: int, text: bytes | None, _user_data: Any) -> None:
        """Accept one piece of log text; lines arrive in pieces, continued ones with level CONT. Never raises."""
        with contextlib.suppress(Exception), self._lock:
            if level != _CONT:
                self._level = level
            *lines, self._partial = (self._partial + (text or b"").decode("utf-8", errors="replace")).split("\n")
            for line in filter(str.strip, lines):
                for capture in self._captures:
                    if self._level != _DEBUG:
                        capture.append((self._level, line.rstrip()))
                _logger.log(_PYTHON_LEVEL.get(self._level, logging.DEBUG), "%s", line.rstrip())

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[tuple[int, str]]]:
        """Collect the lines above debug level logged in this block, by any thread, as (level, line)."""
        lines: list[tuple[int, str]] = []
        with self._lock:
            self._captures.append(lines)
        try:
            yield lines
        finally:
            with self._lock:
                # by identity: two captures of the same lines are equal
                self._captures = [capture for capture in self._captures if capture is not lines]


def reason(lines: list[tuple[int, str]], fallback: str) -> str:
    """Return the first error among captured lines, without the name of the C++ function; else ``fallback``."""
    errors = [line for level, line in lines if level == _ERROR]
    if not errors:
        return fallback
    # "llama_model_load: error loading model: check_tensor: no tensor 'x'" -> "no tensor 'x'"
    functions = r"^(\w+: )?((error (loading|saving) (model|state)|failed to initialize the context): )?(\w+_\w+: )?"
    return re.sub(functions, "", errors[0]).strip()
