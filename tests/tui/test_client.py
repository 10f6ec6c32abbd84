"""The client against scripted servers: this project's and others, and all that can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import pytest

from ziggurat.tui.api import Address, HttpBackend
from ziggurat.tui.backend import (
    BackendError,
    ChatEvent,
    ChatMessage,
    ChatRequest,
    Delta,
    Done,
    Progress,
    Sampling,
    Timings,
    Usage,
)

PROPS = {
    "version": "0.1.0",
    "system_fingerprint": "x",
    "models": ["tiny"],
    "description": "tiny 1M",
    "n_ctx": 4096,
    "n_ctx_train": 8192,
    "kv_bytes": 1000,
    "kv_unsupported": None,
}
SLOTS: dict[str, Any] = {
    "running": 1,
    "queued": 2,
    "prefill_tokens_per_second": 900.0,
    "decode_tokens_per_second": 30.5,
    "kv": {"bytes": 1000, "bytes_planned": 1100},
    "slots": [{"id": 0, "state": "reading", "conversation": "c", "prompt_progress": 0.25}],
}
TIMINGS = {
    "prompt_ms": 50.0,
    "prompt_per_second": 100.0,
    "predicted_per_second": 20.0,
    "queue_ms": 500.0,
    "time_to_first_token_ms": 250.0,
    "draft_n": 4,
    "draft_n_accepted": 3,
    "kv_bytes": 10,
    "kv_bytes_full": 40,
    "evicted_rows": 5,
}
ASK = ChatRequest((ChatMessage("user", "hi"),), conversation="c")
MODELS = {"object": "list", "data": [{"id": "gpt-x", "max_model_len": 777}]}

Answer = Callable[[httpx.Request], httpx.Response]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 10))


def chunk(text: str | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more}


def stream(*events: Any, done: bool = True) -> httpx.Response:
    data = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if done else "")
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=data.encode())


class Script(httpx.AsyncBaseTransport):
    """Answers by path; ``asked`` are the requests."""

    def __init__(self, answers: dict[str, Any], *, ours: bool = True) -> None:
        self.answers = {"/props": PROPS, "/slots": SLOTS} if ours else {"/v1/models": MODELS}
        self.answers |= answers
        self.asked: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.asked.append(request)
        answer = self.answers.get(request.url.path)
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, dict):
            answer = httpx.Response(200, json=answer)
        return answer or httpx.Response(404, json={"detail": "Not Found"})

    def body(self) -> Any:
        return json.loads(self.asked[-1].content)


def backend(script: Script, **more: Any) -> HttpBackend:
    return HttpBackend(Address.parse("http://test:1/v1"), transport=script, **more)


def ask(script: Script, request: ChatRequest = ASK, **more: Any) -> list[ChatEvent]:
    async def work() -> list[ChatEvent]:
        client = backend(script, **more)
        try:
            return [event async for event in client.chat(request)]
        finally:
            await client.close()

    found: list[ChatEvent] = run(work())
    return found


def fails(script: Script) -> BackendError:
    with pytest.raises(BackendError) as raised:
        ask(script)
    return raised.value


def test_answer_of_our_server() -> None:
    end = {
        "choices": [],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
    }
    script = Script(
        {"/v1/chat/completions": stream(chunk(""), chunk("he"), chunk("y"), chunk(None, "stop", timings=TIMINGS), end)}
    )
    assert ask(script, ChatRequest((ChatMessage("user", "hi"),), Sampling(0.5, max_tokens=7), "c", True)) == [
        Delta("hey", 2),
        Done("stop", Usage(9, 2, 4), Timings(0.25, 100.0, 20.0, 0.5, 4, 3, 10, 40, 5)),
    ]
    assert script.body() == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "max_tokens": 7,
        "conversation": "c",
        "reread": True,
    }


def test_other_servers_get_no_extensions_and_the_key() -> None:
    script = Script({"/v1/chat/completions": stream(chunk("x", "length"))}, ours=False)
    assert ask(script, api_key="secret") == [Delta("x"), Done("length")]
    assert script.body()["model"] == "gpt-x" and "conversation" not in script.body()
    assert script.asked[-1].headers["authorization"] == "Bearer secret"


def test_thoughts_are_told_apart() -> None:
    parts = [
        {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]},
        chunk("<think>so"),
        chunk("</think>yes", "stop"),
    ]
    events = ask(Script({"/v1/chat/completions": stream(*parts)}))
    assert events[:-1] == [Delta("hmso", 2, thought=True), Delta("yes")]


def test_end_without_mark_is_an_end_if_there_was_a_reason() -> None:
    assert ask(Script({"/v1/chat/completions": stream(chunk("x", "stop"), done=False)}))[-1] == Done("stop")


def test_mark_without_reason_is_an_end() -> None:
    assert ask(Script({"/v1/chat/completions": stream(chunk("x"))}))[-1] == Done("stop")


def test_stream_that_breaks_off() -> None:
    error = fails(Script({"/v1/chat/completions": stream(chunk("x"), done=False)}))
    assert error.kind == "lost" and "middle" in error.message


def test_error_in_the_middle_of_a_stream() -> None:
    told = {"error": {"message": "the engine failed", "type": "server_error", "code": "engine_error", "param": None}}
    error = fails(Script({"/v1/chat/completions": stream(chunk("x"), told)}))
    assert error.message == "the engine failed" and error.kind == "failed"


@pytest.mark.parametrize("bad", ["nonsense", "[1]"])
def test_stream_of_something_else(bad: str) -> None:
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=f"data: {bad}\n\n".encode())
    assert fails(Script({"/v1/chat/completions": response})).kind == "nonsense"


def test_page_instead_of_a_stream() -> None:
    error = fails(Script({"/v1/chat/completions": httpx.Response(200, html="<html>")}))
    assert error.kind == "nonsense" and "text/html" in error.message


@pytest.mark.parametrize(
    ("status", "body", "kind", "retryable", "says"),
    [
        (
            400,
            {"error": {"message": "9 tokens", "code": "context_length_exceeded"}},
            "too_long",
            False,
            "/new",
        ),
        (400, {"error": {"message": "This model's maximum context length is 9"}}, "too_long", False, "9"),
        (400, {"error": {"message": "temperature: too large"}}, "refused", False, "temperature"),
        (400, {"error": {"message": "the model has no chat template: x"}}, "refused", False, "run --raw): choose"),
        (401, {"error": {"message": "wrong key"}}, "key", False, "ZIGGURAT_API_KEY"),
        (404, {"error": {"message": "no model x", "code": "model_not_found"}}, "refused", False, "/model"),
        (404, None, "nonsense", False, "address"),
        (429, {"error": {"message": "64 requests are waiting", "code": "queue_full"}}, "busy", True, "later"),
        (500, {"error": "oops\n\x1b[31m"}, "failed", False, "oops"),
        (502, None, "lost", True, "Bad Gateway"),
        (503, {"error": {"message": "the model is being loaded", "code": "model_loading"}}, "loading", True, "wait"),
        (503, {"error": {"message": "closing", "code": "server_closing"}}, "lost", True, "again"),
    ],
)
def test_refusals(status: int, body: Any, kind: str, retryable: bool, says: str) -> None:
    response = httpx.Response(status, headers={"retry-after": "3"}, **({"json": body} if body else {"text": "<html>"}))
    error = fails(Script({"/v1/chat/completions": response}))
    assert (error.kind, error.retryable, error.retry_after_s) == (kind, retryable, 3.0) or kind == "nonsense"
    assert error.kind == kind and says in str(error)
    assert "\n" not in str(error) and "\x1b" not in str(error)


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (httpx.ConnectError("refused"), "nobody answers at http://test:1/v1"),
        (httpx.ConnectTimeout("slow"), "does not answer"),
        (httpx.ReadTimeout("slow"), "silent"),
        (httpx.RemoteProtocolError("cut"), "broke off"),
    ],
)
def test_lost_server(raised: Exception, says: str) -> None:
    error = fails(Script({"/v1/chat/completions": raised}))
    assert error.kind == "lost" and error.retryable and says in error.message


def test_untrusted_certificate() -> None:
    error = fails(Script({"/v1/chat/completions": httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] x")}))
    assert error.kind == "refused" and "certificate" in error.message


def test_fields_that_a_server_does_not_know() -> None:
    answers = [
        httpx.Response(400, json={"error": {"message": "unknown field stream_options"}}),
        httpx.Response(400, json={"error": {"message": "use 'max_completion_tokens' instead"}}),
        stream(chunk("x", "stop")),
    ]
    script = Script({"/v1/chat/completions": answers}, ours=False)
    assert ask(script, ChatRequest(ASK.messages, Sampling(max_tokens=5)))[0] == Delta("x")
    assert script.body()["max_completion_tokens"] == 5 and "stream_options" not in script.body()


class Slow(httpx.AsyncByteStream):
    """A body that ends only when it is closed."""

    def __init__(self, first: bytes) -> None:
        self.first, self.closed = first, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.first:
            yield self.first
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.closed = True


def slow(first: bytes) -> tuple[Slow, httpx.Response]:
    body = Slow(first)
    return body, httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=body)


def test_stop_closes_the_connection_at_once() -> None:
    body, response = slow(f"data: {json.dumps(chunk('x'))}\n\n".encode())

    async def work() -> list[ChatEvent]:
        client, events = backend(Script({"/v1/chat/completions": response})), []
        async for event in client.chat(ASK):
            events.append(event)
            await client.stop()
        assert body.closed
        await client.stop()
        await client.close()
        return events

    assert run(work()) == [Delta("x"), Done("cancelled")]


def test_stop_before_the_request_went_out() -> None:
    async def work() -> list[ChatEvent]:
        client = backend(Script({"/v1/chat/completions": slow(b"")[1]}))
        answer = client.chat(ASK)
        first = asyncio.ensure_future(answer.__anext__())
        await asyncio.sleep(0)
        await client.stop()
        found = [await first]
        await answer.aclose()
        await client.close()
        return found

    assert run(work()) == [Done("cancelled")]


def test_closing_the_answer_closes_the_connection() -> None:
    body, response = slow(f"data: {json.dumps(chunk('x'))}\n\n".encode())

    async def work() -> None:
        client = backend(Script({"/v1/chat/completions": response}))
        answer = client.chat(ASK)
        assert await answer.__anext__() == Delta("x")
        await answer.aclose()
        assert body.closed
        await client.close()

    run(work())


def test_progress_while_the_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ziggurat.tui.api.client._PROGRESS_S", 0.001)
    body, response = slow(b"")

    async def work() -> None:
        client = backend(Script({"/v1/chat/completions": response}))
        async for event in client.chat(ASK):
            assert event == Progress(0.25, 900.0)
            break
        await client.close()

    run(work())


def test_status_of_our_server() -> None:
    async def work() -> None:
        client = backend(Script({}))
        status = await client.status()
        assert (status.model, status.ours, status.n_ctx, status.n_ctx_train) == ("tiny", True, 4096, 8192)
        assert (status.kv_bytes, status.kv_bytes_planned, status.queued) == (1000, 1100, 2)
        assert (status.prompt_progress, status.decode_tokens_per_second) == (0.25, 30.5)
        await client.close()

    run(work())


def test_status_of_another_server() -> None:
    async def work() -> None:
        client = backend(Script({}, ours=False))
        status = await client.status()
        assert (status.model, status.ours, status.n_ctx) == ("gpt-x", False, 777)
        assert await client.models() == ("gpt-x",)
        assert await client.kept("c") is await client.count("x") is await client.text([1]) is None
        assert not await client.save("c") and not await client.restore("c")
        await client.close()

    run(work())


def test_status_after_the_server_came_back_with_another_model() -> None:
    async def work() -> None:
        script = Script({"/slots": [SLOTS, httpx.ConnectError("gone"), SLOTS]})
        client = backend(script)
        await client.status()
        with pytest.raises(BackendError):
            await client.status()
        script.answers["/props"] = PROPS | {"models": ["other"]}
        assert (await client.status()).model == "other"
        await client.close()

    run(work())


KEPT = {
    "conversation": "a/b",
    "budgets": [4, 2],
    "tokens": [5, 6, 7, 8],
    "layers": [{"layer": 0, "heads": [[[0, 4]]]}, {"layer": 1, "heads": [[[0, 1], [3, 1]]]}],
}


def test_kept_rows() -> None:
    async def work() -> None:
        client = backend(Script({"/v1/kv/a/b": KEPT}))
        kept = await client.kept("a/b")
        assert kept is not None and kept.tokens == (5, 6, 7, 8)
        assert [(layer.budget, layer.rows) for layer in kept.layers] == [(4, 4.0), (2, 2.0)]
        assert kept.strip(1, 4) == (1.0, 0.0, 0.0, 1.0)
        await client.close()

    run(work())


def test_kept_rows_layer_by_layer_when_they_are_too_many() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        layer = request.url.params.get("layers")
        if layer is None:
            return httpx.Response(400, json={"error": {"message": "too much for one answer"}})
        return httpx.Response(200, json=KEPT | {"layers": [KEPT["layers"][int(layer)]]})  # type: ignore[index]

    async def work() -> None:
        client = backend(Script({"/v1/kv/c": answer}))
        kept = await client.kept("c")
        assert kept is not None and [layer.layer for layer in kept.layers] == [0, 1]
        await client.close()

    run(work())


def test_no_rows_of_a_conversation_that_is_gone() -> None:
    gone = httpx.Response(404, json={"error": {"message": "none", "code": "conversation_not_found"}})

    async def work() -> None:
        client = backend(Script({"/v1/kv/c": lambda _request: gone}))
        assert await client.kept("c") is None
        await client.close()

    run(work())


def test_tokens_and_their_text() -> None:
    async def work() -> None:
        client = backend(Script({"/tokenize": {"tokens": [1, 2, 3]}, "/detokenize": {"content": "abc"}}))
        assert await client.count("abc") == 3 and await client.text([1, 2, 3]) == "abc"
        await client.close()

    run(work())


@pytest.mark.parametrize(
    ("text", "api", "root"),
    [
        ("localhost:8080", "http://localhost:8080/v1", "http://localhost:8080"),
        ("http://127.0.0.1:8080/v1/", "http://127.0.0.1:8080/v1", "http://127.0.0.1:8080"),
        ("https://a.example/openai/v1", "https://a.example/openai/v1", "https://a.example/openai"),
        ("http://[::1]:80", "http://[::1]:80/v1", "http://[::1]:80"),
        ("http+unix:///run/z.sock/v1", "http://localhost/v1", "http://localhost"),
    ],
)
def test_addresses(text: str, api: str, root: str) -> None:
    address = Address.parse(text)
    assert (address.api, address.root) == (api, root)


@pytest.mark.parametrize("text", ["", "ftp://x", "http://", "http://u:p@h", "http://h:99999", "http://h?x=1", "a b"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(BackendError):
        Address.parse(text)


def test_rows_are_kept_once_a_stopped_request_has_ended() -> None:
    busy = httpx.Response(404, json={"error": {"message": "conversation 'c' is running a request: save it later"}})
    gone = httpx.Response(404, json={"error": {"message": "no rows of this conversation were kept"}})

    async def work() -> None:
        client = backend(Script({"/v1/kv/c/save": [busy, {"n_tokens": 3}], "/v1/kv/c/restore": gone}))
        assert await client.save("c") and not await client.restore("c")
        await client.close()

    run(work())


def test_every_stop_closes_the_connection_to_a_real_server() -> None:
    closed: list[bool] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if not head.startswith("POST"):
            data = json.dumps(PROPS if "/props" in head else SLOTS).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        event = f"data: {json.dumps(chunk('x'))}\n\n".encode()
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(event)
                await writer.drain()
                await asyncio.sleep(0.0005)
        closed.append(True)
        writer.close()

    async def work() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = HttpBackend(Address.parse(f"http://127.0.0.1:{port}"))
            for place in range(20):
                seen = 0
                async for event in client.chat(ASK):
                    seen += isinstance(event, Delta)
                    if seen == 1 + place:
                        await client.stop()
                    await asyncio.sleep(0.001 * (place % 3))
                while len(closed) <= place:
                    await asyncio.sleep(0.001)
            await client.close()

    run(work())
    assert len(closed) == 20
