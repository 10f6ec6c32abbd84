"""Each widget alone in an app that has nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from textual.app import App, ComposeResult
from textual.message import Message
from textual.pilot import Pilot
from textual.widget import Widget

from helpers.fake_backend import STATUS, kept_pyramid
from helpers.screens import screen_text, shows, until
from ziggurat.tui.commands import Completion
from ziggurat.tui.figures import Figures
from ziggurat.tui.kept import Kept, KeptLayer
from ziggurat.tui.widgets.banner import Banner
from ziggurat.tui.widgets.budget_form import BudgetForm
from ziggurat.tui.widgets.chooser import Choice, Chooser
from ziggurat.tui.widgets.kv_view import KvMap, KvView
from ziggurat.tui.widgets.message import MessageView, Shown, code_blocks
from ziggurat.tui.widgets.message_body import MessageBody
from ziggurat.tui.widgets.prompt import History, PromptArea, PromptInput
from ziggurat.tui.widgets.sparkline import bar, sparkline
from ziggurat.tui.widgets.status_bar import StatusBar, fit, readouts
from ziggurat.tui.widgets.transcript import MOUNTED_CHARACTERS, Transcript

pytestmark = pytest.mark.asyncio


class Host(App[None]):
    CSS = "Screen { scrollbar-gutter: stable; }"

    def __init__(self, widget: Widget) -> None:
        super().__init__()
        self.widget = widget
        self.heard: list[Message] = []

    def compose(self) -> ComposeResult:
        yield self.widget

    def on_prompt_area_sent(self, event: PromptArea.Sent) -> None:
        self.heard.append(event)

    def on_chooser_chosen(self, event: Chooser.Chosen) -> None:
        self.heard.append(event)

    def on_kv_map_chosen(self, event: KvMap.Chosen) -> None:
        self.heard.append(event)

    def on_budget_form_applied(self, event: BudgetForm.Applied) -> None:
        self.heard.append(event)

    def on_message_view_asked(self, event: MessageView.Asked) -> None:
        self.heard.append(event)


@contextlib.asynccontextmanager
async def hosting(widget: Widget, size: tuple[int, int] = (60, 20)) -> AsyncIterator[tuple[Pilot[Any], Host]]:
    app = Host(widget)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        yield pilot, app


async def test_a_body_that_grows_ends_as_one_that_came_whole() -> None:
    text = (
        "# T\n\n- a\n- b\n\n```python\nx = 1\n"
        + "y = 2\n" * 90
        + "```\n\nend **bold** `code`\n\n| a | b |\n|--|--|\n| 1 | 2 |\n"
    )
    whole, grown = MessageBody(text), MessageBody()
    async with hosting(whole) as (pilot, _):
        height = whole.size.height
        expected = [whole.render_line(y).text for y in range(height)]
    async with hosting(grown) as (pilot, _):
        for at in range(0, len(text), 11):
            grown.append(text[at : at + 11])
            if at % 110 == 0:
                grown.flush()
        grown.finish()
        await until(pilot, lambda: grown.size.height == height)
        assert [grown.render_line(y).text for y in range(height)] == expected
        assert grown.text == text


async def test_the_tail_is_seen_before_its_block_ends() -> None:
    body = MessageBody()
    async with hosting(body) as (pilot, _):
        body.append("no end **yet")
        await shows(pilot, "no end **yet")
        body.append("**\n\n")
        await shows(pilot, "no end yet")


async def test_selected_text_is_what_is_seen() -> None:
    body = MessageBody("one **two**\n\nthree")
    async with hosting(body) as (pilot, app):
        app.screen.action_select_all() if hasattr(app.screen, "action_select_all") else app.screen.text_select_all()
        await pilot.pause()
        assert app.screen.get_selected_text() == "one two\n\nthree"


async def test_a_message_asks_for_what_keys_mean() -> None:
    view = MessageView(Shown("1", "assistant", "text", branch=2, branches=3))
    async with hosting(view) as (pilot, app):
        await shows(pilot, "‹ 2/3 ›", "text")
        view.focus()
        await pilot.press("e", "left", "c")
        assert [event.what for event in app.heard] == ["edit", "previous_branch", "copy"]  # type: ignore[attr-defined]


async def test_code_blocks_are_found_whole() -> None:
    long = "\n".join(f"line {n}" for n in range(100))
    assert code_blocks(f"a\n```py\n{long}\n```\nb\n```\nc\n```") == [long, "c"]


async def test_only_the_recent_end_of_a_conversation_is_mounted_and_the_rest_on_the_way_up() -> None:
    transcript = Transcript()
    messages = [Shown(str(n), "assistant", f"message {n} " + "word " * 200) for n in range(100)]
    async with hosting(transcript) as (pilot, _):
        transcript.show(messages)
        await shows(pilot, "word word")
        mounted = len(transcript.messages)
        assert mounted <= MOUNTED_CHARACTERS // 1000 + 1
        assert transcript.messages[-1].shown.id == "99"
        transcript.scroll_to(y=5, animate=False)
        await pilot.pause()
        transcript.scroll_home(animate=False)
        await until(pilot, lambda: len(transcript.messages) > mounted)
        assert [view.shown.id for view in transcript.messages] == [
            str(n) for n in range(100 - len(transcript.messages), 100)
        ]


async def test_what_two_paths_share_stays_mounted() -> None:
    transcript = Transcript()
    async with hosting(transcript) as (pilot, _):
        shared = [Shown(str(n), "user", f"message {n}") for n in range(3)]
        transcript.show([*shared, Shown("a", "assistant", "one end")])
        await shows(pilot, "message 2", "one end")
        views = list(transcript.messages)
        transcript.show([*shared[:2], replace(shared[2], branches=2), Shown("b", "assistant", "another")])
        await shows(pilot, "‹ 1/2 ›", "another")
        assert transcript.messages[:2] == views[:2] and views[2] not in transcript.messages
        assert "one end" not in screen_text(pilot.app)
        transcript.show([])
        await until(pilot, lambda: "message" not in screen_text(pilot.app))


async def test_the_end_is_followed_until_the_reader_scrolls_up() -> None:
    transcript = Transcript()
    async with hosting(transcript) as (pilot, _):
        view = transcript.add(Shown("1", "assistant"), growing=True)
        for n in range(60):
            view.append(f"line {n}\n\n")
        await shows(pilot, "line 59")
        transcript.scroll_to(y=0, animate=False)
        transcript.release_anchor()
        await shows(pilot, "line 0")
        view.append("line 60\n\n")
        await pilot.pause(0.15)
        assert "line 0" in screen_text(pilot.app)


async def test_the_prompt_completes_and_sends() -> None:
    prompt = PromptInput(lambda text: [Completion("/help", "/help", "keys"), Completion("/heat ", "/heat N", "more")])
    async with hosting(prompt) as (pilot, app):
        prompt.focus()
        await pilot.press("slash", "h")
        await shows(pilot, "/heat N", "more")
        await pilot.press("down", "tab")
        assert prompt.text == "/heat " or prompt.text == "/heat"
        await pilot.press("4", "enter")
        assert [event.text.split() for event in app.heard] == [["/heat", "4"]]  # type: ignore[attr-defined]


async def test_earlier_inputs() -> None:
    history = History(["a", "b"])
    assert [history.earlier("now"), history.earlier(""), history.earlier("")] == ["b", "a", None]
    assert [history.later(), history.later(), history.later()] == ["b", "now", None]


async def test_readouts_are_left_out_by_their_rank_where_there_is_no_room() -> None:
    figures = Figures(rate=23.4, history=(1.0, 2.0), time_to_first_token_s=0.3, context_used=3800, status=STATUS)
    found = readouts(figures, "answering", "model")
    texts = [each.text for each in fit(found, 200)]
    assert texts[0] == "● answering" and "23.4 tok/s" in texts and "ctx 3800/4096 93%!!" in texts
    narrow = [each.text for each in fit(found, 48)]
    assert narrow == ["● answering", "23.4 tok/s", "ctx 3800/4096 93%!!"]


@pytest.mark.parametrize(("used", "style", "mark"), [(100, "", "2%"), (3100, "amber", "76%!"), (3700, "red", "90%!!")])
async def test_the_context_is_amber_and_red_and_says_so_without_colour(used: int, style: str, mark: str) -> None:
    found = readouts(Figures(context_used=used, status=STATUS), "idle", "")
    context = next(each for each in found if each.text.startswith("ctx"))
    assert context.style == style and context.text.endswith(mark)


@pytest.mark.parametrize(
    ("activity", "said"), [("no model", "○ no model"), ("loading", "◌ loading"), ("connecting", "◌ connecting")]
)
async def test_nothing_is_ready_before_there_is_a_model(activity: Any, said: str) -> None:
    assert [each.text for each in readouts(Figures(), activity, "")] == [said]


async def test_the_status_bar_shows_reading() -> None:
    status = StatusBar()
    async with hosting(status) as (pilot, _):
        status.show(Figures(progress=0.5, prompt_rate=812.0), "reading", "model")
        await shows(pilot, "◐ reading", "█████      50% 812 tok/s", "model")


async def test_the_map_tells_what_is_chosen() -> None:
    view = KvView()
    async with hosting(view) as (pilot, app):
        view.show(kept_pyramid())
        view.map.focus()
        await pilot.press("down", "right", "right")
        chosen = app.heard[-1]
        assert isinstance(chosen, KvMap.Chosen) and (chosen.layer, chosen.column) == (1, 2)
        await pilot.click(KvMap, offset=(view.map._left, 3))
        chosen = app.heard[-1]
        assert isinstance(chosen, KvMap.Chosen) and (chosen.layer, chosen.column) == (3, 0)
        view.show_words(chosen, "the words")
        await shows(pilot, "layer 3, stretch 1 of", "the words")


async def test_the_map_shows_a_plan_where_nothing_was_read() -> None:
    view = KvView()
    async with hosting(view) as (pilot, _):
        view.show(None, (200, 120, 60, 20))
        await shows(pilot, "Budget of 400 rows over 4 layers", "████████", "20")


async def test_the_map_says_which_layers_have_a_sliding_window() -> None:
    view = KvView()
    async with hosting(view) as (pilot, _):
        view.show(None, (0, 120, 0, 20))
        await shows(pilot, "Budget of 140 rows over 2 layers", "sliding", "120")
        view.show(Kept("c", tuple(range(90)), (KeptLayer(0, 0, (((50, 40),),)), KeptLayer(1, 9, (((0, 9),),)))))
        await shows(pilot, "40 slide", "9/9")


async def test_a_chooser_narrows_down() -> None:
    chooser = Chooser(
        [Choice("1", "Alpha", "red fox"), Choice("2", "Beta", "blue"), Choice("3", "Bad", trouble="broken")]
    )
    async with hosting(chooser) as (pilot, app):
        await shows(pilot, "Alpha", "red fox", "broken")
        await pilot.press("b")
        await until(pilot, lambda: "Alpha" not in screen_text(pilot.app))
        await pilot.press("l", "u", "enter")
        assert [event.choice.id for event in app.heard] == ["2"]  # type: ignore[attr-defined]
        await pilot.press("z")
        await shows(pilot, "Nothing here.")


async def test_a_budget_is_asked_for() -> None:
    form = BudgetForm(policies=("pyramid", "snapkv"))
    async with hosting(form) as (pilot, app):
        form.budget.focus()
        await pilot.press("6", "4", "enter")
        form.tell("KV 1 MiB")
        await shows(pilot, "budget", "64", "KV 1 MiB")
        assert [(event.budget, event.policy) for event in app.heard] == [("64", "")]  # type: ignore[attr-defined]


async def test_a_banner_is_cleared_by_its_topic_only() -> None:
    banner = Banner()
    async with hosting(banner) as (pilot, _):
        banner.say("it failed", "error", "error")
        await shows(pilot, "✗ it failed")
        assert not banner.clear("edit")
        assert banner.clear("error") and not banner.display


@pytest.mark.parametrize(
    ("values", "width", "expected"), [([1, 2, 4], 3, "▃▅█"), ([0, 0], 4, "▁▁"), ([1, 2, 3, 4], 2, "▇█"), ([], 3, "")]
)
async def test_a_sparkline(values: Sequence[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


async def test_a_bar() -> None:
    assert [bar(0, 2), bar(0.5, 2), bar(0.56, 2), bar(1, 2), bar(7, 2)] == ["  ", "█ ", "█▏", "██", "██"]
