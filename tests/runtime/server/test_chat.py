from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.api import Api, deltas
from helpers.fake_engine import INFO, FakeEngine
from ziggurat.runtime.engine import GenerationRequest, Message
from ziggurat.runtime.errors import TemplateError
from ziggurat.runtime.server.schemas.chat import ChatCompletion, ChatCompletionChunk

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def api(engine: FakeEngine) -> Api:
    return Api(engine)


def test_a_whole_answer(api: Api) -> None:
    answer = api.chat()
    ChatCompletion.model_validate(answer)
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "fake")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello world.", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert answer["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    assert answer["timings"]["predicted_n"] == 3


def test_a_stream(api: Api) -> None:
    chunks = api.stream_chat(max_tokens=2)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
        assert "usage" not in chunk
    assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"], chunk["model"]) for chunk in chunks}) == 1
    found = [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks]
    assert found == [
        ({"role": "assistant", "content": "", "refusal": None}, None),
        ({"content": "Hello"}, None),
        ({"content": " world"}, None),
        ({}, "length"),
    ]
    assert chunks[-1]["timings"]["predicted_n"] == 2


def test_usage_of_a_stream_comes_last_and_is_null_before(api: Api) -> None:
    *chunks, last = api.stream_chat(stream_options={"include_usage": True}, n=2)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["prompt_tokens"] == 1  # both choices read the same
    assert "usage" not in api.stream_chat(stream_options={"include_usage": False})[-1]


def test_text_of_every_kind_survives_a_stream() -> None:
    text = ['"', "\\", "\n", "\u2028", "\x00", "é", "🎉", "data: [DONE]\n\n", "@@"]
    assert deltas(Api(FakeEngine(text)).stream_chat()) == "".join(text)


def test_choices_differ_in_their_seeds() -> None:
    engine = FakeEngine(lambda request: [f"seed {request.sampling.seed}"])
    api = Api(engine)
    answer = api.chat(n=3, seed=7)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == ["seed 7", "seed 8", "seed 9"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 3
    assert len({request.id for request in engine.requests}) == 3
    chunks = api.stream_chat(n=2, seed=2**32 - 2)
    assert [deltas(chunks, index) for index in range(2)] == ["seed 4294967294", "seed 0"]
    finished = [each["choices"][0]["index"] for each in chunks if each["choices"][0]["finish_reason"]]
    assert sorted(finished) == [0, 1]
    assert api.chat(n=2)["choices"][0]["message"]["content"] == "seed None"
    assert api.chat(seed=-1) and engine.requests[-1].sampling.seed == 2**32 - 2  # any integer is a seed


def asked(engine: FakeEngine, **fields: Any) -> GenerationRequest:
    Api(engine).chat(**fields)
    return engine.requests[-1]


def test_what_the_engine_is_asked(engine: FakeEngine) -> None:
    request = asked(
        engine,
        max_completion_tokens=5,
        stop=["a", "b"],
        temperature=0,
        top_p=0.5,
        seed=3,
        logit_bias={"7": -100, "8": 1.5},
        presence_penalty=1,
        frequency_penalty=-2,
        top_k=5,
        min_p=0.1,
        grammar='root ::= "x"',
        conversation="c",
        reread=True,
        speculate=False,
        user="somebody",
        an_unknown_field={"is": "ignored"},
    )
    sampling = request.sampling
    assert (request.max_tokens, request.stop, request.logprobs) == (5, ("a", "b"), None)
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k) == (0, 0.5, 3, 5)
    assert sampling.logit_bias == {7: -100, 8: 1.5}
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repeat_last_n) == (1, -2, -1)
    assert (sampling.min_p, sampling.grammar) == (0.1, 'root ::= "x"')
    assert (request.conversation, request.reread, request.speculate) == ("c", True, False)


def test_defaults(engine: FakeEngine) -> None:
    request = asked(engine, stop=None, n=None, temperature=None, stream=None)
    assert request.sampling == type(request.sampling)()
    assert (request.stop, request.speculate, request.conversation) == ((), True, None)
    assert request.max_tokens == INFO.n_ctx  # it ends even if the model does not and the cache has a budget


@pytest.mark.parametrize("fields", [{"max_tokens": 4}, {"max_tokens": 4, "max_completion_tokens": 4}])
def test_both_names_of_the_limit(engine: FakeEngine, fields: dict[str, int]) -> None:
    assert asked(engine, **fields).max_tokens == 4


def test_top_p_0_takes_the_likeliest(engine: FakeEngine) -> None:
    sampling = asked(engine, top_p=0).sampling
    assert (sampling.top_k, sampling.top_p) == (1, 1.0)


def test_messages(engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": ""},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": None, "refusal": "no"},
    ]
    Api(engine).good(PATH, {"messages": messages})
    got = engine.requests[-1].messages
    assert got is not None
    assert [(message.role, message.content) for message in got] == [
        ("system", "d"), ("system", ""), ("user", "ab"), ("assistant", "no"),
    ]  # fmt: skip
    assert got[2] == Message("user", "ab", {"name": "Ann"})


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "needs content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "tool_call_id"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1]", "needs content"),
        ({"messages": [USER, {"role": "robot", "content": ""}]}, "messages[1].role", "'system'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string or"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
            "messages[0].content[1].type",
            "image_url parts are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
            "string",
        ),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 1.1}, "top_p", "less than"),
        ({"n": 0}, "n", "greater than"),
        ({"n": 129}, "n", "less than"),
        ({"n": 1.5}, "n", "integer"),
        ({"n": "1"}, "n", "integer"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": []}, "stop", "at least 1"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": ["a", 1]}, "stop[1]", "string"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "greater than"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7", "less than"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"logprobs": 1}, "logprobs", "boolean"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 0}, "max_tokens", "greater than"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens", "contradict"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"min_p": 2}, "min_p", "min-p is 2"),
        ({"mirostat": 3}, "mirostat", "mirostat is 3"),
        ({"grammar": "root = "}, "grammar", "grammar"),
        ({"model": 3}, "model", "string"),
    ],
)
def test_what_is_refused(api: Api, engine: FakeEngine, fields: dict[str, Any], param: str, told: str) -> None:
    error = api.refused(PATH, {"messages": [USER], **fields})
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert told in error["message"]
    assert not engine.requests


def test_numbers_that_are_none_are_refused(api: Api) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        body = f'{{"messages": [{{"role": "user", "content": "a"}}], "temperature": {number}}}'
        response = api.http.post(PATH, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "temperature"


def test_no_messages_is_a_missing_parameter(api: Api) -> None:
    error = api.refused(PATH, {"model": "fake"})
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


def test_a_model_without_a_template() -> None:
    api = Api(FakeEngine(info=replace(INFO, has_chat_template=False)))
    error = api.refused(PATH, {"messages": [USER]})
    assert "/v1/completions" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_template_that_refuses_is_the_clients_fault(stream: bool) -> None:
    class Refuses(FakeEngine):
        def stream(self, request: GenerationRequest) -> Any:
            raise TemplateError("the model's chat template failed: roles must alternate; use --raw to do without")

    error = Api(Refuses()).refused(PATH, {"messages": [USER], "stream": stream})
    assert error["param"] == "messages"
    assert error["message"].endswith("roles must alternate")
