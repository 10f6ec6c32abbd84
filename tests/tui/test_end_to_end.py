"""The session and the app over real server processes: with a tiny model, and with the reference model."""

from __future__ import annotations

import asyncio
import importlib.metadata
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from helpers import tiny_models
from helpers.screens import shows, until
from ziggurat.converter.cli import convert
from ziggurat.runtime.bindings import kv
from ziggurat.runtime.evaluate.filler import TEXT
from ziggurat.tui.app import ChatApp
from ziggurat.tui.backend import ModelSetup, Sampling
from ziggurat.tui.kept_files import KeptFiles
from ziggurat.tui.local import LocalHost
from ziggurat.tui.parts import ChatParts
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


REFERENCE = Path(__file__).parents[1] / "reference_model"
FACT = "The code of Lily's red box is 4821."


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("reference") / "reference.gguf"
    outcome = CliRunner().invoke(convert, [str(REFERENCE), str(path), "--type", "f16", "--no-awq", "--no-imatrix"])
    assert outcome.exit_code == 0, outcome.output
    return path


@pytest.mark.asyncio
async def test_the_app_talks_to_the_reference_model(reference: Path, tmp_path: Path) -> None:
    bounded = kv.available()
    half = TEXT[:1500]
    document = f"{half[: half.rindex('. ') + 2]}{FACT} {TEXT[1500:3000]}"
    host = LocalHost([reference.parent], tmp_path / "server.log", kept=KeptFiles(tmp_path / "rows"))
    setup = ModelSetup(reference, ctx=2048, kv_budget="256" if bounded else None, threads=1)
    with Store(tmp_path / "chats.db") as store:
        session = Session(recorder=store, sampling=Sampling(0.0, max_tokens=32), retries=())
        app = ChatApp(ChatParts(session, host=host, store=store, setup=setup))
        async with app.run_test(size=(120, 40)) as pilot:
            await until(pilot, lambda: session.backend is not None, 60)
            app.chat.prompt.area.insert(f"{document}\n\nWhat is the code of Lily's red box?")
            await pilot.press("enter")
            await until(pilot, lambda: len(session.conversation.messages) == 2 and not session.busy, 60)
            first = session.conversation.path()[-1]
            assert first.text == FACT and first.usage is not None
            await shows(pilot, FACT, "○ ready", "reference")
            app.chat.prompt.area.insert("Tell me a story.")
            await pilot.press("enter")
            await until(pilot, lambda: len(session.conversation.messages) == 4 and not session.busy, 60)
            second = session.conversation.path()[-1]
            assert len(second.text.split()) > 3 and second.usage is not None
            assert second.usage.reused_tokens >= first.usage.prompt_tokens
            await pilot.press("f4")
            await shows(pilot, "tokens seen", "layer 0, stretch 1")
            kept = app.chat.kv_panel.view.map.kept
            assert kept is not None and len(kept.tokens) > first.usage.prompt_tokens
            if bounded:
                await shows(pilot, "of the rows held", "begin_of_text")
                assert kept.layers[0].rows > 4 * kept.layers[-1].rows
                columns = app.chat.kv_panel.view.map.columns
                texts = [await session.backend.text(kept.stretch(each, columns)) or "" for each in range(columns)]
                asked_for = next(place for place, text in enumerate(texts) if "4821" in text)
                strip = kept.strip(0, columns)
                assert strip[asked_for] > sum(strip) / columns, "of what was asked for more is kept than of the rest"
            backend = session.backend
            await pilot.press("ctrl+q")
        assert backend.pid is None and [each.messages for each in store.list()] == [4]
