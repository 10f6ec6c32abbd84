"""Keeps Python's collector of cyclic garbage from stopping the screen."""

from __future__ import annotations

import gc

#: How many collections of the middle generation there are before a full one; Python's own is 10.
_FULL_AFTER = 100


def spare_the_screen() -> None:
    """Have the collector pass over all objects there are now for good, and look at all others less often.

    Called once the modules are imported: a full collection looks at every object, which takes longer than a key may
    take to the screen (``tests/benchmarks/chat_frames.py``), and finds next to nothing.
    """
    gc.collect()
    gc.freeze()
    first, second, _ = gc.get_threshold()
    gc.set_threshold(first, second, _FULL_AFTER)
