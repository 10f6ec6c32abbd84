from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.asgi import ask
from helpers.fake_engine import FakeEngine
from ziggurat.runtime.server.app import create_app
from ziggurat.runtime.server.docs import page
from ziggurat.runtime.server.openapi import operations
from ziggurat.runtime.server.settings import ServerSettings


def document(**settings: Any) -> dict[str, Any]:
    return create_app(FakeEngine(), ServerSettings(**settings)).openapi()


def test_errors_are_told_as_they_are() -> None:
    found = document()
    text = json.dumps(found)
    assert "HTTPValidationError" not in text and '"422"' not in text
    for path, method, operation in operations(found):
        errors = {status: each for status, each in operation["responses"].items() if status >= "400"}
        assert "503" in errors and "security" not in operation
        for each in errors.values():
            assert each["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
        if method == "post":
            assert {"400", "408", "413", "415"} <= set(errors), path
    chat = found["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "Retry-After" in chat["429"]["headers"] and "text/event-stream" in chat["200"]["content"]


def test_every_reference_leads_somewhere() -> None:
    found = document()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                assert value["$ref"].rsplit("/", 1)[-1] in found["components"]["schemas"]
            list(map(look, value.values()))
        elif isinstance(value, list):
            list(map(look, value))

    look(found)


def test_keys_and_who_needs_none() -> None:
    found = document(api_key=["k"])
    assert found["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    free = {path for path, _, operation in operations(found) if "security" not in operation}
    assert free == {"/health"}
    assert "401" in found["paths"]["/metrics"]["get"]["responses"]
    found = document(api_key=["k"], public_metrics=True)
    assert "security" not in found["paths"]["/metrics"]["get"]


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
def test_examples_are_taken(path: str) -> None:
    app = create_app(FakeEngine())
    body = app.openapi()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
    headers = [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
    assert ask(app, "POST", path, headers, [json.dumps(body).encode()]).status == 200


def test_the_page_shows_all_of_it_and_loads_nothing() -> None:
    app = create_app(FakeEngine())
    got = ask(app, path="/docs")
    text = got.body.decode()
    assert got.status == 200 and "src=" not in text and "://" not in text.replace("http://127.0.0.1:8080", "")
    for path, method, _ in operations(app.openapi()):
        assert f"{method.upper()} {path}" in text
    found = document()
    found["info"]["title"] = "<script>"
    assert "<script>" not in page(found)
