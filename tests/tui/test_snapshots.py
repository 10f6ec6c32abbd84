"""The main screens, in two sizes and two themes, against what they looked like when somebody looked at them.

A snapshot is the screen's text, and the colours on it with the number of cells that have them. After a change that is
meant: ``ZIGGURAT_SNAPSHOTS=write python -m pytest tests/tui/test_snapshots.py``, and look at the difference.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from textual.app import App

from helpers.fake_backend import Answer, FakeBackend, FakeHost, kept_pyramid
from helpers.screens import screen_text, shows, until
from ziggurat.tui.app import ChatApp
from ziggurat.tui.backend import ModelSetup, Timings, Usage
from ziggurat.tui.parts import ChatParts
from ziggurat.tui.session import Session
from ziggurat.tui.settings import Settings

pytestmark = pytest.mark.asyncio

SNAPSHOTS = Path(__file__).parent / "snapshots"
SIZES = {"80x24": (80, 24), "200x60": (200, 60)}
THEMES = ("ziggurat-dusk", "ziggurat-noon")

ANSWER = """## Storeys

A budget falls **linearly** from the first layer to the last:

1. the first sees everything,
2. the last keeps `1/20` of it.

| layer | rows |
| ----: | ---: |
| 0 | 512 |
| 31 | 26 |

```python
def rows(layer: int) -> int:
    return most - layer * step
```
"""


def looks(app: App[Any]) -> str:
    """Return the screen's text and its colours."""
    colours: Counter[str] = Counter()
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            style = segment.style
            if style is not None:
                front = style.color.name if style.color is not None else "-"
                back = style.bgcolor.name if style.bgcolor is not None else "-"
                colours[f"{front} on {back}"] += len(segment.text)
    table = "\n".join(f"{count:6} {colour}" for colour, count in sorted(colours.items()))
    return f"{screen_text(app)}\n\n{table}\n"


def check(app: App[Any], name: str) -> None:
    path = SNAPSHOTS / f"{name}.txt"
    seen = looks(app)
    if os.environ.get("ZIGGURAT_SNAPSHOTS") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(seen, encoding="utf-8")
    assert seen == path.read_text(encoding="utf-8"), f"{path} differs"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("size", SIZES)
async def test_the_screens_look_as_they_did(size: str, theme: str) -> None:
    answer = Answer(
        [ANSWER], usage=Usage(300, 100), timings=Timings(0.25, 900.0, 42.0, kv_bytes=32 << 20, kv_bytes_full=128 << 20)
    )
    backend = FakeBackend([answer], kept=kept_pyramid())
    session = Session(None, retries=())
    host = FakeHost(make=lambda _: backend)
    setup = ModelSetup(Path("/models/small.gguf"), kv_budget="100")
    app = ChatApp(ChatParts(session, host=host, setup=setup, settings=Settings(theme=theme)))
    async with app.run_test(size=SIZES[size]) as pilot:
        app.chat.prompt.area.cursor_blink = False
        await until(pilot, lambda: session.backend is not None)
        app.chat.prompt.area.insert("How are rows shared out?")
        await pilot.press("enter")
        await until(pilot, lambda: not session.busy)
        await shows(pilot, "100 tokens · 42.0 tok/s", "○ ready", "ctx 400/4096", "fake")
        session._figures._meter.start()  # the sparkline tells the time that the test took
        app.chat.figures.show()
        await pilot.pause(0.1)
        check(app, f"chat-{size}-{theme}")
        await pilot.press("f4")
        await shows(pilot, "rows held", "layer 0, stretch 1", "next prompt")
        app.chat.kv_panel.view.map.focus()
        await pilot.pause(0.1)
        check(app, f"kv-{size}-{theme}")
        await pilot.press("f4", "f3")
        await shows(pilot, "small.gguf", "is not a GGUF file")
        app.screen.chooser.field.cursor_blink = False  # type: ignore[attr-defined]
        await pilot.pause(0.1)
        check(app, f"models-{size}-{theme}")
        await pilot.press("escape", "f1")
        await shows(pilot, "Keys and commands")
        await pilot.pause(0.1)
        check(app, f"help-{size}-{theme}")


async def test_without_colour_everything_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    hold = asyncio.Event()
    backend = FakeBackend([Answer(["**said**"], hold=hold)])
    app = ChatApp(ChatParts(Session(backend, retries=())))
    async with app.run_test(size=(80, 24)) as pilot:
        assert app.no_color
        app.chat.prompt.area.insert("hi")
        await pilot.press("enter")
        await shows(pilot, "You", "hi", "**said**", "● answering")
        hold.set()
        await until(pilot, lambda: not app.chat.session.busy)
        await shows(pilot, "○ ready")
