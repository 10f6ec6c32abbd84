"""A server in OpenAI's form as the chat's backend.

What only this project's server tells is left out with others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from ziggurat.tui.api import told
from ziggurat.tui.api.address import Address
from ziggurat.tui.api.chunks import ChatChunks
from ziggurat.tui.api.connection import Connection
from ziggurat.tui.api.errors import not_a_chat
from ziggurat.tui.backend import BackendError, ChatEvent, ChatRequest, Delta, Done, Loading, Progress, Status
from ziggurat.tui.kept import Kept

# a server of ours sends a comment every 15 s; of others nothing is known, and prompts may take long to read
_SILENCE_S = 60.0
_PROGRESS_S = 0.2
_TRIES, _AGAIN_S = 20, 0.1


class HttpBackend:
    """Satisfies ``Backend``. ``model`` is the name to ask for, None for the first one that the server tells.

    ``transport`` stands for the network in tests; ``log`` names a file in which a server of this machine says more.
    """

    def __init__(
        self,
        address: Address,
        *,
        api_key: str | None = None,
        model: str | None = None,
        log: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.address = address
        self._model = model
        self._server = Connection(address, api_key=api_key, log=log, transport=transport)
        self._static: Status | None = None
        self._reader: asyncio.Task[None] | None = None
        self._events = asyncio.Queue[ChatEvent | BackendError]()
        self._answered = False

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Answer; see ``Backend``."""
        events = self._events = asyncio.Queue[ChatEvent | BackendError]()
        reader = self._reader = asyncio.create_task(self._read(request, events))
        watcher = asyncio.create_task(self._watch(request, events))
        self._answered = False
        held: ChatEvent | BackendError | None = None
        try:
            while True:
                event, held = _joined(held or await events.get(), events)
                if isinstance(event, BackendError):
                    raise event
                if isinstance(event, Progress) and self._answered:
                    continue  # asked before the first text, answered after it
                self._answered = not isinstance(event, Progress)
                yield event
                if isinstance(event, Done):
                    return
        finally:
            # once only: a second cancellation would end the closing of the connection half-way
            reader.cancel()
            watcher.cancel()
            await asyncio.wait([reader, watcher])

    async def stop(self) -> None:
        """End the running answer; see ``Backend``."""
        if self._reader is not None and not self._reader.done():
            self._events.put_nowait(Done("cancelled"))

    async def status(self) -> Status:
        """Tell what is served; see ``Backend``."""
        static = await self._describe()
        if not static.ours:
            return static
        try:
            return told.with_slots(static, await self._server.get("/slots"))
        except BackendError:
            self._static = None  # another server may be there next time
            raise

    async def models(self) -> tuple[str, ...]:
        """Return the names that the server answers to."""
        return told.model_names(await self._server.get_api("/models"))

    async def kept(self, conversation: str) -> Kept | None:
        """Tell which rows of a conversation are held; see ``Backend``."""
        if not (await self._describe()).ours:
            return None
        path = f"/v1/kv/{quote(conversation, safe='')}"
        try:
            try:
                return told.kept_of(await self._server.get(path, {"tokens": "true"}))
            except BackendError as error:
                if error.kind != "refused":
                    raise
            # too much for one answer, or the conversation is not there
            first = await self._server.get(path, {"tokens": "true", "layers": "0"})
            others = [
                await self._server.get(path, {"layers": str(layer)})
                for layer in range(1, len(first.get("budgets", ())))
            ]
            return told.kept_of(first, others)
        except BackendError as error:
            if error.kind == "refused":
                return None
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise not_a_chat(self.address, f"rows of {error!r}") from None

    async def text(self, tokens: Sequence[int]) -> str | None:
        """Return the text of tokens; see ``Backend``."""
        if not (await self._describe()).ours:
            return None
        content = (await self._server.post("/detokenize", {"tokens": list(tokens)})).get("content")
        return content if isinstance(content, str) else None

    async def count(self, text: str) -> int | None:
        """Return the number of tokens of a text; see ``Backend``."""
        if not (await self._describe()).ours:
            return None
        tokens = (await self._server.post("/tokenize", {"content": text, "parse_special": False})).get("tokens")
        return len(tokens) if isinstance(tokens, list) else None

    async def save(self, conversation: str) -> bool:
        """Keep a conversation's rows; see ``Backend``."""
        return await self._state(conversation, "save")

    async def restore(self, conversation: str) -> bool:
        """Take up rows that were kept; see ``Backend``."""
        return await self._state(conversation, "restore")

    async def close(self) -> None:
        """End the running answer and all connections."""
        await self.stop()
        await self._server.close()

    async def loading(self) -> Loading | None:
        """Ask how far a server is that loads its model; None when it takes requests. Raises BackendError."""
        try:
            await self._server.get("/health")
        except BackendError as error:
            if error.kind != "loading":
                raise
            if error.load_progress is not None and error.load_progress >= 1:
                return Loading("making its caches")
            return Loading("reading its weights", error.load_progress or None)
        return None

    async def _state(self, conversation: str, what: str) -> bool:
        if not (await self._describe()).ours:
            return False
        path = f"/v1/kv/{quote(conversation, safe='')}/{what}"
        for left in reversed(range(_TRIES)):
            try:
                await self._server.post(path, {})
                return True
            except BackendError as error:
                if error.kind not in ("refused", "nonsense"):
                    raise
                if "running a request" not in error.message or not left:
                    return False
            await asyncio.sleep(_AGAIN_S)  # one that was just stopped ends with its next token
        return False

    async def _describe(self) -> Status:
        """Return what does not change while the server runs."""
        if self._static is None:
            props = await self._if_there(self._server.get("/props"))
            models = {} if told.is_ours(props) else await self._if_there(self._server.get_api("/models"))
            self._static = told.status_of(props, models, self._model)
        return self._static

    async def _if_there(self, answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        """Return an answer, nothing from a server that does not have it."""
        try:
            return await answer
        except BackendError as error:
            if error.kind not in ("refused", "nonsense", "failed"):
                raise
            return {}

    async def _read(self, request: ChatRequest, events: asyncio.Queue[ChatEvent | BackendError]) -> None:
        try:
            static = await self._describe()
            async for event in self._stream(told.chat_body(request, static), ours=static.ours):
                events.put_nowait(event)
        except BackendError as error:
            if error.kind == "lost":
                self._static = None  # another server may be there next time
            events.put_nowait(error)
        except Exception as error:
            events.put_nowait(not_a_chat(self.address, f"{type(error).__name__}: {error}"))

    async def _stream(self, body: dict[str, Any], *, ours: bool) -> AsyncIterator[ChatEvent]:
        """Ask, and once more without a field that the server turns out not to know."""
        while True:
            chunks = ChatChunks()
            silence = _SILENCE_S if ours else None
            try:
                async with contextlib.aclosing(
                    self._server.stream("/chat/completions", body, silence=silence)
                ) as answers:
                    async for chunk in answers:
                        for delta in chunks.take(chunk):
                            yield delta
            except BackendError as error:
                if told.adapted(body, error):
                    continue
                if chunks.reason is None or error.kind != "lost":  # else the answer is whole, whatever happened then
                    raise
            for delta in chunks.rest():
                yield delta
            yield chunks.done()
            return

    async def _watch(self, request: ChatRequest, events: asyncio.Queue[ChatEvent | BackendError]) -> None:
        """Tell how much of the prompt was read, as far as the server says."""
        with contextlib.suppress(BackendError):
            if request.conversation is None or not (await self._describe()).ours:
                return
            while True:
                await asyncio.sleep(_PROGRESS_S)
                if self._answered:
                    return
                progress = told.progress_of(await self._server.get("/slots"), request.conversation)
                if progress is not None:
                    events.put_nowait(progress)


def _joined(
    event: ChatEvent | BackendError, events: asyncio.Queue[ChatEvent | BackendError]
) -> tuple[ChatEvent | BackendError, ChatEvent | BackendError | None]:
    """Return an event, with all text that came since nobody looked as one delta, and the event taken after that."""
    while isinstance(event, Delta) and not events.empty():
        following = events.get_nowait()
        if not isinstance(following, Delta) or following.thought != event.thought:
            return event, following
        event = Delta(event.text + following.text, event.tokens + following.tokens, event.thought)
    return event, None
