from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from helpers.fake_engine import INFO, FakeEngine
from ziggurat.runtime.engine import KeptRows
from ziggurat.runtime.server import native
from ziggurat.runtime.server.app import create_app
from ziggurat.runtime.server.phase import Phase
from ziggurat.runtime.server.settings import ServerSettings


class Client:
    """Asks an application over httpx, each request in an event loop of its own."""

    def __init__(self, engine: FakeEngine, phase: Phase | None = None, **settings: Any) -> None:
        self.app = create_app(engine, ServerSettings(**settings), phase)

    def __call__(self, method: str, path: str, **given: Any) -> httpx.Response:
        import asyncio

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **given)

        return asyncio.run(run())


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(info=replace(INFO, embedding_size=3))


@pytest.fixture
def client(engine: FakeEngine) -> Client:
    return Client(engine)


def test_health_follows_the_phase(engine: FakeEngine) -> None:
    phase = Phase()
    client = Client(engine, phase, api_key=["k"])
    assert client("GET", "/health").json() == {"status": "ok"}
    phase.state = "closing"
    got = client("GET", "/health")
    assert (got.status_code, got.json()["error"]["code"]) == (503, "server_closing") and got.headers["retry-after"]


def test_metrics_are_behind_the_key_unless_public(engine: FakeEngine) -> None:
    assert Client(engine, api_key=["k"])("GET", "/metrics").status_code == 401
    assert Client(engine, api_key=["k"])("GET", "/metrics", headers={"Authorization": "Bearer k"}).status_code == 200
    got = Client(engine, api_key=["k"], public_metrics=True)("GET", "/metrics")
    assert got.status_code == 200 and "\nziggurat_loaded 1.0\n" in got.text
    assert got.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_generations_are_counted(client: Client) -> None:
    assert client("POST", "/v1/completions", json={"prompt": "x", "stream": True, "n": 2}).status_code == 200
    text = client("GET", "/metrics").text
    assert "ziggurat_time_to_first_token_seconds_count 2.0" in text
    assert "ziggurat_inter_token_seconds_count 4.0" in text
    assert 'route="/v1/completions",status="200"} 1.0' in text


def test_what_is_served_and_done(client: Client) -> None:
    props = client("GET", "/props").json()
    assert props["file"] == "fake.gguf" and props["embedding_size"] == 3 and props["n_ctx"] == 4096
    slots = client("GET", "/slots").json()
    assert slots["slots"] == [] and slots["kv"]["bytes"] == 0


def test_tokens_and_back(client: Client) -> None:
    assert client("POST", "/tokenize", json={"content": "hi"}).json() == {"tokens": [104, 105]}
    got = client("POST", "/tokenize", json={"content": "h", "add_special": True, "with_pieces": True}).json()
    assert got == {"tokens": [{"id": 1, "piece": "\x01"}, {"id": 104, "piece": "h"}]}
    assert client("POST", "/detokenize", json={"tokens": [104, 105]}).json() == {"content": "hi"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": [[]]}, None),
        ("/v1/embeddings", {"input": [1, "a"]}, None),
        ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "x", "dimensions": 2}, "dimensions"),
        ("/v1/embeddings", {"input": "x", "dimensions": 0}, "dimensions"),
    ],
)
def test_wrong_bodies_are_refused_by_name(client: Client, path: str, body: Any, param: str | None) -> None:
    got = client("POST", path, json=body)
    assert got.status_code == 400
    if param is not None:
        assert got.json()["error"]["param"] == param


def test_kept_rows_are_told_as_runs(engine: FakeEngine, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    one = np.array([[0, 1, 2, 7, 9, 10], [0, 1, 2, 3, 4, 5]], np.int32)
    none = np.zeros((2, 0), np.int32)
    engine.conversations["a/b c"] = KeptRows(tuple(range(11)), (6, 0), (one, none))
    got = client("GET", "/v1/kv/a/b%20c").json()
    runs = {"layer": 0, "heads": [[[0, 3], [7, 1], [9, 2]], [[0, 6]]]}
    assert got == {
        "object": "kv",
        "conversation": "a/b c",
        "n_tokens": 11,
        "budgets": [6, 0],
        "layers": [runs, {"layer": 1, "heads": [[], []]}],
    }
    got = client("GET", "/v1/kv/a/b%20c?layers=1&tokens=true").json()
    assert [layer["layer"] for layer in got["layers"]] == [1] and got["tokens"] == list(range(11))
    for query, status in (("layers=2", 400), ("layers=x", 400), ("layers=-1", 400), ("tokens=maybe", 400)):
        assert client("GET", f"/v1/kv/a/b%20c?{query}").status_code == status
    monkeypatch.setattr(native, "_MAX_RUNS", 3)
    assert "layers=0,1" in client("GET", "/v1/kv/a/b%20c").json()["error"]["message"]


def test_conversations_without_a_budget_or_unknown(engine: FakeEngine, client: Client) -> None:
    engine.conversations["whole"] = KeptRows((1, 2), (), ())
    got = client("GET", "/v1/kv/whole?layers=3").json()
    assert (got["n_tokens"], got["budgets"], got["layers"]) == (2, [], [])
    got = client("GET", "/v1/kv/nobody")
    assert (got.status_code, got.json()["error"]["code"]) == (404, "conversation_not_found")


@pytest.mark.parametrize("given", ["abcd", ["abcd"], [1, 2, 3, 4], [[1, 2, 3, 4]]])
def test_embeddings_of_texts_and_tokens(client: Client, given: Any) -> None:
    got = client("POST", "/v1/embeddings", json={"input": given, "dimensions": 3}).json()
    assert got == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [4.0, 0.5, -1.25]}],
        "model": "fake",
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }


def test_embeddings_in_base64_and_in_order(client: Client) -> None:
    body = {"input": ["a", "bcd"], "encoding_format": "base64"}
    data = client("POST", "/v1/embeddings", json=body).json()["data"]
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4").tolist() for item in data]
    assert decoded == [[1.0, 0.5, -1.25], [3.0, 0.5, -1.25]] and [item["index"] for item in data] == [0, 1]


def test_a_server_without_embeddings_says_how_to_get_them() -> None:
    got = Client(FakeEngine())("POST", "/v1/embeddings", json={"input": "x"})
    assert got.status_code == 400 and "--embeddings" in got.json()["error"]["message"]


def test_bodies_and_types_are_checked_before_anything(engine: FakeEngine) -> None:
    client = Client(engine, max_body=1024)
    assert client("POST", "/tokenize", json={"content": "x" * 2000}).status_code == 413
    assert client("POST", "/tokenize", data={"content": "x"}).status_code == 415


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "\ud800", "text": "x"}]}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "\ud800", "function": {"name": "f"}}]},
        {"messages": [{"role": "user", "content": "x"}], "model": "\ud800"},
        {"messages": [{"role": "user", "content": "x"}], "logit_bias": {"\ud800": 1}},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "\ud800": {}}]},
        {"messages": [{"role": "\ud800", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "\ud800"}},
        {"messages": [{"role": "user", "content": "x"}], "tool_choice": "\ud800"},
    ],
)
def test_halves_of_characters_are_refused_wherever_they_stand(client: Client, body: Any) -> None:
    content = json.dumps(body).encode()
    got = client("POST", "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert got.status_code in (400, 404) and got.json()["error"]["message"]
