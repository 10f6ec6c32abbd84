"""Rates, figures, and the strip of kept rows."""

from __future__ import annotations

import pytest

from helpers.fake_backend import STATUS, kept_pyramid
from ziggurat.tui.backend import Delta, Done, Progress, Timings, Usage
from ziggurat.tui.figures import FiguresKeeper
from ziggurat.tui.kept import Kept, KeptLayer
from ziggurat.tui.meter import Meter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_of_the_last_second() -> None:
    clock = Clock()
    meter = Meter(clock)
    for _ in range(200):
        clock.now += 0.02
        meter.count(1)
    assert meter.rate() == pytest.approx(50, rel=0.05) and meter.tokens == 200
    clock.now += 2.0
    assert meter.rate() == 0.0
    meter.start()
    assert meter.rate() == 0.0 and meter.history() == ()


def test_rate_just_after_the_start() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.count(1)
    assert meter.rate() == 0.0
    clock.now += 0.1
    meter.count(1)
    assert meter.rate() == pytest.approx(20.0)


def test_history_has_bins_of_a_quarter_second() -> None:
    clock = Clock()
    meter = Meter(clock)
    for tokens in (5, 0, 10):
        meter.count(tokens)
        clock.now += 0.25
    assert meter.history() == (20.0, 0.0, 40.0)
    clock.now += 1000.0
    assert set(meter.history()) == {0.0} and len(meter.history()) < 100


def test_figures_of_an_answer() -> None:
    clock = Clock()
    keeper = FiguresKeeper(clock)
    keeper.status = STATUS
    keeper.start()
    keeper.take(Progress(0.5, 800.0))
    assert (keeper.now().progress, keeper.now().prompt_rate) == (0.5, 800.0)
    clock.now += 2.0
    keeper.take(Delta("a"))
    clock.now += 0.5
    keeper.take(Delta("b", 4))
    found = keeper.now()
    assert found.progress is None and found.time_to_first_token_s == 2.0 and found.tokens == 5
    assert found.rate == pytest.approx(10.0)
    timings = Timings(1.5, 900.0, 42.0, drafted_tokens=4, accepted_tokens=3, kv_bytes=10, kv_bytes_full=40)
    keeper.take(Done("stop", Usage(100, 6, 20), timings))
    found = keeper.now()
    clock.now += 60.0
    assert found.history == keeper.now().history and any(found.history), "it stands still when the answer has ended"
    assert (found.time_to_first_token_s, found.rate, found.prompt_rate) == (1.5, 42.0, 900.0)
    assert (found.context_used, found.accepted, found.kv_bytes, found.kv_bytes_full) == (106, 0.75, 10, 40)
    assert found.context_part == pytest.approx(106 / 4096)


def test_context_of_a_stopped_answer_counts_what_came() -> None:
    keeper = FiguresKeeper(Clock())
    keeper.start()
    keeper.take(Done("stop", Usage(100, 6)))
    keeper.start()
    assert keeper.now().context_used == 106
    keeper.take(Delta("a", 30))
    keeper.take(Done("cancelled"))
    assert keeper.now().context_used == 136
    keeper.start()
    keeper.take(Done("stop", Usage(150, 5)))
    assert keeper.now().context_used == 155


def test_figures_of_a_server_that_tells_nothing() -> None:
    clock = Clock()
    keeper = FiguresKeeper(clock)
    keeper.start()
    clock.now += 1.0
    keeper.take(Delta("a"))
    clock.now += 0.5
    keeper.take(Delta("b"))
    keeper.take(Done("stop"))
    found = keeper.now()
    assert found.time_to_first_token_s == 1.0 and found.context_part is None and found.accepted is None
    assert found.rate == pytest.approx(4.0)
    keeper.forget()
    assert keeper.now().tokens == 0 and keeper.now().time_to_first_token_s is None


def test_strip_counts_what_survived() -> None:
    kept = Kept("c", tuple(range(10)), (KeptLayer(0, 5, (((0, 2), (8, 2)), ((0, 5),))),))
    assert kept.strip(0, 5) == (1.0, 0.5, 0.25, 0.0, 0.5)
    assert kept.strip(0, 1) == (0.45,)
    assert kept.strip(0, 100) == (1.0, 1.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 0.5)
    assert kept.stretch(4, 5) == (8, 9) and kept.layers[0].rows == 4.5


def test_strip_of_columns_that_do_not_divide_the_tokens() -> None:
    kept = kept_pyramid(401)
    for columns in (1, 7, 60, 200):
        for place in range(len(kept.layers)):
            strip = kept.strip(place, columns)
            assert len(strip) == columns and all(0.0 <= part <= 1.0 for part in strip)
            rows = sum(part * len(kept.stretch(column, columns)) for column, part in enumerate(strip))
            assert rows == pytest.approx(kept.layers[place].rows)


def test_strip_of_nothing() -> None:
    assert Kept("c", (), (KeptLayer(0, 5, ((),)),)).strip(0, 8) == (0.0,)
    assert Kept("c", (), ()).whole
