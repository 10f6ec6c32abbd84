"""The servers that are measured against each other, each as a process that is started and ended."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
EOS = 2  # of the random model, whose tokenizer is SentencePiece


class PeerFailed(Exception):
    """A server did not start, or gave a wrong answer."""


@dataclass(frozen=True)
class Load:
    """What all servers are started for: the same model, threads and context for each conversation."""

    model: Path
    parallel: int
    n_ctx: int
    threads: int


@dataclass(frozen=True)
class Peer:
    """A kind of server. ``command`` is told load, port and a folder; ``fields`` make requests of it run to the end."""

    name: str
    command: Callable[[Load, int, Path], list[object]]
    path: str
    fields: dict[str, Any]


class Running:
    """A peer that answers; ends with the block."""

    def __init__(self, peer: Peer, load: Load) -> None:
        self.peer = peer
        self._work = tempfile.TemporaryDirectory()
        folder = Path(self._work.name)
        self._log = folder / "log"
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port: int = free.getsockname()[1]
        command = [str(word) for word in peer.command(load, self.port, folder)]
        with self._log.open("wb") as log:
            try:
                self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            except OSError as error:
                raise PeerFailed(f"{peer.name}: {error}") from None
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + 180
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://{HOST}:{self.port}{self.peer.path}", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise PeerFailed(f"{self.peer.name} does not start: {self.log()}")

    def log(self) -> str:
        """Return the last it wrote."""
        return self._log.read_text(errors="replace")[-600:]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self._work.cleanup()


def ziggurat(name: str, *options: object) -> Peer:
    """This project's server, with further flags."""

    def command(load: Load, port: int, _folder: Path) -> list[object]:
        words = [sys.executable, "-m", "ziggurat.runtime", "serve", load.model, "--port", port]
        return [*words, "--parallel", load.parallel, "--ctx", load.n_ctx, "--threads", load.threads, *options]

    return Peer(name, command, "/health", {"ignore_eos": True, "stream_options": {"include_usage": True}})


def llama_server(binary: Path, name: str, *options: object) -> Peer:
    """llama.cpp's; its context is that of all slots together. Its web UI and its cache of old prompts are off."""

    def command(load: Load, port: int, _folder: Path) -> list[object]:
        return [
            binary, "-m", load.model, "--host", HOST, "--port", port, "-np", load.parallel,
            "-c", load.n_ctx * load.parallel, "-t", load.threads, "-tb", load.threads, "-fa", "on",
            "--no-webui", "-cram", 0, *options,
        ]  # fmt: skip

    return Peer(name, command, "/health", {"ignore_eos": True, "stream_options": {"include_usage": True}})


def llama_cpp_server(python: Path) -> Peer:
    """llama-cpp-python's, which answers one request at a time."""

    def command(load: Load, port: int, _folder: Path) -> list[object]:
        return [
            python, "-m", "llama_cpp.server", "--model", load.model, "--host", HOST, "--port", port, "--n_ctx",
            load.n_ctx, "--n_threads", load.threads, "--n_threads_batch", load.threads, "--flash_attn", True,
            "--n_batch", 512, "--logits_all", False, "--interrupt_requests", False, "--verbose", False,
        ]  # fmt: skip

    return Peer("llama_cpp.server", command, "/v1/models", {"logit_bias": {str(EOS): -100}})


def example_server(python: Path, script: Path, name: str, unified: bool) -> Peer:
    """The example of llama-cpp-python's source archive; its context is that of all sequences together."""

    def command(load: Load, port: int, folder: Path) -> list[object]:
        model = {
            "path": str(load.model), "alias": "model", "n_ctx": load.n_ctx * load.parallel, "n_seq_max": load.parallel,
            "n_batch": 2048, "n_ubatch": 512, "threads": load.threads, "threads_batch": load.threads,
            "kv_unified": unified, "flash_attn": True, "store_logits": False,
        }  # fmt: skip
        config = folder / "config.json"
        config.write_text(json.dumps({"server": {"host": HOST, "port": port}, "model": model}))
        return [python, script, "-C", config]

    return Peer(name, command, "/v1/models", {"logit_bias": {str(EOS): -100}})
