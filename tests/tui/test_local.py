"""Servers in processes of their own: started, waited for, ended, started again, and never left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers import tiny_models
from ziggurat.tui import process_memory, server_process
from ziggurat.tui.backend import BackendError, ChatMessage, ChatRequest, Delta, Done, Loading, ModelSetup
from ziggurat.tui.local import LocalBackend, LocalHost

TESTS = Path(__file__).parents[1]
COMMAND = (sys.executable, str(TESTS / "helpers" / "fake_serve.py"))
ASK = ChatRequest((ChatMessage("user", "hi"),))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_models.write_model(tmp_path_factory.mktemp("model") / "tiny.gguf").read_bytes()


@pytest.fixture
def folder(tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("good", "slow", "broken", "crash", "stubborn"):
        (tmp_path / f"{name}.gguf").write_bytes(weights)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(server_process.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def host(folder: Path) -> LocalHost:
    return LocalHost([folder], folder / "logs" / "server.log", command=COMMAND)


def asked(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.asked").read_text())


def nothing(_loading: Loading) -> None:
    pass


async def answer(backend: LocalBackend) -> list[Any]:
    return [event async for event in backend.chat(ASK)]


def test_start_answer_and_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIGGURAT_HOST", "0.0.0.0")
    monkeypatch.setenv("ZIGGURAT_KV_BUDGET", "7")

    async def work() -> None:
        it, told = host(folder), []
        setup = ModelSetup(folder / "good.gguf", ctx=256, kv_budget="25%", extra=("--prompt-lookup",))
        backend = await it.load(setup, told.append)
        assert await answer(backend) == [Delta("hi"), Done("stop")]
        status = await backend.status()
        assert status.model == "good" and status.process_bytes > 2**20 and status.kv_bytes_full > 0
        assert told[0].message.startswith("planning") and told[-1] == Loading("ready", 1.0)
        pid = backend.pid
        await it.close()
        await it.close()
        assert pid is not None and not psutil.pid_exists(pid)

    run(work())
    started = asked(folder, "good")
    line = started["arguments"]
    assert line[:2] == ["serve", str(folder / "good.gguf")] and "--prompt-lookup" in line
    assert line[line.index("--kv-budget") + 1] == "25%" and line[line.index("--ctx") + 1] == "256"
    key = started["environment"]["ZIGGURAT_API_KEY"]
    assert len(key) > 30 and not any(key in part for part in line)
    assert not {"ZIGGURAT_HOST", "ZIGGURAT_KV_BUDGET"} & started["environment"].keys()
    assert list((folder / "tmp").iterdir()) == []


def test_loopback_where_the_path_of_a_socket_would_be_too_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "_MAX_SOCKET_PATH", 10)

    async def work() -> None:
        it = host(folder)
        backend = await it.load(ModelSetup(folder / "good.gguf"), nothing)
        assert (await answer(backend))[-1] == Done("stop")
        await it.close()

    run(work())
    assert "--port" in asked(folder, "good")["arguments"]


def test_refusal_of_the_server_is_told(folder: Path) -> None:
    async def work() -> None:
        with pytest.raises(BackendError, match="^the model is of no use: get another$"):
            await host(folder).load(ModelSetup(folder / "broken.gguf"), nothing)

    run(work())


def test_what_does_not_fit_is_not_started_and_leaves_what_runs(folder: Path) -> None:
    async def work() -> None:
        it = host(folder)
        backend = await it.load(ModelSetup(folder / "good.gguf"), nothing)
        with pytest.raises(BackendError, match="TiB"):
            await it.load(ModelSetup(folder / "slow.gguf", ctx=2_000_000_000), nothing)
        with pytest.raises(BackendError, match="no such file"):
            await it.load(ModelSetup(folder / "none.gguf"), nothing)
        with pytest.raises(BackendError, match="kv-budget"):
            await it.load(ModelSetup(folder / "good.gguf", kv_budget="many"), nothing)
        assert (await answer(backend))[-1] == Done("stop")
        await it.close()

    run(work())
    assert not (folder / "slow.asked").exists()


def test_loading_is_told_and_can_be_cancelled(folder: Path) -> None:
    async def work() -> None:
        it, told = host(folder), []
        loading = asyncio.ensure_future(it.load(ModelSetup(folder / "slow.gguf"), told.append))
        while not (folder / "slow.asked").exists() or told[-1] != Loading("reading its weights", 0.25):
            await asyncio.sleep(0.01)
        pid = asked(folder, "slow")["pid"]
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        assert not psutil.pid_exists(pid)
        (folder / "slow.go").touch()
        backend = await it.load(ModelSetup(folder / "slow.gguf"), told.append)
        assert (await answer(backend))[-1] == Done("stop")
        await it.close()

    run(work())


def test_another_model_ends_the_first(folder: Path) -> None:
    async def work() -> None:
        it = host(folder)
        first = await it.load(ModelSetup(folder / "good.gguf"), nothing)
        second = await it.load(ModelSetup(folder / "crash.gguf"), nothing)
        with pytest.raises(BackendError):
            await answer(first)
        assert first.pid is None and second.pid is not None
        await it.close()

    run(work())


def test_server_that_died_is_told_and_started_again(folder: Path) -> None:
    async def work() -> None:
        it = host(folder)
        backend = await it.load(ModelSetup(folder / "crash.gguf"), nothing)
        with pytest.raises(BackendError, match="killed.*see .*server.log") as raised:
            await answer(backend)
        assert raised.value.kind == "lost" and raised.value.retryable
        with pytest.raises(BackendError, match="killed"):
            await backend.status()
        assert not await backend.save("c") and await backend.kept("c") is None and backend.pid is None
        assert await answer(backend) == [Delta("hi"), Done("stop")]
        await it.close()

    run(work())


def test_server_that_does_not_want_to_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "_END_S", 0.2)

    async def work() -> None:
        it = host(folder)
        backend = await it.load(ModelSetup(folder / "stubborn.gguf"), nothing)
        pid = backend.pid
        await it.close()
        assert pid is not None and not psutil.pid_exists(pid)

    run(work())


CHAT = """
import asyncio, pathlib, sys
from ziggurat.tui.backend import ModelSetup
from ziggurat.tui.local import LocalHost

