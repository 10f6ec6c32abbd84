"""What servers tell of themselves, and how they are asked: JSON on one side, the chat's types on the other.

A server of this project is known by its ``/props``. Of others only what OpenAI's API has is used, and the size of the
context where llama.cpp's server, vLLM and LM Studio tell it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ziggurat.tui.backend import BackendError, ChatRequest, Progress, Status
from ziggurat.tui.kept import Kept, KeptLayer

_OURS = {"version", "system_fingerprint", "models", "kv_bytes", "n_ctx"}
_CONTEXTS = ("n_ctx", "max_model_len", "loaded_context_length", "max_context_length", "context_length")


def is_ours(props: Mapping[str, Any]) -> bool:
    """Whether ``/props`` are those of this project's server."""
    return props.keys() >= _OURS


def status_of(props: Mapping[str, Any], models: Mapping[str, Any], model: str | None) -> Status:
    """Return what is served, from ``/props`` (empty where there is none) and ``/v1/models``."""
    if is_ours(props):
        names = [name for name in props["models"] if isinstance(name, str)]
        return Status(
            model=model or (names[0] if names else ""),
            ours=True,
            description=_text(props, "description"),
            n_ctx=_count(props, "n_ctx") or None,
            n_ctx_train=_count(props, "n_ctx_train") or None,
            kv_bytes=_count(props, "kv_bytes"),
            kv_refused=_text(props, "kv_unsupported") or None,
        )
    entries = _entries(models)
    entry = next((each for each in entries if each.get("id") == model), None) if model else None
    entry = entry or (entries[0] if entries else {})
    places = [_map(props, "default_generation_settings"), entry, _map(entry, "meta")]
    n_ctx = next((count for place in places for key in _CONTEXTS if (count := _count(place, key))), None)
    return Status(model=model or _text(entry, "id"), n_ctx=n_ctx)


def with_slots(status: Status, slots: Mapping[str, Any]) -> Status:
    """Return a status with what ``/slots`` says."""
    kv = _map(slots, "kv")
    reading = [slot for slot in _slots(slots) if slot.get("state") == "reading"]
    return replace(
        status,
        kv_bytes=_count(kv, "bytes") or status.kv_bytes,
        kv_bytes_planned=_count(kv, "bytes_planned"),
        prompt_progress=_number(reading[0], "prompt_progress") if reading else None,
        prefill_tokens_per_second=_number(slots, "prefill_tokens_per_second"),
        decode_tokens_per_second=_number(slots, "decode_tokens_per_second"),
        running=_count(slots, "running"),
        queued=_count(slots, "queued"),
    )


def progress_of(slots: Mapping[str, Any], conversation: str) -> Progress | None:
    """Return how much of a conversation's prompt was read, None while it is not read."""
    for slot in _slots(slots):
        if slot.get("conversation") == conversation and slot.get("state") == "reading":
            return Progress(_number(slot, "prompt_progress"), _number(slots, "prefill_tokens_per_second"))
    return None


def model_names(models: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names in ``/v1/models``."""
    return tuple(name for entry in _entries(models) if (name := _text(entry, "id")))


def kept_of(first: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> Kept:
    """Return the rows of a conversation: ``first`` has the tokens, and ``others`` further layers."""
    budgets = first.get("budgets") or ()
    layers = [layer for answer in (first, *others) for layer in answer.get("layers") or ()]
    return Kept(
        conversation=_text(first, "conversation"),
        tokens=tuple(first.get("tokens") or ()),
        layers=tuple(
            KeptLayer(
                layer["layer"],
                budgets[layer["layer"]] if layer["layer"] < len(budgets) else None,
                tuple(tuple((int(start), int(length)) for start, length in runs) for runs in layer["heads"]),
            )
            for layer in layers
        ),
    )


def chat_body(request: ChatRequest, status: Status) -> dict[str, Any]:
    """Return the body of a streamed chat completion."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": status.model,
        "messages": [{"role": message.role, "content": message.content} for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for name in ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"):
        value = getattr(sampling, name)
        if value is not None:
            body[name] = value
    if status.ours:
        if request.conversation is not None:
            body["conversation"] = request.conversation
        if request.reread:
            body["reread"] = True
    return body


def adapted(body: dict[str, Any], error: BackendError) -> bool:
    """Change a body that a server refused to what it may take, if nothing is lost by that; tell whether it was."""
    if error.kind != "refused":
        return False
    if "stream_options" in body and "stream_options" in error.message:
        del body["stream_options"]
        return True
    if "max_tokens" in body and "max_completion_tokens" in error.message:
        body["max_completion_tokens"] = body.pop("max_tokens")
        return True
    return False


def _entries(models: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    data = models.get("data")
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []


def _slots(slots: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = slots.get("slots")
    return [slot for slot in found if isinstance(slot, dict)] if isinstance(found, list) else []


def _map(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    return value if isinstance(value, str) else ""


def _count(data: Mapping[str, Any], key: str) -> int:
    value = data.get(key)
    return value if isinstance(value, int) else 0


def _number(data: Mapping[str, Any], key: str) -> float:
    value = data.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
