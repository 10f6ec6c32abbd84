"""Other people's clients against a server over the tests' tiny ChatML model: does each of them just work?

    openai      the official client: chats, completions, embeddings, models, streams, log-probabilities, structured
                output, tools, responses, and errors as its own exceptions
    litellm     as an OpenAI-compatible provider
    langchain   ChatOpenAI and OpenAIEmbeddings
    curl        with a key, over TLS and over a Unix socket

Each needs its packages, best in an environment of its own: pip install openai litellm mcp langchain-openai. Parts whose
packages are missing are left out and told as such. The model's weights are random: what is checked is the form of the
answers. The last line is JSON; the exit code is 1 if a check failed.

usage: python tests/benchmarks/server_clients.py [--json FILE] [PART ...]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server_process import ServerProcess, tiny_chat_model

KEY = "a-key"
ASK: Any = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "count"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "look_up", "description": "Looks a city up.", "parameters": SCHEMA, "strict": True},
}
Checks = Iterator[str]


def openai_checks(url: str) -> Checks:
    """Drive a server with the official client; yields the names of what went well."""
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield from _chats(client)
        yield from _texts(client)
        yield from _structured(client)
        yield from _failures(client)


def _chats(client: Any) -> Checks:
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_completion_tokens=5, temperature=0, seed=1)
    assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens <= 5
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.system_fingerprint
    yield "chat"
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=5, temperature=0, seed=1, stream=True, stream_options=options
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content and chunks[0].choices[0].delta.role == "assistant"
    assert not chunks[-1].choices and chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    yield "chat stream"
    answer = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=4,
        n=3,
        logprobs=True,
        top_logprobs=2,
        stop=["zzz"],
        logit_bias={"5": -100},
    )
    assert len(answer.choices) == 3
    for choice in answer.choices:
        assert choice.logprobs.content[0].bytes and len(choice.logprobs.content[0].top_logprobs) == 2
    yield "choices and logprobs"


def _texts(client: Any) -> Checks:
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    yield "models"
    answer = client.completions.create(model="tiny", prompt=["ab", "cd"], max_tokens=3, echo=True)
    assert [choice.text[:2] for choice in answer.choices] == ["ab", "cd"]
    parts = list(client.completions.create(model="tiny", prompt=[104, 105], max_tokens=3, stream=True))
    assert parts[-1].choices[0].finish_reason
    yield "completions"
    for given in ("one", ["one", "two"], [104, 105], [[104], [105, 106]]):
        answer = client.embeddings.create(model="tiny", input=given)
        floats = client.embeddings.create(model="tiny", input=given, encoding_format="float")
        assert len(answer.data) == len(floats.data) and answer.usage.prompt_tokens > 0
        for one, other in zip(answer.data, floats.data, strict=True):
            assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True)) < 1e-6
    yield "embeddings"


def _structured(client: Any) -> Checks:
    from pydantic import BaseModel, ConfigDict, Field

    class Place(BaseModel):
        model_config = ConfigDict(extra="forbid")
        city: str = Field(max_length=5)
        count: int = Field(ge=0, le=9)

    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(model="tiny", messages=ASK, response_format=form, max_tokens=200)
    assert Place.model_validate_json(answer.choices[0].message.content)
    parsed = client.chat.completions.parse(model="tiny", messages=ASK, response_format=Place, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Place)
    yield "structured output"
    with client.chat.completions.stream(model="tiny", messages=ASK, response_format=Place, max_tokens=200) as stream:
        kinds = {event.type for event in stream}
    assert "content.done" in kinds and isinstance(stream.get_final_completion().choices[0].message.parsed, Place)
    yield "structured output, streamed"
    for choice in ("required", {"type": "function", "function": {"name": "look_up"}}):
        answer = client.chat.completions.create(
            model="tiny", messages=ASK, tools=[TOOL], tool_choice=choice, max_tokens=300, parallel_tool_calls=False
        )
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls" and call.function.name == "look_up" and call.id
        assert Place.model_validate_json(call.function.arguments)
    said = [*ASK, answer.choices[0].message.model_dump(exclude_none=True)]
    said.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    assert client.chat.completions.create(model="tiny", messages=said, tools=[TOOL], max_tokens=4).choices
    arguments = ""
    for chunk in client.chat.completions.create(
        model="tiny", messages=ASK, tools=[TOOL], tool_choice="required", max_tokens=300, stream=True
    ):
        for delta in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            if delta.index == 0:
                arguments += delta.function.arguments or ""
    assert Place.model_validate_json(arguments)
    yield "tools"
    answer = client.responses.create(model="tiny", input="hello", max_output_tokens=5)
    assert answer.output[0].type == "message" and answer.usage.output_tokens <= 5
    kinds = [event.type for event in client.responses.create(model="tiny", input=ASK, max_output_tokens=5, stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    yield "responses"


def _failures(client: Any) -> Checks:
    import openai

    def fails(kind: type[Exception], call: Callable[[], Any]) -> Any:
        try:
            call()
        except kind as error:
            return error
        raise AssertionError(f"no {kind.__name__}")

    create = client.chat.completions.create
    error = fails(openai.BadRequestError, lambda: create(model="tiny", messages=ASK, temperature=9))
    assert error.param == "temperature" and error.code
    error = fails(
        openai.BadRequestError, lambda: create(model="tiny", messages=[{"role": "user", "content": "x" * 9000}])
    )
    assert error.code == "context_length_exceeded"
    fails(openai.NotFoundError, lambda: create(model="gpt-9", messages=ASK))
    wrong = client.with_options(api_key="wrong")
    fails(openai.AuthenticationError, lambda: wrong.models.list())
    yield "errors"


def litellm_checks(url: str) -> Checks:
    """Drive it with LiteLLM."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    common: dict[str, Any] = {"model": "openai/tiny", "api_base": f"{url}/v1", "api_key": KEY}
    answer = litellm.completion(messages=ASK, max_tokens=5, **common)
    assert answer.choices[0].message.content is not None and answer.usage.completion_tokens <= 5
    yield "chat"
    chunks = list(litellm.completion(messages=ASK, max_tokens=5, stream=True, **common))
    assert chunks[-1].choices[0].finish_reason
    yield "chat stream"
    answer = litellm.completion(messages=ASK, tools=[TOOL], tool_choice="required", max_tokens=300, **common)
    assert answer.choices[0].message.tool_calls[0].function.name == "look_up"
    yield "tools"
    answer = litellm.embedding(input=["one", "two"], **common)
    assert len(answer.data) == 2
    yield "embeddings"
    try:
        litellm.completion(messages=ASK, temperature=9, **common)
    except litellm.BadRequestError:
        yield "errors"


