"""A server of a process of its own, with a scripted engine: ``python fake_server.py '{"delay": 0.1, ...}'``.

It says its URL on stdout. The prompt ``3x5`` is answered with three pieces of five characters and a space, ``3`` with
three of one, ``delay`` seconds between them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def fake_server(**settings: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run one, and give the process and its URL. Settings: ``delay``, ``loading`` (seconds) and the server's own."""
    command = [sys.executable, str(Path(__file__)), json.dumps({"port": 0, **settings})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            yield process, url
        finally:
            process.kill()


def pieces(request: Any) -> list[str]:
    count, _, size = request.prompt.partition("x")
    return ["x" * int(size or 1) + " "] * int(count)


def main() -> int:
    from helpers.fake_engine import FakeEngine
    from ziggurat.runtime.server.app import create_app
    from ziggurat.runtime.server.lifecycle import serve
    from ziggurat.runtime.server.logs import log_to_stderr
    from ziggurat.runtime.server.settings import ServerSettings

    given = json.loads(sys.argv[1])
    delay, loading = given.pop("delay", 0.0), given.pop("loading", 0.0)
    engine = FakeEngine(pieces, delay=delay)
    settings = ServerSettings(**given)
    log_to_stderr()

    def make(phase: Any, url: str) -> Any:
        print(url, flush=True)
        time.sleep(loading)
        return create_app(engine, settings, phase)

    return serve(make, settings.listen(), grace=settings.grace, limits=settings.connection_limits())


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    sys.exit(main())
