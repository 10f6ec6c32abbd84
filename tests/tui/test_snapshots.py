"""The main screens, in two sizes and two themes, against what they looked like when somebody looked at them.

After a change that is meant: ``python -m pytest tests/tui/test_snapshots.py --snapshot-update``, and look at the
pictures that changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from helpers.fake_backend import Answer, FakeBackend, FakeHost, kept_pyramid
from helpers.screens import settled, shows, shows_behind, until
from ziggurat.tui.app import ChatApp
from ziggurat.tui.backend import ModelSetup, Timings, Usage
from ziggurat.tui.conversation import Conversation, Message
from ziggurat.tui.parts import ChatParts
from ziggurat.tui.session import Session
from ziggurat.tui.settings import Settings
from ziggurat.tui.store import Store

SIZES = {"80x24": (80, 24), "200x60": (200, 60)}
THEMES = ("ziggurat-dusk", "ziggurat-noon")
HOUR, DAY = 3600.0, 86400.0

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


async def chat(pilot: Pilot[Any]) -> None:
    """Say something and have it answered."""
    app = pilot.app
    assert isinstance(app, ChatApp)
    session = app.chat.session
    await until(pilot, lambda: session.backend is not None and app.chat.prompt.area.has_focus)
    app.chat.prompt.area.insert("How are rows shared out?")
    await pilot.press("enter")
    await until(pilot, lambda: len(session.conversation.messages) == 2 and not session.busy)
    await shows(pilot, "return most - layer * step", "100 tokens · 42.0 tok/s", "○ ready", "ctx 400/4096", "fake")


async def kv_view(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    await pilot.press("f4")
    await shows(pilot, "rows held", "20/20", "layer 0, stretch 1", "w0 w1", "budget", "KV 32.00 MiB of 128.00 MiB")


async def models(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    await pilot.press("f3")
    await shows(pilot, "Search models", "small.gguf", "context 8192", "is not a GGUF file")


async def chats(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    await pilot.press("f2")
    await shows(pilot, "How are rows shared out?", "★ Pyramids of Ur", "2 h ago", "3 days ago · 1 message")


async def help_screen(pilot: Pilot[Any]) -> None:
    await chat(pilot)
    await pilot.press("f1")
    await shows(pilot, "Keys and commands", "Ctrl+J", "/help")


SCREENS: dict[str, Callable[[Pilot[Any]], Awaitable[None]]] = {
    "chat": chat,
    "kv": kv_view,
    "models": models,
    "chats": chats,
    "help": help_screen,
}


def earlier_chats(now: float) -> Store:
    times = [now]
    store = Store(None, now=lambda: times[-1])
    for title, age in (("Pyramids of Ur", 3 * DAY), ("A recipe for barley bread", 2 * HOUR)):
        times.append(now - age)
        conversation = Conversation(title=title)
        store.begin(conversation)
        store.add(conversation.id, Message(title, None, "user", title, times[-1]))
        store.pin(conversation.id, title.startswith("Pyramids"))
    times.append(now)
    return store


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("screen", SCREENS)
def test_the_screens_look_as_they_did(snap_compare: Any, screen: str, size: str, theme: str) -> None:
    now = 1_700_000_000.0
    answer = Answer(
        [ANSWER], usage=Usage(300, 100), timings=Timings(0.25, 900.0, 42.0, kv_bytes=32 << 20, kv_bytes_full=128 << 20)
    )
    host = FakeHost(make=lambda _: FakeBackend([answer], kept=kept_pyramid()))
    failed: list[BaseException] = []

    async def show(pilot: Pilot[Any]) -> None:
        try:
            await SCREENS[screen](pilot)
            if screen not in ("chat", "kv") and size == "200x60":
                await shows_behind(pilot, "return most - layer * step", "100 tokens · 42.0 tok/s", "○ ready")
            await settled(pilot)
        except BaseException as error:
            failed.append(error)
            raise

    with earlier_chats(now) as store:
        session = Session(None, retries=(), recorder=store, clock=lambda: 0.0, now=lambda: now)
        setup = ModelSetup(Path("/models/small.gguf"), kv_budget="100")
        app = ChatApp(ChatParts(session, host=host, setup=setup, store=store, settings=Settings(theme=theme)))
        try:
            same = snap_compare(app, terminal_size=SIZES[size], run_before=show)
        except AssertionError as error:
            raise failed[0] if failed else error from None
    assert same


@pytest.mark.asyncio
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
