"""What is on a screen of an app under test, as text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from textual.app import App
from textual.pilot import Pilot


def screen_text(app: App[Any]) -> str:
    """Return the screen's lines without the spaces at their ends."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())


async def until(pilot: Pilot[Any], holds: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until something holds; AssertionError with the screen's text if it never does."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not holds():
        assert loop.time() < end, screen_text(pilot.app)
        await pilot.pause(0.01)


async def shows(pilot: Pilot[Any], *texts: str) -> None:
    """Wait until all texts are on the screen."""
    await until(pilot, lambda: all(text in screen_text(pilot.app) for text in texts))
