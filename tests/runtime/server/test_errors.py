from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

import pytest

from helpers.api import Api, events
from helpers.fake_engine import FakeEngine
from ziggurat.runtime.engine import GenerationRequest
from ziggurat.runtime.errors import (
    ConversationError,
    DecodeError,
    EngineClosedError,
    EngineError,
    PromptTooLongError,
    QueueFullError,
    RequestTimeoutError,
    TokenError,
)

PATH = "/v1/completions"


class Raises(FakeEngine):
    """Raises an error when it is asked, or after two pieces."""

    def __init__(self, error: Exception, *, late: bool = False) -> None:
        def script(_request: GenerationRequest) -> Iterable[str]:
            yield from ("a", "b")
            raise error

        super().__init__(script)
        self._error, self._late = error, late

    def stream(self, request: GenerationRequest) -> Any:
        if not self._late:
            raise self._error
        return super().stream(request)


ERRORS: list[tuple[Exception, int, str, str | None, str]] = [
    (PromptTooLongError(5000, 4096, 8192), 400, "invalid_request_error", "prompt", "context_length_exceeded"),
    (TokenError("token 7 is not there"), 400, "invalid_request_error", "prompt", "invalid_value"),
    (QueueFullError(64, 2.4), 429, "rate_limit_error", None, "queue_full"),
    (RequestTimeoutError("too late"), 504, "server_error", None, "request_timeout"),
    (EngineClosedError("closed"), 503, "server_error", None, "server_closing"),
    (ConversationError("unknown"), 404, "invalid_request_error", "conversation", "conversation_not_found"),
    (DecodeError("no rows", 1), 500, "server_error", None, "engine_error"),
    (EngineError("broken"), 500, "server_error", None, "engine_error"),
    (ValueError("/secret/path"), 500, "server_error", None, "internal_error"),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "param", "code"), ERRORS)
def test_every_error_has_its_status(
    error: Exception, status: int, kind: str, param: str | None, code: str, stream: bool, late: bool
) -> None:
    """Before the stream begins as an HTTP status, in its middle as an event, which ends it."""
    api = Api(Raises(error, late=late))
    response = api.post(PATH, {"prompt": "a", "stream": stream})
    if stream and late:
        assert response.status_code == 200
        *chunks, last = events(response.content)
        assert [json.loads(chunk)["choices"][0]["text"] for chunk in chunks] == ["a", "b"]
        told = json.loads(last)["error"]
    else:
        assert response.status_code == status
        assert response.headers["content-type"] == "application/json"
        told = response.json()["error"]
    assert (told["type"], told["param"], told["code"]) == (kind, param, code)
    assert "secret" not in told["message"]


def test_too_long_a_prompt_is_told_with_both_numbers() -> None:
    message = Api(Raises(PromptTooLongError(5000, 4096))).refused(PATH, {"prompt": "a"})["message"]
    assert "5000" in message and "4096" in message


def test_a_full_queue_says_when_to_come_back() -> None:
    response = Api(Raises(QueueFullError(64, 2.4))).post(PATH, {"prompt": "a"})
    assert response.headers["retry-after"] == "3"


def test_what_was_not_foreseen_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        Api(Raises(ValueError("/secret/path"))).refused(PATH, {"prompt": "a"}, 500)
    assert any(record.exc_info and "secret" in str(record.exc_info[1]) for record in caplog.records)


def test_paths_and_methods() -> None:
    api = Api(FakeEngine())
    error = api.refused("/v1/nothing", {}, 404)
    assert (error["code"], error["type"]) == ("unknown_url", "invalid_request_error")
    response = api.http.get(PATH)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert api.http.post("/v1/models", json={}).headers["allow"] == "GET"


@pytest.mark.parametrize(
    "body",
    [b"{", b'{"prompt": "a"', b"[1,", b"nul", b'"\xff"', b"[" * 100_000, b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}"],
)
def test_bodies_that_are_no_json(body: bytes) -> None:
    api = Api(FakeEngine())
    response = api.http.post(PATH, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", ["null", "[]", "1", '"a"', "{}", '{"prompt": "\\ud800"}', '{"prompt": ["\\udfff"]}'])
def test_bodies_of_another_kind(body: str) -> None:
    api = Api(FakeEngine())
    response = api.http.post(PATH, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]