async def work():
    host = LocalHost([], pathlib.Path(sys.argv[1]), command=sys.argv[3:])
    backend = await host.load(ModelSetup(pathlib.Path(sys.argv[2])), lambda loading: None)
    print(backend.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(work())
"""


def test_no_server_is_left_when_the_chat_is_killed(folder: Path) -> None:
    chat = subprocess.Popen(
        [sys.executable, "-c", CHAT, str(folder / "log"), str(folder / "good.gguf"), *COMMAND], stdout=subprocess.PIPE
    )
    assert chat.stdout is not None
    pid = int(chat.stdout.readline())
    assert psutil.pid_exists(pid)
    arguments = asked(folder, "good")["arguments"]
    socket = Path(arguments[arguments.index("--unix-socket") + 1])
    assert socket.exists()
    chat.send_signal(signal.SIGKILL)
    chat.communicate()
    until = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) and not socket.parent.exists()


def test_log_is_not_kept_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "_MAX_LOG", 10)
    log = folder / "logs" / "server.log"
    log.parent.mkdir()
    log.write_text("ziggurat: error: an old one\n")

    async def work() -> None:
        it = host(folder)
        backend = await it.load(ModelSetup(folder / "good.gguf"), nothing)
        assert backend.pid is not None
        os.kill(backend.pid, signal.SIGKILL)
        while backend.pid is not None:
            await asyncio.sleep(0.01)
        with pytest.raises(BackendError, match="killed"):
            await backend.status()
        await it.close()

    run(work())
    assert "old one" in log.with_suffix(".old").read_text()


def test_gpu_memory_of_a_process() -> None:
    assert process_memory.parse_gpu("12, 100\n7, 50\n12, 28\n12, [N/A]\n", 12) == 128 * 2**20
    assert process_memory.resident_bytes(os.getpid()) > 2**20
    assert process_memory.resident_bytes(2**22 + 1) == 0
