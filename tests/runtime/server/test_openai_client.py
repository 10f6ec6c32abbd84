"""The official client against the server in this process: with an engine that says what it is told, and a real one."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from helpers import tiny_models, tool_templates
from helpers.fake_engine import INFO, FakeEngine
from ziggurat.runtime.engine import Engine
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.server.app import create_app

# what the client is made with: versions from 3 on need httpx2
httpx: Any = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")

Result = TypeVar("Result")

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ur"}}\n</tool_call>'
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Ur", "Uruk"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}
FLAT_WEATHER: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
QUESTION: Any = [{"role": "user", "content": "Rain?"}]


def ask(engine: Engine, work: Callable[[AsyncOpenAI], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport) as http:
            client = AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)
            return await work(client)

    return asyncio.run(run())


def saying(text: str) -> FakeEngine:
    pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
    return FakeEngine(pieces, info=replace(INFO, chat_template=tool_templates.HERMES))


class Answer(BaseModel):
    n: int


def test_tools_in_a_stream() -> None:
    async def work(client: AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(
            model="fake", messages=QUESTION, tools=[WEATHER], stream_options={"include_usage": True}
        ) as stream:
            kinds = [event.type async for event in stream]
            return kinds, await stream.get_final_completion()

    kinds, completion = ask(saying("So. " + CALL), work)
    assert "content.delta" in kinds and "tool_calls.function.arguments.delta" in kinds
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.parsed_arguments == {"city": "Ur"} and completion.choices[0].finish_reason == "tool_calls"
    assert completion.usage.completion_tokens > 0


def test_structured_outputs() -> None:
    async def work(client: AsyncOpenAI) -> Any:
        return await client.chat.completions.parse(model="fake", messages=QUESTION, response_format=Answer)

    assert ask(saying('{"n": 3}'), work).choices[0].message.parsed == Answer(n=3)


def test_tool_errors_are_bad_requests() -> None:
    async def work(client: AsyncOpenAI) -> Any:
        await client.chat.completions.create(model="fake", messages=QUESTION, tools=[WEATHER, WEATHER])

    with pytest.raises(openai.BadRequestError, match="two tools") as caught:
        ask(saying(""), work)
    assert caught.value.param == "tools"


def test_a_response_and_its_stream() -> None:
    async def work(client: AsyncOpenAI) -> Any:
        whole = await client.responses.create(model="fake", input="Rain?", tools=[FLAT_WEATHER])
        async with client.responses.stream(model="fake", input="Rain?", tools=[FLAT_WEATHER]) as stream:
            kinds = [event.type async for event in stream]
            return whole, kinds, await stream.get_final_response()

    whole, kinds, streamed = ask(saying("So. " + CALL), work)
    assert whole.output_text == "So." == streamed.output_text
    for response in (whole, streamed):
        assert [item.type for item in response.output] == ["message", "function_call"]
    assert json.loads(streamed.output[1].arguments) == {"city": "Ur"} == json.loads(whole.output[1].arguments)
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.function_call_arguments.done" in kinds and whole.usage.total_tokens > 0


def test_a_response_that_is_parsed() -> None:
    async def work(client: AsyncOpenAI) -> Any:
        return await client.responses.parse(model="fake", input="How many?", text_format=Answer)

    assert ask(saying('{"n": 3}'), work).output_parsed == Answer(n=3)


def test_responses_that_are_not_kept() -> None:
    async def work(client: AsyncOpenAI) -> Any:
        await client.responses.create(model="fake", input="Rain?", previous_response_id="resp_1")

    with pytest.raises(openai.BadRequestError, match="nothing is kept") as caught:
        ask(saying(""), work)
    assert caught.value.param == "previous_response_id"


@pytest.fixture(scope="module", params=["generic", "hermes", "mistral-named"])
def real(request: pytest.FixtureRequest, models: Path) -> Iterator[LlamaEngine]:
    """Random weights behind a template of each kind: no tools, tags in letters, control tokens."""
    shape = tiny_models.Shape(head_dim=32, n_head=2, n_head_kv=1)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]"]
    templates = {"hermes": tool_templates.HERMES, "mistral-named": tool_templates.MISTRAL_NAMED}
    template = templates.get(request.param, tiny_models.CHATML)
    path = models / f"tools-{request.param}.gguf"
    tiny_models.write_model(path, shape, tiny_models.bpe_tokens(special), chat_template=template)
    with LlamaEngine(path, EngineSettings(n_ctx=1024, threads=1)) as engine:
        yield engine


def test_a_forced_call_of_random_weights(real: LlamaEngine) -> None:
    name = Path(real.load().path).stem
    choice: Any = {"type": "function", "function": {"name": "weather"}}

    async def work(client: AsyncOpenAI) -> Any:
        whole = await client.chat.completions.create(
            model=name, messages=QUESTION, tools=[WEATHER], tool_choice=choice, seed=1, max_completion_tokens=300
        )
        async with client.chat.completions.stream(
            model=name, messages=QUESTION, tools=[WEATHER], tool_choice=choice, seed=1, max_completion_tokens=300
        ) as stream:
            streamed = await stream.get_final_completion()
        message = whole.choices[0].message
        result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "dry"}
        after = await client.chat.completions.create(
            model=name, messages=[*QUESTION, message, result], tools=[WEATHER], max_completion_tokens=2
        )
        return whole.choices[0], streamed.choices[0], after.choices[0]

    whole, streamed, after = ask(real, work)
    for answer in (whole, streamed):
        assert answer.finish_reason == "tool_calls" and not answer.message.content
        (call,) = answer.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather" and arguments["city"] in ("Ur", "Uruk") and 1 <= arguments["days"] <= 9
    assert whole.message.tool_calls[0].function.arguments == streamed.message.tool_calls[0].function.arguments
    assert after.finish_reason == "length"


def test_a_format_of_random_weights(real: LlamaEngine) -> None:
    async def work(client: AsyncOpenAI) -> Any:
        return await client.responses.parse(model=Path(real.load().path).stem, input="How many?", text_format=Answer)

    assert isinstance(ask(real, work).output_parsed, Answer)
