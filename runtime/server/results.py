"""What answers of several endpoints have in common: usage, timings, log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ziggurat.runtime.engine import GenerationStats, TokenEvent
from ziggurat.runtime.logprobs import TokenLogprob, TokenLogprobs


def usage_of(stats: Mapping[int, GenerationStats], per_prompt: int = 1) -> dict[str, Any]:
    """Return the usage of all choices, by their places; ``per_prompt`` in a row share a prompt, which counts once."""
    prompts = [stats[place] for place in sorted(stats) if place % per_prompt == 0]
    read = sum(each.prompt_tokens for each in prompts)
    generated = sum(each.generated_tokens for each in stats.values())
    return {
        "prompt_tokens": read,
        "completion_tokens": generated,
        "total_tokens": read + generated,
        "prompt_tokens_details": {"cached_tokens": sum(each.reused_tokens for each in prompts)},
    }


def timings_of(stats: GenerationStats) -> dict[str, Any]:
    """Return the figures of one choice, under llama.cpp's names where it has them."""
    return {
        "cache_n": stats.reused_tokens,
        "prompt_n": stats.prompt_tokens - stats.reused_tokens,
        "prompt_ms": _ms(stats.prompt_seconds),
        "prompt_per_second": round(stats.prompt_tokens_per_second, 3),
        "predicted_n": stats.generated_tokens,
        "predicted_ms": _ms(stats.decode_seconds),
        "predicted_per_second": round(stats.decode_tokens_per_second, 3),
        "draft_n": stats.drafted_tokens,
        "draft_n_accepted": stats.accepted_tokens,
        "queue_ms": _ms(stats.queue_seconds),
        "time_to_first_token_ms": _ms(stats.time_to_first_token_s),
        "kv_bytes": stats.kv_bytes,
        "kv_bytes_full": stats.kv_bytes_full,
        "evicted_rows": stats.evicted_rows,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def logprob_entry(token: TokenLogprob) -> dict[str, Any]:
    """Return a token as a chat's answer has it."""
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}


def chat_logprob(logprobs: TokenLogprobs) -> dict[str, Any]:
    """Return a chosen token with those in its place."""
    return {**logprob_entry(logprobs.chosen), "top_logprobs": [logprob_entry(token) for token in logprobs.top]}


def completion_logprobs(tokens: Sequence[tuple[TokenEvent, int]], n_top: int) -> dict[str, Any]:
    """Return tokens, each with where its text begins in characters, as a completion's answer has them.

    The likeliest ``n_top`` tokens in a token's place are told by their texts; of tokens with the same text, such as two
    broken characters, the likelier one is. 0 tells none.
    """
    known = [(event.logprobs, offset) for event, offset in tokens if event.logprobs is not None]
    tops: list[dict[str, float]] = []
    for logprobs, _ in known:
        top: dict[str, float] = {}
        for token in logprobs.top:
            top.setdefault(token.text, token.logprob)
        tops.append(top)
    return {
        "tokens": [logprobs.chosen.text for logprobs, _ in known],
        "token_logprobs": [logprobs.chosen.logprob for logprobs, _ in known],
        "top_logprobs": tops if n_top else None,
        "text_offset": [offset for _, offset in known],
    }
