"""Pictures of the chat over a real model: an answer about a long document, and the KV view beside it, as SVG.

The document is ordinary text with six facts ("The code of Lily's red box is 4821."), attached to a question about one
of them, as /file does. The model runs in a server process of the chat's own, with a budget.

usage: convert tests/reference_model ref.gguf --type f16
       python tests/benchmarks/chat_pictures.py ref.gguf [--kv-budget 512] [--tokens 3000] [--folder tests/benchmarks]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from ziggurat.runtime.evaluate.filler import TEXT
from ziggurat.tui.app import ChatApp
from ziggurat.tui.backend import ModelSetup
from ziggurat.tui.conversation import Attachment
from ziggurat.tui.local import LocalHost
from ziggurat.tui.parts import ChatParts
from ziggurat.tui.screens.chat import ChatScreen
from ziggurat.tui.session import Session
from ziggurat.tui.settings import Settings

NAMES, COLOURS = ("Lily", "Tom", "Anna", "Ben", "Mia", "Sam"), ("red", "blue", "green", "white", "black", "yellow")
THINGS = ("box", "door", "bag", "house", "garden", "boat")
CHARACTERS_PER_TOKEN = 4  # a first guess
PATIENCE_S = 600.0


def document(characters: int, rng: random.Random) -> tuple[str, str, str]:
    """Return a text with the facts at even distances, the question about the third of them, and its answer."""
    codes = rng.sample(range(1000, 10000), len(NAMES))
    facts = list(zip(NAMES, COLOURS, THINGS, codes, strict=True))
    text = (TEXT * (characters // len(TEXT) + 1))[:characters]
    sentences = text.split(". ")
    step = len(sentences) // len(facts)
    for place, (name, colour, thing, code) in reversed(list(enumerate(facts))):
        sentences.insert(place * step + step // 2, f"The code of {name}'s {colour} {thing} is {code}")
    name, colour, thing, code = facts[2]
    return ". ".join(sentences), f"What is the code of {name}'s {colour} {thing}?", str(code)


async def until(pilot: Pilot[Any], holds: Any) -> None:
    """Wait until something holds."""
    end = asyncio.get_running_loop().time() + PATIENCE_S
    while not holds():
        if asyncio.get_running_loop().time() > end:
            raise TimeoutError(str(pilot.app.screen))
        await pilot.pause(0.05)


async def say(pilot: Pilot[Any], chat: ChatScreen, text: str) -> str:
    """Say something, and return the answer."""
    before = len(chat.session.conversation.messages)
    chat.prompt.area.insert(text)
    await pilot.press("enter")
    await until(pilot, lambda: len(chat.session.conversation.messages) == before + 2 and not chat.session.busy)
    chat.prompt.area.cursor_blink = False
    await pilot.pause(1.0)
    return chat.session.conversation.path()[-1].text


async def choose(pilot: Pilot[Any], chat: ChatScreen, words: str) -> None:
    """Go to the stretch that has these words, in the second layer."""
    view, backend = chat.kv_panel.view, chat.session.backend
    assert backend is not None
    await until(pilot, lambda: view.map.kept is not None)
    kept, columns = view.map.kept, view.map.columns
    assert kept is not None
    texts = [await backend.text(kept.stretch(column, columns)) or "" for column in range(columns)]
    view.map.focus()
    column = next((column for column, text in enumerate(texts) if words in text), 0)
    await pilot.press("down", *["right"] * column)
    await pilot.pause(1.0)


async def ask(pilot: Pilot[Any], chat: ChatScreen, tokens: int) -> str:
    """Attach a document of so many tokens, ask about it, and return what the answer should have."""
    session = chat.session
    await until(pilot, lambda: session.backend is not None)
    assert session.backend is not None
    size = tokens * CHARACTERS_PER_TOKEN
    for _ in range(3):  # the guess gets better
        text, question, code = document(size, random.Random(7))
        count = await session.backend.count(text)
        assert count is not None
        size = size * tokens // count
    chat.set_attachments([Attachment("notebook.txt", text, count)])
    answer = await say(pilot, chat, question)
    print(f"{count} tokens, {question!r}: {answer!r} ({'right' if code in answer else 'wrong'})")
    return code


async def take(options: argparse.Namespace) -> None:
    """Take both pictures."""
    with tempfile.TemporaryDirectory() as folder:
        host = LocalHost([], Path(folder) / "chat.log")
        setup = ModelSetup(options.model, kv_budget=options.kv_budget, threads=options.threads)
        settings = Settings(theme=options.theme, temperature=0.0)
        app = ChatApp(ChatParts(Session(sampling=settings.sampling()), host=host, settings=settings, setup=setup))
        try:
            async with app.run_test(size=(options.columns, options.rows)) as pilot:
                code = await ask(pilot, app.chat, options.tokens)
                await pilot.press("f4")
                await choose(pilot, app.chat, code)
                app.save_screenshot("chat_kv.svg", str(options.folder))
                await pilot.press("f4")
                await say(pilot, app.chat, "Tell me a story about a boat.")
                app.save_screenshot("chat.svg", str(options.folder))
        finally:
            await host.close()


def main() -> None:
    """Read the arguments and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kv-budget", default="512")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--columns", type=int, default=120)
    parser.add_argument("--rows", type=int, default=27)
    parser.add_argument("--theme", default="ziggurat-dusk")
    parser.add_argument("--folder", type=Path, default=Path("tests/benchmarks"))
    asyncio.run(take(parser.parse_args()))


if __name__ == "__main__":
    main()
