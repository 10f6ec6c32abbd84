"""How smoothly the chat shows an answer that comes fast: frames, CPU share, and how long a key takes to the screen.

    python tests/benchmarks/chat_frames.py [--seconds 4] [--json chat_frames.json] [--methods ziggurat] [--sizes 0,…]

A source writes text at 50 to 1000 tokens/s (four characters each): mixed Markdown, one long code block or one long
list, into conversations of 0, 20 000 and 100 000 characters, on a screen of 120x40. A frame is an update of the
screen, as escape sequences that are thrown away. Ten times a second a character is typed, and the time is taken until
the prompt that holds it was drawn. ``waited_share`` is the part of the time in which the process could have run and the
system let others run (Linux); a cell with more than --most-waited of it is measured again, up to --tries times.
--methods ziggurat,markdown_stream,markdown_update measures Textual's ``MarkdownStream``, and its ``Markdown.update``
for each token, as well. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

from drawing import Drawing
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Markdown, TextArea

from ziggurat.tui.collector import spare_the_screen
from ziggurat.tui.widgets.message import Shown
from ziggurat.tui.widgets.transcript import Transcript

CHARACTERS_A_TOKEN = 4
KEYS_A_SECOND = 10
RATES, SIZES, KINDS = (50, 200, 500, 1000), (0, 20_000, 100_000), ("mixed", "code", "list")
METHODS = ("ziggurat", "markdown_stream", "markdown_update")

MIXED = """## Step {n}