def langchain_checks(url: str) -> Checks:
    """Drive it with LangChain."""
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings
    from pydantic import BaseModel, Field

    class Place(BaseModel):
        """A place."""

        city: str = Field(max_length=5)
        count: int = Field(ge=0, le=9)

    chat = ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key=KEY, max_tokens=300, max_retries=0)
    answer = chat.bind(max_tokens=5).invoke("hello")
    assert answer.usage_metadata["output_tokens"] <= 5
    yield "chat"
    assert len(list(chat.bind(max_tokens=5).stream("hello"))) > 1
    yield "chat stream"
    assert isinstance(chat.with_structured_output(Place, method="json_schema").invoke("hello"), Place)
    yield "structured output"
    called = chat.bind_tools([Place], tool_choice="Place").invoke("hello")
    assert called.tool_calls[0]["name"] == "Place"
    yield "tools"
    vectors = OpenAIEmbeddings(
        model="tiny", base_url=f"{url}/v1", api_key=KEY, check_embedding_ctx_length=False
    ).embed_documents(["one", "two"])
    assert len(vectors) == 2
    yield "embeddings"


def curl(*words: object) -> str:
    done = subprocess.run(["curl", "-sS", "-m", "30", *map(str, words)], capture_output=True, text=True, check=True)
    return done.stdout


def curl_checks(url: str) -> Checks:
    """Drive it with curl; TLS and Unix sockets with servers of their own."""
    key, kind = ("-H", f"Authorization: Bearer {KEY}"), ("-H", "Content-Type: application/json")
    assert json.loads(curl(f"{url}/health")) == {"status": "ok"}
    data = json.dumps({"messages": ASK, "max_tokens": 3})
    chat = "/v1/chat/completions"
    assert json.loads(curl(*key, *kind, "-d", data, url + chat))["choices"]
    yield "chat"
    text = curl("-N", *key, *kind, "-d", data[:-1] + ', "stream": true}', url + chat)
    assert text.endswith("data: [DONE]\n\n")
    yield "chat stream"
    assert curl("-o", "/dev/null", "-w", "%{http_code}", *key, "-d", data, url + chat) == "415"
    assert curl("-o", "/dev/null", "-w", "%{http_code}", *kind, "-d", data, url + chat) == "401"
    yield "errors"
    with tempfile.TemporaryDirectory(prefix="zc") as folder:
        model, path = tiny_chat_model(Path(folder)), Path(folder) / "s"
        with ServerProcess(model, "--unix-socket", path, "--ctx", 128, "--threads", 1):
            assert json.loads(curl("--unix-socket", path, *kind, "-d", data, "http://x" + chat))["choices"]
        yield "unix socket"
        if shutil.which("openssl") is None:
            return
        pem, secret = Path(folder) / "cert.pem", Path(folder) / "key.pem"
        words = (
            "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
        )
        subprocess.run([*words.split(), "-keyout", secret, "-out", pem], check=True, capture_output=True)
        tls = ("--tls-certificate", pem, "--tls-key", secret)
        with ServerProcess(model, *tls, "--ctx", 128, "--threads", 1) as server:
            assert json.loads(curl("--cacert", pem, *kind, "-d", data, server.url + chat))["choices"]
        yield "tls"


#: Each with the module that it needs.
PARTS: dict[str, tuple[Callable[[str], Checks], str, str]] = {
    "openai": (openai_checks, "openai", "openai"),
    "litellm": (litellm_checks, "litellm", "litellm"),
    "langchain": (langchain_checks, "langchain_openai", "langchain-openai"),
    "curl": (curl_checks, "json", ""),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_chat_model(Path(folder))
        words = ("--alias", "tiny", "--api-key", KEY, "--public-metrics", "--ctx", 2048, "--threads", 1)
        with ServerProcess(model, *words, "--embeddings", "--pooling", "mean") as server:
            for name in options.parts or PARTS:
                checks, module, package = PARTS[name]
                if importlib.util.find_spec(module) is None:
                    found[name] = {"missing": package}
                    continue
                result = found[name] = {"version": importlib.metadata.version(package) if package else "", "passed": []}
                try:
                    for passed in checks(server.url):
                        result["passed"].append(passed)
                except Exception as error:
                    traceback.print_exc()
                    result["failed"] = f"{type(error).__name__}: {error}"[:500]
                print(name, json.dumps(result), flush=True)
            found["left"] = server.settled()
            found["tracebacks"] = server.log().count('"traceback"')
    found["ok"] = not found["tracebacks"] and not any(
        "failed" in each for each in found.values() if isinstance(each, dict)
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
