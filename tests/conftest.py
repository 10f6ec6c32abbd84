"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Threads that share products as small as those of the tests mostly wait for each other, which takes all cores; whoever
# needs more asks for them. It is read when torch and numpy are imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How fast an example comes says something of the machine's load, nothing of the code.
settings.register_profile("ziggurat", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ziggurat")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Let the programs under test be interrupted.

    nohup, and a shell that starts a command in the background, make it ignore signals, and all its children inherit
    that. A handler that does nothing keeps the tests themselves going but is not inherited.
    """
    ignored = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda *_: None)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