The *observation window* of layer {n} decides **which rows** stay; see `select_rows` and [the paper](https://example.org/{n}).
It is read once, after the prompt, and costs little beside the prompt itself.

1. Score the rows with the last 32 queries.
2. Pool the scores, so that neighbours stay together.
3. Keep the best, the sinks and the window.

| layer | rows | bytes |
| ---: | ---: | ---: |
| {n} | 512 | 1048576 |
| 31 | 64 | 131072 |

```python
def rows(layer: int, budget: int = {n}) -> list[int]:
    # the steps of the pyramid
    return [max(4, budget - step) for step in range(layer)]
```

> Every storey is smaller than the one below.

"""


def text(kind: str) -> Callable[[int], str]:
    """Return what gives the n-th piece of an endless answer."""
    if kind == "mixed":
        return lambda n: MIXED.format(n=n)
    if kind == "code":
        return lambda n: (
            ("```python\n" if n == 0 else "") + f"    total_{n} = compute({n}, 'rows', budget={n % 512})  # {n}\n"
        )
    return lambda n: f"- item **{n}** of the list, with `code` and some words to wrap around\n"


def tokens(kind: str, number: int) -> list[str]:
    """Return so many tokens of an answer."""
    piece, parts, size = text(kind), [], 0
    for n in count():
        parts.append(piece(n))
        size += len(parts[-1])
        if size >= number * CHARACTERS_A_TOKEN:
            break
    whole = "".join(parts)
    return [whole[i * CHARACTERS_A_TOKEN : (i + 1) * CHARACTERS_A_TOKEN] for i in range(number)]


def conversation(characters: int) -> list[Shown]:
    """Return messages of so many characters in all."""
    messages: list[Shown] = []
    size = 0
    while size < characters:
        answer = "".join(MIXED.format(n=len(messages) + n) for n in range(3))
        for role, said in (("user", "Tell me how the rows are chosen."), ("assistant", answer)):
            messages.append(Shown(str(len(messages)), role, said))
            size += len(said)
    return messages


class Bench(Drawing):
    """The transcript, or a Markdown widget of Textual, over an input."""

    CSS = "TextArea { height: 3; } Markdown { height: auto; }"

    def __init__(self, method: str, history: list[Shown]) -> None:
        super().__init__()
        self.method = method
        self.history = history
        self.latencies: list[float] = []
        self.waiting: dict[int, float] = {}

    def compose(self) -> ComposeResult:
        """Compose the screen."""
        if self.method == "ziggurat":
            yield Transcript()
        else:
            with VerticalScroll():
                for shown in self.history:
                    yield Markdown(shown.text)
                yield Markdown(id="answer")
        yield TextArea()

    async def on_mount(self) -> None:
        """Show the conversation."""
        if self.method == "ziggurat":
            self.query_one(Transcript).show(self.history)
        else:
            self.query_one(VerticalScroll).anchor()
        self.query_one(TextArea).focus()

    def _display(self, screen: Any, renderable: Any) -> None:
        super()._display(screen, renderable)
        if self.waiting:
            now = time.perf_counter()
            typed = len(self.query_one(TextArea).text)
            for length in [length for length in self.waiting if length <= typed]:
                self.latencies.append(now - self.waiting.pop(length))


def waited() -> float:
    """Return for how many seconds this process has waited for a processor (the second figure of schedstat)."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


async def source(
    rate: float, parts: list[str], write: Callable[[str], Awaitable[None]], give_up_after: float
) -> float | None:
    """Write tokens at a rate, each at its time or as soon as the one before was taken.

    Return how late the last is, None for one that would be too late.
    """
    start = time.perf_counter()
    for number, part in enumerate(parts):
        if time.perf_counter() - start > give_up_after:
            return None
        wait = start + number / rate - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        await write(part)
    return time.perf_counter() - start - (len(parts) - 1) / rate


async def type_keys(app: Bench, seconds: float) -> None:
    """Press keys, regularly."""
    from textual import events

    length = 0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        await asyncio.sleep(1 / KEYS_A_SECOND)
        length += 1
        app.waiting[length] = time.perf_counter()
        key = events.Key("x", "x")
        key.set_sender(app)
        app.post_message(key)


async def measure(method: str, rate: int, kind: str, size: int, seconds: float) -> dict[str, Any]:
    """Stream for some seconds and return the figures."""
    app = Bench(method, conversation(size))
    parts = tokens(kind, int(rate * seconds))
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause(0.5)
        write, finish = await writer(app)
        app.frames.clear()
        cpu, start, before_waited = time.process_time(), time.perf_counter(), waited()
        keys = asyncio.create_task(type_keys(app, seconds))
        late = await source(rate, parts, write, seconds * 2)
        elapsed = time.perf_counter() - start
        cpu = time.process_time() - cpu
        frames, waited_seconds = len(app.frames), waited() - before_waited
        await keys
        before = time.perf_counter()
        shown = await finish()
        finished = time.perf_counter() - before
        await pilot.pause(0.2)
        assert late is None or shown == "".join(parts), "text was dropped"
    keys_seen = sorted(app.latencies)
    return {
        "method": method,
        "tokens_per_second": rate,
        "kind": kind,
        "conversation_characters": size,
        "frames_per_second": round(frames / elapsed, 1),
        "cpu_share": round(cpu / elapsed, 3),
        "waited_share": round(waited_seconds / elapsed, 3),
        "key_to_screen_p50_ms": round(1000 * keys_seen[len(keys_seen) // 2], 1) if keys_seen else None,
        "key_to_screen_p95_ms": round(1000 * keys_seen[int(0.95 * (len(keys_seen) - 1))], 1) if keys_seen else None,
        "source_late_s": None if late is None else round(late, 2),
        "finish_ms": round(1000 * finished, 1),
    }


async def writer(app: Bench) -> tuple[Callable[[str], Awaitable[None]], Callable[[], Awaitable[str]]]:
    """Return how a method takes a token, and how it ends and tells its text."""
    if app.method == "ziggurat":
        view = app.query_one(Transcript).add(Shown("answer", "assistant"), growing=True)

        async def append(part: str) -> None:
            view.append(part)

        async def end() -> str:
            view.finish()
            return view.body.text

        return append, end
    markdown = app.query_one("#answer", Markdown)
    if app.method == "markdown_stream":
        stream = Markdown.get_stream(markdown)

        async def stop() -> str:
            await stream.stop()
            return markdown.source

        return stream.write, stop
    whole: list[str] = []

    async def update(part: str) -> None:
        whole.append(part)
        await markdown.update("".join(whole))

    async def nothing() -> str:
        return "".join(whole)

    return update, nothing


async def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="tokens per second")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="characters of conversations")
    parser.add_argument("--methods", default="ziggurat")
    parser.add_argument("--most-waited", type=float, default=0.03)
    parser.add_argument("--tries", type=int, default=1)
    arguments = parser.parse_args()
    spare_the_screen()  # as the chat does
    results = []
    for method in arguments.methods.split(","):
        for size in map(int, arguments.sizes.split(",")):
            for kind in KINDS:
                for rate in map(int, arguments.rates.split(",")):
                    for _ in range(arguments.tries):
                        result = await measure(method, rate, kind, size, arguments.seconds)
                        if result["waited_share"] <= arguments.most_waited:
                            break
                    results.append(result)
                    print(json.dumps(result), flush=True)
    ours = [result for result in results if result["method"] == "ziggurat"]
    summary = {
        "load_average": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "worst_key_to_screen_p95_ms": max((r["key_to_screen_p95_ms"] for r in ours), default=None),
        "fewest_frames_per_second": min((r["frames_per_second"] for r in ours), default=None),
        "most_cpu_share": max((r["cpu_share"] for r in ours), default=None),
    }
    if arguments.json:
        lines = ",\n".join(json.dumps(result) for result in results)
        arguments.json.write_text(f'{json.dumps(summary)[:-1]}, "results": [\n{lines}\n]}}\n')
    print(json.dumps(summary))


if __name__ == "__main__":
    asyncio.run(main())
