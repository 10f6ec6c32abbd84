from __future__ import annotations

from typing import Any

import pytest

from helpers.api import Api
from helpers.fake_engine import FakeEngine
from ziggurat.runtime.server.schemas.completions import Completion

PATH = "/v1/completions"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(lambda request: ["<", request.prompt or str(request.tokens), ">"])


@pytest.fixture
def api(engine: FakeEngine) -> Api:
    return Api(engine)


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def test_a_whole_answer(api: Api, engine: FakeEngine) -> None:
    answer = api.complete("a b", stop="x", user="u")
    Completion.model_validate(answer)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert texts(answer) == ["<a b>"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] == 3 + 3
    request = engine.requests[-1]
    assert (request.max_tokens, request.stop, request.messages) == (16, ("x",), None)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["<a>"]),
        (["a"], ["<a>"]),
        (["a", "b"], ["<a>", "<b>"]),
        ([1, 2], ["<(1, 2)>"]),
        ([[1, 2], [3]], ["<(1, 2)>", "<(3,)>"]),
    ],
)
def test_prompts(api: Api, prompt: Any, expected: list[str]) -> None:
    assert texts(api.complete(prompt)) == expected
    chunks = api.stream_completion(prompt)
    for index, text in enumerate(expected):
        found = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in found) == text
        assert [choice["finish_reason"] for choice in found] == [None] * (len(found) - 1) + ["stop"]


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], ["a", 1], [1, "a"], [1.5], [[1], ["a"]], [["a"]], [-1], [True], {}, 5, None]
)
def test_prompts_that_are_none(api: Api, engine: FakeEngine, prompt: Any) -> None:
    error = api.refused(PATH, {"prompt": prompt})
    assert error["param"] == "prompt"
    assert "list of token ids" in error["message"]
    assert not engine.requests


def test_many_prompts_with_many_choices(api: Api) -> None:
    answer = api.complete(["a", "bcd"], n=2)
    assert texts(answer) == ["<a>", "<a>", "<bcd>", "<bcd>"]
    assert answer["usage"]["prompt_tokens"] == 1 + 3  # each read once
    assert answer["usage"]["completion_tokens"] == 12
    assert all(choice["timings"]["predicted_n"] == 3 for choice in answer["choices"])
    assert "timings" not in answer


def test_a_stream(api: Api) -> None:
    *chunks, usage = api.stream_completion("a", max_tokens=2, stream_options={"include_usage": True})
    for chunk in (*chunks, usage):
        Completion.model_validate(chunk)
    found = [(chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) for chunk in chunks]
    assert found == [("<", None), ("a", None), ("", "length")]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 3


def test_echo(api: Api) -> None:
    assert texts(api.complete(["a", "b"], echo=True)) == ["a<a>", "b<b>"]
    assert texts(api.complete([104, 105], echo=True)) == ["hi<(104, 105)>"]
    chunks = api.stream_completion("a", echo=True)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "<", "a", ">", ""]
    assert api.refused(PATH, {"prompt": [1000], "echo": True})["param"] == "prompt"


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"echo": True, "logprobs": 1}, "echo", "logprobs of a prompt"),
        ({"best_of": 2, "stream": True}, "best_of", "streamed"),
        ({"best_of": 1, "n": 2}, None, "best_of must be at least n"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than"),
        ({"best_of": 0}, "best_of", "greater than"),
        ({"prompt": ["a"] * 2049}, "prompt", "up to 2048"),
        ({"prompt": ["a"] * 17, "n": 128}, "prompt", "2176 texts"),
        ({"grammar": "x"}, "grammar", "grammar"),
    ],
)
def test_what_is_refused(api: Api, fields: dict[str, Any], param: str | None, told: str) -> None:
    error = api.refused(PATH, {"prompt": "a", **fields})
    assert error["param"] == param
    assert told in error["message"]


def test_no_suffix_is_no_suffix(api: Api) -> None:
    assert texts(api.complete("a", suffix=None)) == texts(api.complete("a", suffix="")) == ["<a>"]
