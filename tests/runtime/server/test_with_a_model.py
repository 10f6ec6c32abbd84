"""What only a real engine can tell."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from helpers.api import Api, deltas
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def engine(chat_path: Path) -> Iterator[LlamaEngine]:
    with LlamaEngine(chat_path, EngineSettings(n_ctx=256, threads=1, parallel=2)) as engine:
        yield engine


@pytest.fixture(scope="module")
def api(engine: LlamaEngine) -> Api:
    return Api(engine)


def test_logprobs_of_a_chat(api: Api) -> None:
    asked = {"logprobs": True, "top_logprobs": 3, "max_tokens": 8, "seed": 1}
    (choice,) = api.chat(**asked)["choices"]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == 8
    assert (
        bytes(byte for token in tokens for byte in token["bytes"]).decode(errors="replace")
        == (choice["message"]["content"])
    )
    for token in tokens:
        top = [entry["logprob"] for entry in token["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert token["logprob"] <= top[0] and sum(map(math.exp, top)) <= 1 + 1e-6
    chunks = api.stream_chat(**asked)
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert [token["bytes"] for token in streamed] == [token["bytes"] for token in tokens]
    # not equal: the prompt's rows are still there, and only its last token is computed again
    for ours, theirs in zip(streamed, tokens, strict=True):
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
    assert deltas(chunks) == choice["message"]["content"]


def test_logprobs_without_alternatives(api: Api) -> None:
    (choice,) = api.chat(logprobs=True, max_tokens=2)["choices"]
    assert [token["top_logprobs"] for token in choice["logprobs"]["content"]] == [[], []]
    assert api.complete(logprobs=0, max_tokens=2)["choices"][0]["logprobs"]["top_logprobs"] is None


def test_logprobs_of_a_text(api: Api) -> None:
    asked = {"logprobs": 2, "max_tokens": 6, "temperature": 0}
    (choice,) = api.complete("hello", **asked)["choices"]
    told = choice["logprobs"]
    assert {len(entries) for entries in told.values()} == {6}
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[token] == logprob == max(top.values())  # greedy
    assert told["text_offset"][0] == 0
    assert told["text_offset"] == sorted(told["text_offset"]) and told["text_offset"][-1] < len(choice["text"])
    chunks = api.stream_completion("hello", **asked)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1]]
    for name in ("tokens", "text_offset"):
        assert [entry for part in parts for entry in part[name]] == told[name]


def test_choices_are_those_of_their_seeds(api: Api) -> None:
    several = [choice["text"] for choice in api.complete(n=3, seed=5, max_tokens=8)["choices"]]
    assert several == [api.complete(seed=seed, max_tokens=8)["choices"][0]["text"] for seed in (5, 6, 7)]
    assert len(set(several)) == 3


def test_the_best_of_several(api: Api) -> None:
    def mean(choice: dict[str, Any]) -> float:
        scores = choice["logprobs"]["token_logprobs"]
        return float(sum(scores) / len(scores))

    every = api.complete(n=4, seed=5, max_tokens=8, logprobs=0)["choices"]
    ranked = [choice["text"] for choice in sorted(every, key=mean, reverse=True)]
    answer = api.complete(n=2, best_of=4, seed=5, max_tokens=8)
    assert [choice["text"] for choice in answer["choices"]] == ranked[:2]
    assert answer["choices"][0]["logprobs"] is None  # asked for by nobody
    assert answer["usage"]["completion_tokens"] == 32  # all that were made


def test_biases_and_stops(api: Api, engine: LlamaEngine) -> None:
    (token,) = engine.tokenize("A")
    answer = api.chat(logit_bias={str(token): 100}, max_tokens=5)
    assert answer["choices"][0]["message"]["content"] == "AAAAA"
    assert answer["choices"][0]["finish_reason"] == "length"
    answer = api.chat(logit_bias={str(token): 100}, max_tokens=5, stop="AAA")
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["choices"][0]["finish_reason"] == "stop"
    error = api.refused(TEXT, {"prompt": "a", "logit_bias": {"100000": 1}})
    assert error["param"] == "logit_bias" and "100000" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_ids_that_are_no_tokens_are_refused(api: Api, stream: bool) -> None:
    for prompt in ([1_000_000_000], [[1], [265]]):
        error = api.refused(TEXT, {"prompt": prompt, "stream": stream})
        assert error["param"] == "prompt" and "not in the vocabulary" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_that_are_too_long_are_refused(api: Api, stream: bool) -> None:
    error = api.refused(TEXT, {"prompt": [1] * 300, "stream": stream})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "300" in error["message"] and "256" in error["message"]
    messages = [{"role": "user", "content": "word " * 300}]
    error = api.refused(CHAT, {"messages": messages, "stream": stream})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_without_a_limit_it_ends_where_the_context_does(api: Api) -> None:
    answer = api.chat()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 256 + 1


def test_tokens_that_were_kept_are_told(api: Api) -> None:
    prompt = "a prompt that is read once, and then again with something after it"
    api.complete(prompt, max_tokens=1)
    usage = api.complete(prompt + " more", max_tokens=1)["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_a_client_that_hangs_up_frees_its_sequence(chat_path: Path) -> None:
    with LlamaEngine(chat_path, EngineSettings(n_ctx=4096, threads=1, parallel=1)) as engine:
        api = Api(engine)
        server = uvicorn.Server(uvicorn.Config(api.app, log_config=None, lifespan="off"))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            body = b'{"prompt": "a", "max_tokens": 100000, "stream": true, "ignore_eos": true}'
            head = (
                f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            )
            with socket.create_connection(listener.getsockname()) as client:
                client.sendall(head.encode() + b"\r\n" + body)
                while b'"text"' not in client.recv(65536):
                    pass
            deadline = time.monotonic() + 10
            while engine.stats().running and time.monotonic() < deadline:
                time.sleep(0.01)
            stats = engine.stats()
            assert (stats.running, stats.cancelled, stats.finished) == (0, 1, 0)
            server.should_exit = True
            thread.join()
