"""The server's log on stderr: JSON, one object a line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any


class JsonLines(logging.Formatter):
    """Formats a record as an object: ``time`` (UTC), ``level``, ``logger``, ``message``, and ``fields`` of its extra.

    A traceback goes into ``traceback``, so that every line is one object whatever happens.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line.update(fields)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send this package's log, and uvicorn's errors, to stderr as JSON lines. For commands, not for libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, least in (("ziggurat", level), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False
    if level > logging.DEBUG:  # the library tells at INFO what it does
        logging.getLogger("ziggurat.runtime.llama_cpp").setLevel(logging.WARNING)
