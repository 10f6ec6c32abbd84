"""What is on a screen of an app under test, as text."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

from textual.app import App
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets import Input, TextArea


def screen_text(app: App[Any], screen: Screen[Any] | None = None) -> str:
    """Return the lines of a screen, by default the uppermost one, without the spaces at their ends."""
    return "\n".join(strip.text.rstrip() for strip in (screen or app.screen)._compositor.render_strips())


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


async def shows_behind(pilot: Pilot[Any], *texts: str) -> None:
    """Wait until all texts are on the screen that is under the uppermost one, as far as that lets it be seen."""

    def painted() -> bool:
        below = screen_text(pilot.app, pilot.app.screen_stack[-2])
        return all(text in below for text in texts)

    await until(pilot, painted)


async def settled(pilot: Pilot[Any]) -> None:
    """Stop cursors from blinking, and wait until the picture is the same three times, with pauses between."""
    for screen in pilot.app.screen_stack:
        for field in (*screen.query(TextArea), *screen.query(Input)):
            field.cursor_blink = False
    end = asyncio.get_running_loop().time() + 20
    pictures = ["", "-", "."]
    while len(set(pictures[-3:])) > 1:
        assert asyncio.get_running_loop().time() < end, f"the screen goes on changing:\n{screen_text(pilot.app)}"
        await pilot.pause(0.1)
        # without the number that each picture has
        pictures.append(re.sub(r"terminal-\d+-", "", pilot.app.export_screenshot(simplify=True)))
