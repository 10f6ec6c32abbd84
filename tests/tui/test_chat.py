"""The chat, driven by keys, with a backend that says what it was told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual import events
from textual.pilot import Pilot

from helpers.fake_backend import LOST, STATUS, Answer, FakeBackend, FakeHost, kept_pyramid
from helpers.screens import screen_text, shows, until
from ziggurat.tui.app import ChatApp
from ziggurat.tui.backend import BackendError, Loading, ModelSetup, Planned
from ziggurat.tui.parts import ChatParts
from ziggurat.tui.session import Session
from ziggurat.tui.store import Store
from ziggurat.tui.widgets.chooser import Chooser

pytestmark = pytest.mark.asyncio

Chat = Pilot[Any]


@contextlib.asynccontextmanager
async def chatting(
    answers: Iterable[Any] = ("hello",),
    *,
    size: tuple[int, int] = (80, 24),
    retries: tuple[float, ...] = (),
    backend: FakeBackend | None = None,
    **parts: Any,
) -> AsyncIterator[tuple[Chat, FakeBackend, Session]]:
    fake = backend or FakeBackend(answers)
    session = Session(None if "setup" in parts else fake, retries=retries, recorder=parts.get("store"))
    app = ChatApp(ChatParts(session, **parts))
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        yield pilot, fake, session


async def say(pilot: Chat, text: str) -> None:
    area = chat(pilot).prompt.area
    assert area.has_focus
    area.insert(text)
    await pilot.press("enter")


async def answered(pilot: Chat, session: Session) -> None:
    await until(pilot, lambda: not session.busy)
    await pilot.pause(0.06)


def chat(pilot: Chat) -> Any:
    return pilot.app.chat  # type: ignore[attr-defined]


async def test_the_prompt_is_focused_and_enter_sends() -> None:
    async with chatting(["**bold** answer"]) as (pilot, backend, session):
        await pilot.press("h", "i", "space", "t", "enter")
        await answered(pilot, session)
        await shows(pilot, "hi t", "bold answer")
        assert [message.content for message in backend.requests[0].messages] == ["hi t"]
        assert chat(pilot).prompt.text == ""


async def test_ctrl_j_and_a_pasted_newline_make_lines() -> None:
    async with chatting() as (pilot, backend, session):
        await pilot.press("a", "ctrl+j", "b")
        pilot.app.post_message(events.Paste("c\nd"))
        await until(pilot, lambda: chat(pilot).prompt.text == "a\nbc\nd")
        assert not backend.requests
        await pilot.press("enter")
        await answered(pilot, session)
        assert backend.requests[0].messages[-1].content == "a\nbc\nd"


@pytest.mark.parametrize("line", ["one line of some words\n", "no line ends "])
async def test_a_paste_of_100_kb_is_sent_as_it_is(line: str) -> None:
    async with chatting() as (pilot, backend, session):
        pasted = line * (100_000 // len(line)) + "end"
        pilot.app.post_message(events.Paste(pasted))
        await shows(pilot, "[pasted 1:")
        await pilot.press("!", "enter")
        await answered(pilot, session)
        assert backend.requests[0].messages[-1].content == pasted + "!"


async def test_escape_stops_at_once_and_keeps_what_came() -> None:
    async with chatting([Answer(["half ", "said"], hold=asyncio.Event())]) as (pilot, _, session):
        await say(pilot, "go")
        await shows(pilot, "half said")
        await pilot.press("escape")
        await answered(pilot, session)
        await shows(pilot, "half said", "stopped")
        assert session.conversation.path()[-1].ending == "cancelled"


async def test_what_is_typed_while_an_answer_runs_stays() -> None:
    async with chatting([Answer(["one"], hold=asyncio.Event())]) as (pilot, backend, session):
        await say(pilot, "go")
        await shows(pilot, "one")
        await say(pilot, "next")
        assert chat(pilot).prompt.text == "next" and len(backend.requests) == 1
        await pilot.press("escape")
        await answered(pilot, session)
        await pilot.press("enter")
        await until(pilot, lambda: len(backend.requests) == 2)


async def test_an_answer_given_again_keeps_the_old_one_as_a_version() -> None:
    async with chatting(["first", "second"]) as (pilot, _, session):
        await say(pilot, "q")
        await answered(pilot, session)
        await pilot.press("ctrl+r")
        await shows(pilot, "second", "‹ 2/2 ›")
        await answered(pilot, session)
        await pilot.press("ctrl+up", "left")
        await shows(pilot, "first", "‹ 1/2 ›")
        assert "second" not in screen_text(pilot.app)
        await pilot.press("right")
        await shows(pilot, "second", "‹ 2/2 ›")


async def test_an_edited_message_is_a_branch() -> None:
    async with chatting(["one", "two", "three"]) as (pilot, backend, session):
        for text in ("alpha", "beta"):
            await say(pilot, text)
            await answered(pilot, session)
        await pilot.press("d", "ctrl+up", "up", "up", "up", "e")
        await shows(pilot, "editing an earlier message")
        assert chat(pilot).prompt.text == "alpha"
        await say(pilot, "!")
        await answered(pilot, session)
        assert [message.content for message in backend.requests[-1].messages] == ["alpha!"]
        await shows(pilot, "alpha!", "three")
        assert chat(pilot).prompt.text == "d", "what was typed before comes back"
        await pilot.press("ctrl+up", "up", "left")
        await shows(pilot, "alpha", "one", "beta", "two")


async def test_leaving_an_edit_brings_the_typed_text_back() -> None:
    async with chatting() as (pilot, backend, session):
        await say(pilot, "alpha")
        await answered(pilot, session)
        await pilot.press("x", "ctrl+up", "e")
        assert chat(pilot).prompt.text == "alpha"
        await pilot.press("escape")
        assert chat(pilot).prompt.text == "x" and len(backend.requests) == 1


async def test_copying_goes_to_the_clipboard_of_the_terminal() -> None:
    async with chatting(["Code:\n\n```py\na = 1\n```\n\n```py\nb = 2\n```"]) as (pilot, _, session):
        await say(pilot, "q")
        await answered(pilot, session)
        await pilot.press("ctrl+up", "c")
        assert pilot.app.clipboard == session.conversation.path()[-1].text
        await pilot.press("y")
        assert pilot.app.clipboard == "a = 1"
        await pilot.press("y")
        assert pilot.app.clipboard == "b = 2"


async def test_earlier_inputs_come_with_up() -> None:
    async with chatting() as (pilot, _, session):
        for text in ("one", "two"):
            await say(pilot, text)
            await answered(pilot, session)
        await pilot.press("n", "up")
        assert chat(pilot).prompt.text == "two"
        await pilot.press("up", "up")
        assert chat(pilot).prompt.text == "one"
        await pilot.press("down", "down")
        assert chat(pilot).prompt.text == "n"


async def test_slash_commands_are_completed() -> None:
    async with chatting() as (pilot, _, _):
        await pilot.press("slash", "s", "y")
        await shows(pilot, "/system [TEXT")
        await pilot.press("tab")
        assert chat(pilot).prompt.text == "/system "
        await say(pilot, "be brief")
        assert chat(pilot).session.conversation.system == "be brief"


async def test_an_unknown_command_stays_in_the_prompt() -> None:
    async with chatting() as (pilot, backend, _):
        await say(pilot, "/nonsense")
        await shows(pilot, "there is no command /nonsense")
        assert chat(pilot).prompt.text == "/nonsense" and not backend.requests


async def test_a_file_goes_with_the_next_message_and_tells_its_tokens(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some words here")
    async with chatting() as (pilot, backend, session):
        chat(pilot).prompt.text = f"/file {tmp_path}/notes.txt"
        await pilot.press("enter")
        await shows(pilot, "+ notes.txt (3 tokens)")
        await say(pilot, "sum up")
        await answered(pilot, session)
        assert "some words here" in backend.requests[0].messages[-1].content
        assert not chat(pilot).chips.display


async def test_a_missing_file_is_named() -> None:
    async with chatting() as (pilot, _, _):
        await say(pilot, "/file nowhere")
        await shows(pilot, "nowhere: there is no such file")


async def test_an_error_is_shown_with_its_remedy_and_retried_by_a_key() -> None:
    async with chatting(["back again"]) as (pilot, backend, session):
        backend.lost = LOST
        await say(pilot, "hi")
        await answered(pilot, session)
        await shows(pilot, "nobody answers at", "start the server again", "Ctrl+R tries again", "hi")
        await pilot.press("n", "e", "w")
        backend.lost = None
        await pilot.press("ctrl+r")
        await shows(pilot, "back again")
        await answered(pilot, session)
        assert chat(pilot).prompt.text == "new"
        assert "nobody answers" not in screen_text(pilot.app)


async def test_a_lost_server_is_tried_again_by_itself() -> None:
    async with chatting(["back"], retries=(0.3, 0.3, 0.3)) as (pilot, backend, session):
        backend.lost = LOST
        await say(pilot, "hi")
        await shows(pilot, "trying again in")
        backend.lost = None
        await shows(pilot, "back")
        await answered(pilot, session)


async def test_an_engine_of_its_own_that_has_ended_is_told() -> None:
    async with chatting(host=FakeHost(), size=(120, 24)) as (pilot, backend, session):
        await shows(pilot, "○ ready")
        backend.lost = LOST
        await shows(pilot, "the engine has ended: your next message starts it again")
        backend.lost = None
        await shows(pilot, "○ ready")


async def test_the_log_is_named_with_an_error(tmp_path: Path) -> None:
    error = BackendError("the engine failed", "see the log")
    async with chatting([Answer(["so far"], error=error)], log_file=Path("/logs/chat.log")) as (pilot, _, session):
        await say(pilot, "hi")
        await answered(pilot, session)
        await shows(pilot, "so far", "the engine failed", "/logs/chat.log", "broken off")


async def test_readouts() -> None:
    status = replace(STATUS, n_ctx=20)
    backend = FakeBackend([Answer(["a"] * 17, progress=[0.5], hold=asyncio.Event())], status=status)
    async with chatting(backend=backend, size=(160, 24)) as (pilot, _, session):
        await say(pilot, "hi")
        await shows(pilot, "● answering", "first ", "ctx ", "KV 32M/128M", "mem 700M", "fake")
        await pilot.press("escape")
        await answered(pilot, session)
        await shows(pilot, "○ ready")


async def test_the_kv_view_shows_layers_and_the_words_of_a_stretch() -> None:
    backend = FakeBackend(kept=kept_pyramid())
    async with chatting(backend=backend) as (pilot, _, session):
        await say(pilot, "hi")
        await answered(pilot, session)
        await pilot.press("f4")
        await shows(pilot, "400 tokens seen, 25.0% of the rows held", "200/200", "20/20")
        await shows(pilot, "layer 0, stretch 1", "w0 w1", "◆")
        await pilot.press("down", "end")
        await shows(pilot, "layer 1", "100% held", "w399")
        await pilot.press("f4")
        assert "rows held" not in screen_text(pilot.app)


async def test_a_model_is_chosen_and_answers_go_on() -> None:
    host = FakeHost(make=lambda setup: FakeBackend([f"I am {setup.path.stem}"]))
    async with chatting(host=host) as (pilot, _, session):
        await pilot.press("f3")
        await shows(pilot, "small.gguf", "600.00 MiB", "context 8192", "is not a GGUF file")
        await pilot.press("enter")
        await until(pilot, lambda: bool(host.loaded))
        await say(pilot, "who")
        await answered(pilot, session)
        await shows(pilot, "I am small")


async def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    short = Planned(9 << 30, 8 << 30, 1 << 30, 1 << 30, 4 << 30, 4096, shortage="it takes 9.00 GiB, 4.00 GiB are free")
    host = FakeHost(planned=short)
    async with chatting(host=host) as (pilot, fake, session):
        await pilot.press("f3", "enter")
        await shows(pilot, "small.gguf is not loaded", "4.00 GiB are free")
        assert not host.loaded and session.backend is fake


async def test_loading_shows_progress_and_can_be_cancelled() -> None:
    host = FakeHost(hold=asyncio.Event(), steps=(Loading("reading weights", 0.25), Loading("ready", 1.0)))
    async with chatting(host=host, setup=ModelSetup(Path("/m/small.gguf"))) as (pilot, _, session):
        await shows(pilot, "small.gguf (800.00 MiB in all): reading weights", "25%", " s ", "◌ loading")
        await pilot.press("h", "i", "escape")
        await shows(pilot, "loading small.gguf was cancelled", "○ no model")
        assert session.backend is None and chat(pilot).prompt.text == "hi"


async def test_a_failed_start_is_tried_again_by_a_key() -> None:
    host = FakeHost(refuse=BackendError("the engine did not start", "see its log"))
    async with chatting(host=host, setup=ModelSetup(Path("/m/small.gguf"))) as (pilot, _, session):
        await shows(pilot, "the engine did not start: see its log", "Ctrl+R tries again")
        host.refuse = None
        await pilot.press("ctrl+r")
        await until(pilot, lambda: session.backend is not None)


async def test_a_budget_is_planned_shown_and_applied_to_the_next_prompt() -> None:
    host = FakeHost()
    async with chatting(host=host, setup=ModelSetup(Path("/m/small.gguf")), size=(200, 60)) as (pilot, _, session):
        await until(pilot, lambda: session.backend is not None)
        await pilot.press("f4")
        await shows(pilot, "budget", "policy")
        chat(pilot).kv_panel.form.budget.focus()
        await pilot.press("6", "4")
        await shows(pilot, "KV 32.00 MiB of 128.00 MiB", "rows 200…20")
        await pilot.press("enter")
        await until(pilot, lambda: len(host.loaded) == 2)
        assert host.loaded[-1].kv_budget == "64"


async def test_a_policy_that_there_is_not_is_named_and_nothing_is_loaded() -> None:
    host = FakeHost()
    async with chatting(host=host, setup=ModelSetup(Path("/m/small.gguf"))) as (pilot, _, session):
        await until(pilot, lambda: session.backend is not None)
        host.refuse = BackendError("there is no policy 'x'", "write one of pyramid", kind="refused")
        await say(pilot, "/budget 64 x")
        await shows(pilot, "there is no policy 'x': write one of pyramid")


async def test_rows_are_kept_before_another_model_comes() -> None:
    host = FakeHost()
    async with chatting(host=host) as (pilot, backend, session):
        await say(pilot, "hi")
        await answered(pilot, session)
        await pilot.press("f3")
        await shows(pilot, "small.gguf")
        await pilot.press("enter")
        await until(pilot, lambda: session.backend is not backend and session.backend is not None)
        assert backend.saved == {session.conversation.id}


async def test_a_message_that_is_too_long_is_for_editing() -> None:
    error = BackendError("the prompt has 9 tokens", "begin another chat", kind="too_long")
    async with chatting([Answer(error=error)], log_file=Path("/logs/chat.log")) as (pilot, _, session):
        await say(pilot, "hi")
        await shows(pilot, "the prompt has 9 tokens: begin another chat", "Ctrl+Up e edits the message")
        assert "chat.log" not in screen_text(pilot.app)


async def test_the_budget_command() -> None:
    host = FakeHost()
    async with chatting(host=host, setup=ModelSetup(Path("/m/small.gguf"))) as (pilot, _, session):
        await until(pilot, lambda: session.backend is not None)
        chat(pilot).prompt.text = "/budget 25% snapkv"
        await pilot.press("enter")
        await until(pilot, lambda: len(host.loaded) == 2)
        assert (host.loaded[-1].kv_budget, host.loaded[-1].kv_policy) == ("25%", "snapkv")


async def test_without_a_model_three_lines_say_what_to_do() -> None:
    app = ChatApp(ChatParts(Session(None), host=FakeHost()))
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "There is no model yet", "convert MODEL OUT.gguf", "--connect URL")
        await say(pilot, "hi")
        await shows(pilot, "there is no model: F3 chooses one")
        assert app.chat.prompt.text == "hi"


async def test_the_screen_can_be_resized_while_an_answer_comes() -> None:
    text = "Some words **that** wrap around. " * 40
    async with chatting([Answer([text], hold=asyncio.Event())]) as (pilot, _, session):
        await say(pilot, "go")
        await shows(pilot, "wrap around")
        for width, height in ((200, 60), (40, 12), (80, 24)):
            await pilot.resize_terminal(width, height)
            await shows(pilot, "wrap around")
            assert all(len(line) <= width for line in screen_text(pilot.app).splitlines())
        await pilot.press("escape")
        await answered(pilot, session)


async def test_thoughts_are_shown_until_the_answer_comes() -> None:
    answer = Answer(["said"], thoughts=["hm ", "well"], delay=0.2)
    async with chatting([answer]) as (pilot, _, session):
        await say(pilot, "go")
        await shows(pilot, "hm well")
        await answered(pilot, session)
        await shows(pilot, "said")
        assert "hm well" not in screen_text(pilot.app)
        await pilot.press("ctrl+up", "t")
        await shows(pilot, "hm well")


async def test_help_and_palette() -> None:
    async with chatting() as (pilot, _, _):
        await pilot.press("f1")
        await shows(pilot, "Keys and commands", "Ctrl+J")
        await pilot.press("escape", "ctrl+p")
        await shows(pilot, "KV view")
        await pilot.press("escape")


async def test_quitting_keeps_the_rows_and_closes() -> None:
    async with chatting(host=FakeHost()) as (pilot, backend, session):
        await say(pilot, "hi")
        await answered(pilot, session)
        await pilot.press("ctrl+q")
        await until(pilot, lambda: backend.closed)
        assert session.conversation.id in backend.saved


async def test_escape_sequences_of_an_answer_do_not_reach_the_terminal() -> None:
    async with chatting(["a\x1b[31mred\x07 \x9b2J"]) as (pilot, _, session):
        await say(pilot, "hi")
        await answered(pilot, session)
        assert not set(screen_text(pilot.app)) & {"\x1b", "\x07", "\x9b"}


async def test_a_message_may_begin_with_a_path() -> None:
    async with chatting() as (pilot, backend, session):
        await say(pilot, "/etc/hosts what is it")
        await answered(pilot, session)
        assert backend.requests[0].messages[-1].content == "/etc/hosts what is it"


async def test_a_chat_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with chatting(["said so"]) as (pilot, _, session):
        await say(pilot, "my words")
        await answered(pilot, session)
        await say(pilot, "/export md")
        await until(pilot, (tmp_path / "my-words.md").exists)
        assert "said so" in (tmp_path / "my-words.md").read_text()


async def test_chats_are_listed_searched_renamed_pinned_deleted_and_brought_back() -> None:
    with Store(None) as store:
        async with chatting(["about cats", "about dogs"], store=store) as (pilot, backend, session):
            await say(pilot, "first")
            await answered(pilot, session)
            first = session.conversation.id
            await pilot.press("ctrl+n")
            await say(pilot, "second")
            await answered(pilot, session)
            await pilot.press("f2")
            await shows(pilot, "first", "second", "2 messages")
            await pilot.press(*"cats")
            await until(pilot, lambda: "second" not in dialog(pilot))
            await pilot.press("ctrl+e")
            await shows(pilot, "Title")
            await pilot.press(*"ly", "enter")
            await shows(pilot, "firstly")
            await pilot.press("ctrl+t")
            await shows(pilot, "★")
            await pilot.press("ctrl+d")
            await until(pilot, lambda: "firstly" not in dialog(pilot))
            assert [each.title for each in store.list()] == ["second"]
            await pilot.press("ctrl+z")
            await until(pilot, lambda: "firstly" in dialog(pilot))
            await pilot.press("enter")
            await shows(pilot, "about cats")
            assert session.conversation.id == first
            await until(pilot, lambda: len(backend.saved) == 2)


async def test_search_from_the_prompt() -> None:
    with Store(None) as store:
        async with chatting(["about cats"], store=store) as (pilot, _, session):
            await say(pilot, "first")
            await answered(pilot, session)
            await say(pilot, "/chats cat")
            await until(pilot, lambda: "first" in dialog(pilot) and "cat" in dialog(pilot))


def dialog(pilot: Chat) -> str:
    """What the list on the screen shows."""
    options = pilot.app.screen.query_one(Chooser).options
    return "\n".join(str(option.prompt) for option in options.options)


async def test_a_fault_of_the_app_is_a_line_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app = ChatApp(ChatParts(Session(FakeBackend()), log_file=Path("/logs/chat.log")))

    def fail() -> None:
        raise ValueError("of ours")

    with pytest.raises(ValueError, match="of ours"):
        async with app.run_test(size=(80, 24)) as pilot:
            app.call_later(fail)
            await pilot.pause(0.2)
    assert "of ours" in caplog.text
    printed = [segment.text for each in app._exit_renderables for segment in each.segments]  # type: ignore[union-attr]
    assert "Traceback" not in "".join(printed)
