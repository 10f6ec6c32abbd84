"""Long work of a command: in a thread of its own, with progress, and stopped by Ctrl-C and by a polite kill alike."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from ziggurat.runtime.evaluate.monitor import Monitor, Report

T = TypeVar("T")


@contextlib.contextmanager
def kill_as_interrupt() -> Iterator[None]:
    """Let a polite kill remove what is half done, as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # handlers can be set in the main thread only
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def in_thread(work: Callable[[Monitor], T], name: str) -> T:
    """Run the work in a thread, so that Ctrl-C reaches the main one, and abort what it computes then."""
    from ziggurat.runtime.evaluate.monitor import Monitor

    with progress() as report:
        monitor = Monitor(report)
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work(monitor))
            except BaseException as error:
                done.set_exception(error)

        thread = threading.Thread(target=run, name=name)
        thread.start()
        try:
            return done.result()
        finally:
            monitor.stop()
            thread.join()


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """Show a bar with the time left while stderr is a terminal, and nothing otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report
