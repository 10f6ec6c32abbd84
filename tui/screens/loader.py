"""Changes the model or its settings: refuses what does not fit with its numbers, shows how the start goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from ziggurat.runtime.sizes import human_bytes
from ziggurat.tui.backend import BackendError, Host, Loading, ModelSetup, Planned
from ziggurat.tui.session import Session
from ziggurat.tui.widgets.banner import Banner
from ziggurat.tui.widgets.sparkline import bar

_logger = logging.getLogger(__name__)

_SAVE_S = 5.0


def describe(planned: Planned) -> str:
    """Return a plan in a line."""
    full = f" of {human_bytes(planned.kv_full)} with every row" if planned.kv_full > planned.kv else ""
    rows = f", rows {planned.rows[0]}…{planned.rows[-1]}" if planned.rows else ""
    return (
        f"KV {human_bytes(planned.kv)}{full}{rows}; in all {human_bytes(planned.total)} of {human_bytes(planned.free)}"
    )


class Loader:
    """Starts models for one session. ``done`` is called when another one answers."""

    def __init__(self, host: Host | None, session: Session, banner: Banner, done: Callable[[], None]) -> None:
        self.host = host
        self.current: ModelSetup | None = None
        self._session, self._banner, self._done = session, banner, done
        self._task: asyncio.Task[None] | None = None

    @property
    def loading(self) -> bool:
        """Whether a model is being started."""
        return self._task is not None and not self._task.done()

    def cancel(self) -> bool:
        """End a start; False if there was none."""
        if not self.loading or self._task is None:
            return False
        self._task.cancel()
        return True

    def start(self, setup: ModelSetup) -> None:
        """Start a model, in place of what runs or starts."""
        self.cancel()
        self._task = asyncio.get_running_loop().create_task(self._load(setup))

    def again(self) -> bool:
        """Start the last one again; False if there was none."""
        if self.current is None:
            return False
        self.start(self.current)
        return True

    async def plan(self, setup: ModelSetup) -> Planned:
        """Tell what a setup takes. Raises BackendError."""
        assert self.host is not None
        return await self.host.plan(setup)

    async def _load(self, setup: ModelSetup) -> None:
        assert self.host is not None
        name, started = setup.path.name, time.monotonic()
        try:
            self._tell(name, Loading("planning its memory"))
            planned = await self.host.plan(setup)
            if planned.shortage is not None:
                self._banner.say(f"{name} is not loaded: {planned.shortage}", "error", "loading")
                return
            await self._session.stop()
            await self._save_rows()
            self._session.backend = None
            self.current = setup
            about = f"{name} ({human_bytes(planned.total)} in all)"
            backend = await self.host.load(
                setup, lambda loading: self._tell(about, loading, f" · {time.monotonic() - started:.0f} s")
            )
            self._session.backend = backend
            self._banner.clear("loading", "error")
            self._done()
        except asyncio.CancelledError:
            self._banner.say(f"loading {name} was cancelled: F3 chooses a model", "notice", "loading")
            raise
        except BackendError as error:
            self._banner.say(f"{error}\nCtrl+R tries again, F3 chooses another model", "error", "loading")
        except Exception as error:
            _logger.exception("loading %s failed", name)
            self._banner.say(f"loading {name} failed ({error}): the log says where", "error", "loading")

    async def _save_rows(self) -> None:
        """Have the rows kept for when the same model comes back; what that fails for is no reason not to go on."""
        backend, conversation = self._session.backend, self._session.conversation
        if backend is not None and conversation.messages:
            with contextlib.suppress(BackendError, asyncio.TimeoutError):
                await asyncio.wait_for(backend.save(conversation.id), _SAVE_S)

    def _tell(self, about: str, loading: Loading, since: str = "") -> None:
        part = f" {bar(loading.fraction, 20)} {loading.fraction:.0%}" if loading.fraction is not None else ""
        self._banner.say(f"{about}: {loading.message}{part}{since}   Esc cancels", "progress", "loading")


def with_budget(setup: ModelSetup, budget: str, policy: str) -> ModelSetup:
    """Return a setup with another budget; an empty one keeps every row."""
    return replace(setup, kv_budget=budget or None, kv_policy=policy or None if budget else None)
