"""Asks the server's endpoints within this process, and takes streams apart."""

from __future__ import annotations

import json
from typing import Any

from starlette.testclient import TestClient

from ziggurat.runtime.engine import Engine
from ziggurat.runtime.server.app import create_app
from ziggurat.runtime.server.settings import ServerSettings


class Api:
    """A client of a server over an engine."""

    def __init__(self, engine: Engine, **settings: Any) -> None:
        self.app = create_app(engine, ServerSettings(**settings))
        self.http = TestClient(self.app, raise_server_exceptions=False)

    def post(self, path: str, body: Any) -> Any:
        return self.http.post(path, json=body)

    def chat(self, content: Any = "hi", **fields: Any) -> dict[str, Any]:
        return self.good("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})

    def complete(self, prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
        return self.good("/v1/completions", {"prompt": prompt, **fields})

    def good(self, path: str, body: Any) -> dict[str, Any]:
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def refused(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """Return the error object of a request that must fail."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        answer = response.json()
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        error: dict[str, Any] = answer["error"]
        return error

    def stream_chat(self, content: Any = "hi", **fields: Any) -> list[dict[str, Any]]:
        messages = [{"role": "user", "content": content}]
        return self.stream("/v1/chat/completions", {"messages": messages, **fields})

    def stream_completion(self, prompt: Any = "hi", **fields: Any) -> list[dict[str, Any]]:
        return self.stream("/v1/completions", {"prompt": prompt, **fields})

    def stream(self, path: str, body: Any) -> list[dict[str, Any]]:
        """Return the chunks of a stream that ends well."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(response.content)
        assert last == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]


def events(stream: bytes) -> list[str]:
    """Return the data of a stream's events; comments are left out."""
    *parts, rest = stream.decode().split("\n\n")
    assert rest == ""
    return [part.removeprefix("data: ") for part in parts if not part.startswith(":")]


def deltas(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """Return the text of a choice of a chat's stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
