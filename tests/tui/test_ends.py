"""A chat in a terminal that is told to end, or whose terminal is closed: it keeps what Ctrl+Q keeps."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CHAT = """
import asyncio, pathlib, sys
from helpers.fake_backend import Answer, FakeBackend
from ziggurat.tui.app import ChatApp
from ziggurat.tui.parts import ChatParts
from ziggurat.tui.session import Session
from ziggurat.tui.store import Store

class Backend(FakeBackend):
    async def save(self, conversation):
        await asyncio.sleep(0.5)  # longer than a terminal that is gone takes to be noticed
        pathlib.Path(sys.argv[1], "rows").write_text(conversation)
        return True

store = Store(pathlib.Path(sys.argv[1], "chats.db"))
backend = Backend([Answer(["half ", "an ", "answer"], hold=asyncio.Event())])
app = ChatApp(ChatParts(Session(backend, recorder=store), store=store))
app.run()
sys.exit(app.return_code)
"""


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        self.master, inner = pty.openpty()
        tests = Path(__file__).parents[1]
        code = f"import sys; sys.path.insert(0, {str(tests)!r})\n{CHAT}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        )
        os.close(inner)
        self.seen = b""

    def wait_for(self, text: bytes, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end and self.process.poll() is None, self.seen[-2000:]
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)


def close(terminal: Terminal) -> None:
    os.close(terminal.master)


def terminate(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGTERM)


def hang_up(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGHUP)
    os.close(terminal.master)


@pytest.mark.parametrize(("end", "code"), [(terminate, 143), (hang_up, 129), (close, 129)])
def test_what_was_said_is_kept(tmp_path: Path, end: Callable[[Terminal], None], code: int) -> None:
    from ziggurat.tui.store import Store

    terminal = Terminal(tmp_path)
    try:
        terminal.wait_for(b"ready")
        terminal.type(b"a question\r")
        terminal.wait_for(b"answering")
        terminal.wait_for(b"half an answer")
        end(terminal)
        assert terminal.process.wait(30) == code
    finally:
        terminal.process.kill()
        terminal.process.wait()
    with Store(tmp_path / "chats.db") as store:
        said = store.open(store.list()[0].id)
        assert [(each.text, each.ending) for each in said.path()] == [
            ("a question", "stop"),
            ("half an answer", "cancelled"),
        ]
        assert (tmp_path / "rows").read_text() == said.id
