"""The collector leaves alone what was there before the screen."""

from __future__ import annotations

import gc

from ziggurat.tui.collector import spare_the_screen


def test_what_is_there_is_not_looked_at_again() -> None:
    threshold, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        spare_the_screen()
        assert gc.get_freeze_count() > frozen
        assert gc.isenabled() and gc.get_threshold()[:2] == threshold[:2] and gc.get_threshold()[2] > threshold[2]
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)
