"""A server over a model in a process of its own, for the scripts that measure and attack it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import tiny_models


def tiny_chat_model(folder: Path) -> Path:
    """Write the tests' ChatML model with random weights."""
    shape = tiny_models.Shape(head_dim=32, n_head=2, n_head_kv=1)
    return tiny_models.write_model(
        folder / "tiny.gguf", shape, tiny_models.bpe_tokens(), chat_template=tiny_models.CHATML
    )


class ServerProcess:
    """``ziggurat serve`` on a free port of this machine; ``options`` are its flags. Kept until the block ends."""

    def __init__(self, model: Path, *options: object, port: int = 0) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        command = [sys.executable, "-m", "ziggurat.runtime", "serve", model, "--port", port, *options]
        self.process = subprocess.Popen([str(word) for word in command], stderr=self._log)
        self.url = self._wait()
        port_text = self.url.rsplit(":", 1)[1]
        self.port = int(port_text) if port_text.isdigit() else 0
        self._watched = psutil.Process(self.process.pid)

    def _wait(self) -> str:
        for _ in range(1200):
            found = re.search(r"at (http\S+)/v1$", self.log(), re.MULTILINE)
            if found is not None:
                return found[1]
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended: {self.log()[-800:]}")
            time.sleep(0.05)
        raise SystemExit("the server did not begin within a minute")

    def log(self) -> str:
        """Return what it wrote."""
        return Path(self._log.name).read_text(errors="replace")

    def metrics(self) -> dict[str, float]:
        """Return its metrics by name and labels."""
        text = httpx.get(f"{self.url}/metrics").text
        return {
            line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if not line.startswith("#")
        }

    @property
    def rss(self) -> int:
        """Resident memory, in bytes."""
        return int(self._watched.memory_info().rss)

    @property
    def open_files(self) -> int:
        """Descriptors, sockets included."""
        return int(self._watched.num_fds())

    def settled(self, seconds: float = 10.0) -> dict[str, Any]:
        """Wait until nothing runs, and return what is left then: all zero but for the request that asks."""
        until = time.monotonic() + seconds
        while True:
            now = self.metrics()
            left = {
                "running": now["ziggurat_generations_running"],
                "queued": now["ziggurat_generations_queued"],
                "busy_slots": now['ziggurat_slots{state="reading"}'] + now['ziggurat_slots{state="decoding"}'],
                "http": now["ziggurat_http_requests_in_flight"] - 1,
            }
            if not any(left.values()) or time.monotonic() > until:
                return left
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()
