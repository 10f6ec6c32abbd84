"""Models of this machine, each served by a process of its own that the chat starts, watches, and ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ziggurat.tui.api import HttpBackend
from ziggurat.tui.backend import BackendError, ChatEvent, ChatRequest, Loading, ModelFile, ModelSetup, Planned, Status
from ziggurat.tui.kept import Kept
from ziggurat.tui.kept_files import KeptFiles
from ziggurat.tui.planning import model_files, plan
from ziggurat.tui.process_memory import gpu_bytes, resident_bytes
from ziggurat.tui.server_process import COMMAND, ServerProcess

_POLL_S = 0.1
# how often the driver is asked, which takes a process
_GPU_S = 5.0


class LocalBackend:
    """Satisfies ``Backend``: a server process, started again with the next request when it has died."""

    def __init__(
        self,
        setup: ModelSetup,
        planned: Planned,
        log: Path,
        command: Sequence[str] = COMMAND,
        kept: KeptFiles | None = None,
    ) -> None:
        self.setup, self.planned = setup, planned
        self._log, self._command, self._kept = log, command, kept
        self._process: ServerProcess | None = None
        self._http: HttpBackend | None = None
        self._closed = False
        self._starting = asyncio.Lock()
        self._gpu, self._gpu_asked = 0, float("-inf")

    @property
    def pid(self) -> int | None:
        """The number of the process, None when there is none."""
        return None if self._process is None or not self._process.alive else self._process.pid

    async def start(self, tell: Callable[[Loading], None] = lambda _loading: None) -> None:
        """Start the process, and wait until it takes requests. Cancelling ends it. Raises BackendError."""
        process = self._process = ServerProcess.start(
            self.setup, self._log, command=self._command, kv_folder=self._kept.folder if self._kept else None
        )
        http = self._http = HttpBackend(process.address, api_key=process.api_key, log=str(self._log))
        try:
            while (loading := await self._loading(process, http)) is not None:
                tell(loading)
                await asyncio.sleep(_POLL_S)
            tell(Loading("ready", 1.0))
        except BaseException:
            await self._end()
            raise

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Answer; see ``Backend``."""
        http = await self._running()
        try:
            async for event in http.chat(request):
                yield event
        except BackendError as error:
            raise await self._explained(error) from None

    async def stop(self) -> None:
        """End the running answer; see ``Backend``."""
        if self._http is not None:
            await self._http.stop()

    async def status(self) -> Status:
        """Tell what is served, with the memory of the process."""
        process, http = self._process, self._http
        if process is None or http is None or not process.alive:
            raise self._death()
        try:
            status = await http.status()
        except BackendError as error:
            raise await self._explained(error) from None
        return replace(
            status,
            kv_bytes_full=self.planned.kv_full,
            n_layer=len(self.planned.rows) or None,
            process_bytes=resident_bytes(process.pid),
            gpu_bytes=await self._gpu_bytes(process.pid),
        )

    async def models(self) -> tuple[str, ...]:
        """Return the names that the server answers to."""
        return await (await self._running()).models()

    async def kept(self, conversation: str) -> Kept | None:
        """Tell which rows of a conversation are held; see ``Backend``. A process that has died holds none."""
        if self.pid is None:
            return None
        return await (await self._running()).kept(conversation)

    async def text(self, tokens: Sequence[int]) -> str | None:
        """Return the text of tokens; see ``Backend``."""
        return await (await self._running()).text(tokens)

    async def count(self, text: str) -> int | None:
        """Return the number of tokens of a text; see ``Backend``."""
        return await (await self._running()).count(text)

    async def save(self, conversation: str) -> bool:
        """Keep a conversation's rows; see ``Backend``. None are left of a process that has died."""
        if self.pid is None:
            return False
        done = await (await self._running()).save(conversation)
        if done and self._kept is not None:
            self._kept.prune()
        return done

    async def restore(self, conversation: str) -> bool:
        """Take up rows that were kept; see ``Backend``."""
        return await (await self._running()).restore(conversation)

    async def close(self) -> None:
        """End the server. Idempotent."""
        self._closed = True
        await self._end()

    async def _running(self) -> HttpBackend:
        """Return the connection to the process, started again if it has died."""
        async with self._starting:
            if self._closed:
                raise BackendError("the model was closed", "open one with /model", kind="refused")
            if self._process is None or not self._process.alive:
                await self._end()
                await self.start()
            assert self._http is not None
            return self._http

    async def _loading(self, process: ServerProcess, http: HttpBackend) -> Loading | None:
        """Ask how far it is; None when it takes requests."""
        if not process.alive:
            raise process.death()
        try:
            return await http.loading()
        except BackendError as error:
            if error.kind == "lost":  # it does not listen yet
                return Loading("starting its process")
            raise

    async def _explained(self, error: BackendError) -> BackendError:
        """Return why a request got lost: the process may have died, which shows a moment later."""
        if error.kind == "lost" and self._process is not None:
            for _ in range(10):
                if not self._process.alive:
                    return self._death()
                await asyncio.sleep(0.02)
        return error

    def _death(self) -> BackendError:
        if self._process is None:
            return BackendError(
                "the model does not run", "open one with /model", kind="lost", retryable=not self._closed
            )
        death = self._process.death()
        death.kind, death.retryable = "lost", not self._closed
        return death

    async def _gpu_bytes(self, pid: int) -> int:
        now = time.monotonic()
        if now - self._gpu_asked > _GPU_S:
            self._gpu_asked = now
            self._gpu = await asyncio.to_thread(gpu_bytes, pid)
        return self._gpu

    async def _end(self) -> None:
        http, process = self._http, self._process
        self._http = None
        if http is not None:
            await http.close()
        if process is not None:
            await process.end()


class LocalHost:
    """Satisfies ``Host``. ``folders`` are looked through for models; ``log`` gets what the servers say.

    ``kept`` is where conversations' rows are kept, None to keep none.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        log: Path,
        *,
        command: Sequence[str] = COMMAND,
        kept: KeptFiles | None = None,
    ) -> None:
        self.folders, self.log = tuple(folders), log
        self._command, self._kept = command, kept
        self._one = asyncio.Lock()
        self._backend: LocalBackend | None = None
        self._setup: ModelSetup | None = None

    async def plan(self, setup: ModelSetup) -> Planned:
        """Tell what a setup takes; see ``Host``."""
        return await plan(setup, freed=self._resident())

    async def load(self, setup: ModelSetup, tell: Callable[[Loading], None]) -> LocalBackend:
        """End what runs and start this instead; see ``Host``."""
        async with self._one:
            tell(Loading("planning its memory"))
            planned = await self.plan(setup)
            if planned.shortage is not None:
                raise BackendError(f"{setup.path.name} {planned.shortage}", kind="refused")
            await self.close()
            backend = self._backend = LocalBackend(setup, planned, self.log, self._command, self._kept)
            self._setup = setup
            await backend.start(tell)
            return backend

    async def models(self) -> tuple[ModelFile, ...]:
        """List the models of the folders; see ``Host``."""
        return await model_files(self.folders, self._setup)

    async def close(self) -> None:
        """End what runs. Idempotent."""
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.close()

    def _resident(self) -> int:
        pid = self._backend.pid if self._backend is not None else None
        return resident_bytes(pid) if pid is not None else 0
