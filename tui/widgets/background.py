"""Work beside the screen, whose failure does not end the app."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from textual.dom import DOMNode

_logger = logging.getLogger(__name__)


def background(
    node: DOMNode,
    work: Callable[..., Coroutine[Any, Any, None]],
    *arguments: object,
    group: str = "default",
    exclusive: bool = False,
) -> None:
    """Run a coroutine function; ``exclusive`` ends what runs in its group. What it raises is logged, and said."""

    async def run() -> None:
        try:
            await work(*arguments)
        except Exception as error:
            _logger.exception("%s failed", work.__qualname__)
            node.app.notify(f"{error}: the log says where", title="Something failed", severity="error")

    worker: Any = run  # made a coroutine where it starts: one that never starts would warn
    node.run_worker(worker, group=group, exclusive=exclusive)
