"""Bodies that no server should trip over: valid ones, broken in every way that comes to mind."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["\n"],
    "seed": 1,
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"5": -10},
    "stream": False,
    "n": 1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto",
}  # fmt: skip
#: Paths, each with a body that is taken.
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 2, "echo": True, "logprobs": 1, "suffix": None},
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "float"},
    "/v1/responses": {"model": "tiny", "input": "hi", "max_output_tokens": 2},
    "/tokenize": {"content": "hello", "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
_ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 1.5, 1e308, -1e308, 2**31, 2**63, 2**64, 10**400, -(10**400),
    float("nan"), float("inf"), "", " ", "\x00", "x" * 5000, "\ud800", "\udfff\ud800", "é\u202e", "<|im_end|>",
    "<|im_start|>", "{{ x }}", "{% for %}", "../../etc/passwd", "[INST]", [], [[]], [None], [1000000000], [-5], {},
    {"": {}}, {"a": [{}] * 50}, ["a"] * 5000,
    list(range(3000)), {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, {"$ref": "#"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/x", "pattern": "(((((a*)*)*)*)*)*b"}}},
]  # fmt: skip
_RAW = [
    b"", b" ", b"{", b"}", b"[]", b"null", b"0", b'""', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"{}{}", b'{"a":1,}',
    b"'", b"[" * 100_000, b'{"a":' * 50_000,
    b"[" * 500 + b"]" * 500, b'{"n":1e999999}', b'{"n":' + b"9" * 10_000 + b"}",
    b'{"messages":"\\ud800"}', b'{"\x80":1}', b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\"}]}", b"NaN",
    b"-", b"\x00" * 100, b'{"messages":' + b"[]," * 1000,
]  # fmt: skip


def body(chance: random.Random) -> tuple[str, bytes]:
    """Return a path and a body for it."""
    path = chance.choice(list(VALID))
    kind = chance.random()
    if kind < 0.1:
        return path, chance.choice(_RAW)
    if kind < 0.25:
        return path, _torn(_written(VALID[path]), chance)
    given = json.loads(json.dumps(VALID[path]))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        _break(given, chance)
    data = _written(given)
    return path, _torn(data, chance) if kind > 0.95 else data


def _written(value: Any) -> bytes:
    return json.dumps(value).encode()


def _break(given: Any, chance: random.Random) -> None:
    """Change one thing at some depth."""
    place = given
    while True:
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = chance.choice(keys)
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and chance.random() < 0.6:
            place = inner
            continue
        if isinstance(place, dict) and chance.random() < 0.2:
            del place[key]
        elif isinstance(place, dict) and chance.random() < 0.1:
            place[chance.choice(("", "x" * 300, "n", "\x00", "stream"))] = copy.deepcopy(chance.choice(_ODD))
        else:
            place[key] = copy.deepcopy(chance.choice(_ODD))
        return


def _torn(data: bytes, chance: random.Random) -> bytes:
    """Cut, or flip some bytes."""
    if chance.random() < 0.5:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(chance.choice((1, 2, 8))):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)
