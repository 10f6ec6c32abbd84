"""What became of requests, added up."""

from __future__ import annotations

from dataclasses import dataclass

from ziggurat.runtime.engine.protocol import FinishEvent
from ziggurat.runtime.errors import EngineError, ZigguratError


@dataclass
class Counts:
    """What was served, since the engine was loaded; see ``EngineStats``. Prompts are counted when they are read."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    evicted_rows: int = 0

    def add(self, event: FinishEvent, *, failed: bool) -> None:
        """Count a request that ended, with its figures as far as it came."""
        stats = event.stats
        if failed:
            self.failed += 1
        elif event.reason == "cancelled":
            self.cancelled += 1
        else:
            self.finished += 1
        for name in ("generated_tokens", "drafted_tokens", "accepted_tokens", "evicted_rows"):
            setattr(self, name, getattr(self, name) + getattr(stats, name))


def presentable(error: Exception) -> ZigguratError:
    """Return what a caller gets of an error: ours as they are, others as the engine's failure."""
    if isinstance(error, ZigguratError):
        return error
    shown = EngineError(f"the engine failed on this request: {type(error).__name__}: {error}")
    shown.__cause__ = error
    return shown
