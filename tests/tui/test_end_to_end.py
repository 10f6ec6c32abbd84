"""The session over a real server process with a tiny model."""

from __future__ import annotations

import asyncio
import importlib.metadata
from pathlib import Path

import psutil
import pytest

from helpers import tiny_models
from ziggurat.runtime.bindings import kv
from ziggurat.tui.backend import ModelSetup, Sampling
from ziggurat.tui.kept_files import KeptFiles
from ziggurat.tui.local import LocalHost
from ziggurat.tui.session import Session
from ziggurat.tui.store import Store

LONG = "the quick brown fox jumps over the lazy dog and runs away " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = tiny_models.Shape(head_dim=32, n_head=2, n_head_kv=1)
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return tiny_models.write_model(path, shape, tiny_models.bpe_tokens(), chat_template=tiny_models.CHATML)


def test_chat_with_a_budget(model: Path, tmp_path: Path) -> None:
    assert "serve" in importlib.metadata.entry_points(group="ziggurat.commands").names
    budget = "64" if kv.available() else None

    async def work() -> None:
        kept_files = KeptFiles(tmp_path / "rows")
        host = LocalHost([model.parent], tmp_path / "server.log", kept=kept_files)
        setup = ModelSetup(model, ctx=2048, kv_budget=budget, threads=1)
        try:
            await talk(host, setup, kept_files)
        finally:
            await host.close()

    asyncio.run(asyncio.wait_for(work(), 60))


async def talk(host: LocalHost, setup: ModelSetup, kept_files: KeptFiles) -> None:
    backend = await host.load(setup, lambda _loading: None)
    with Store(None) as store:
        session = Session(backend, recorder=store, sampling=Sampling(0.0, max_tokens=8), retries=())
        session.send(LONG)
        await session.wait()
        assert session.error is None
        answer = session.conversation.path()[-1]
        assert answer.usage is not None and answer.usage.generated_tokens == 8
        assert answer.timings is not None and answer.timings.kv_bytes > 0
        session.send("and then?")
        await session.wait()
        again = session.conversation.path()[-1]
        assert session.error is None and again.usage is not None
        assert again.usage.reused_tokens >= answer.usage.prompt_tokens - 1
        await session.refresh()
        status = session.figures().status
        assert status is not None and status.ours and status.n_ctx == 2048 and status.process_bytes > 0
        assert (await host.models())[0].path == setup.path
        kept = await backend.kept(session.conversation.id)
        assert kept is not None and len(kept.tokens) > 100
        if setup.kv_budget is not None:
            assert 0 < min(kept.strip(0, 20)[:1]) and kept.layers[0].budget is not None
            assert kept.layers[-1].rows < len(kept.tokens)
        text = await backend.text(kept.tokens[:60])
        assert text is not None and "quick brown" in text
        assert await backend.count("quick brown fox") is not None
        read = await backend.kept(session.conversation.id)
        assert read is not None and await backend.save(session.conversation.id)
        backend = await host.load(setup, lambda _loading: None)
        assert not await backend.restore("another") and await backend.restore(session.conversation.id)
        again_kept = await backend.kept(session.conversation.id)
        assert again_kept is not None and again_kept.tokens[: len(read.tokens)] == read.tokens
        session.backend, session.sampling = backend, Sampling(0.0, max_tokens=4)
        session.send("and again")
        await session.wait()
        last = session.conversation.path()[-1].usage
        assert session.error is None and last is not None and last.reused_tokens > 100
        session.sampling = Sampling(0.0)
        session.send("go on for long")
        while session.state != "answering":
            await asyncio.sleep(0.005)
        await session.stop()
        assert session.conversation.path()[-1].ending in ("cancelled", "stop", "length")
        assert len(store.open(session.conversation.id).messages) >= 5
        kept_files.keep_only([])
        assert not await backend.restore(session.conversation.id)
    pid = backend.pid
    await host.close()
    assert pid is not None and not psutil.pid_exists(pid)
