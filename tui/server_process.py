"""A server process of this chat's own: its command line, its life, and what its log says when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ziggurat.tui.api import Address
from ziggurat.tui.backend import BackendError, ModelSetup

#: What starts the server: ``serve`` and its options follow.
COMMAND = (sys.executable, "-m", "ziggurat.tui.child")
_END_S = 3.0
_KILL_S = 3.0
_MAX_LOG = 1024 * 1024
# what the kernel takes for a socket's path, less than everywhere that is known
_MAX_SOCKET_PATH = 100
_ERROR = "ziggurat: error: "
# variables that are options of serve: those of this chat's server are on its command line
_OPTIONS = "ZIGGURAT_"
_KEY = "ZIGGURAT_API_KEY"


class ServerProcess:
    """One server process. ``address`` and ``api_key`` are how to talk to it once it is ready."""

    def __init__(
        self, address: Address, api_key: str, process: subprocess.Popen[bytes], log: Path, log_start: int
    ) -> None:
        self.address, self.api_key = address, api_key
        self._process, self._log, self._log_start = process, log, log_start
        self._folder: Path | None = None
        self._ending = False

    @classmethod
    def start(
        cls, setup: ModelSetup, log: Path, *, command: Sequence[str] = COMMAND, kv_folder: Path | None = None
    ) -> ServerProcess:
        """Start a server for a model, with what it says appended to ``log``. Raises BackendError.

        ``kv_folder`` is where conversations' rows can be kept.
        """
        key = secrets.token_urlsafe(32)
        folder, listen, address = _listening()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OPTIONS)}
        environment |= {_KEY: key, "PYTHONUNBUFFERED": "1"}
        if kv_folder is not None:
            listen += ["--kv-folder", str(kv_folder)]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            if log.exists() and log.stat().st_size > _MAX_LOG:
                log.replace(log.with_suffix(".old"))
            with open(log, "ab") as file:
                start = file.tell()
                process = subprocess.Popen(
                    [*command, *arguments(setup), *listen],
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=file,
                    env=environment,
                    start_new_session=True,  # Ctrl-C and a closed terminal are the chat's to answer
                )
        except OSError as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise BackendError(f"the server cannot be started ({error.strerror or error})", str(log)) from None
        server = cls(address, key, process, log, start)
        server._folder = folder
        return server

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def death(self) -> BackendError:
        """Say why it does not run any more: its own last error, or how it ended."""
        told = self._last_error()
        if told is not None:
            return BackendError(told, kind="refused")
        code = self._process.poll()
        how = f"status {code}"
        if code is not None and code < 0:
            how = "killed, perhaps for want of memory" if -code == signal.SIGKILL else signal.strsignal(-code) or how
        return BackendError(f"the engine's process has ended ({how})", f"see {self._log}", kind="lost", retryable=True)

    async def end(self) -> None:
        """End the process: politely, then not; and wait for it. Idempotent."""
        process = self._process
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        with contextlib.suppress(OSError):
            process.terminate()
        if not await self._ended(_END_S):
            with contextlib.suppress(OSError):
                process.kill()
            await self._ended(_KILL_S)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _ended(self, seconds: float) -> bool:
        for _ in range(round(seconds / 0.02)):
            if not self.alive:
                return True
            await asyncio.sleep(0.02)
        return not self.alive

    def _last_error(self) -> str | None:
        try:
            with open(self._log, "rb") as file:
                file.seek(self._log_start)
                lines = file.read(_MAX_LOG).decode("utf-8", errors="replace").splitlines()
        except OSError:
            return None
        return next((line.removeprefix(_ERROR) for line in reversed(lines) if line.startswith(_ERROR)), None)


def arguments(setup: ModelSetup) -> list[str]:
    """Return ``serve`` with its options for a model."""
    options = {
        "--ctx": setup.ctx,
        "--kv-budget": setup.kv_budget,
        "--kv-policy": setup.kv_policy,
        "--cache-type-k": setup.cache_type_k,
        "--cache-type-v": setup.cache_type_v,
        "--gpu-layers": setup.gpu_layers,
        "--threads": setup.threads,
    }
    given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    # an absolute path cannot be taken for an option
    return ["serve", str(setup.path.absolute()), "--parallel", "1", "--grace", "0.5", *given, *setup.extra]


def _listening() -> tuple[Path | None, list[str], Address]:
    """Choose where the server listens: a Unix socket in a folder of its own if possible, else a free port."""
    if hasattr(socket, "AF_UNIX") and sys.platform != "win32":
        folder = Path(tempfile.mkdtemp(prefix="ziggurat-"))  # for the owner only
        path = folder / "chat.sock"
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
            return folder, ["--unix-socket", str(path)], Address.parse(f"http+unix://{path}")
        shutil.rmtree(folder, ignore_errors=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return None, ["--host", "127.0.0.1", "--port", str(port)], Address.parse(f"http://127.0.0.1:{port}")
