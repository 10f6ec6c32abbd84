from __future__ import annotations

from dataclasses import fields
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from ziggurat.runtime.engine import EngineStats, SlotStats
from ziggurat.runtime.server.metrics import Metrics

STATS = EngineStats(
    loaded=True,
    running=2,
    queued=3,
    finished=5,
    cancelled=7,
    failed=11,
    refused=13,
    prompt_tokens=1700,
    reused_tokens=1900,
    generated_tokens=2300,
    drafted_tokens=29,
    accepted_tokens=23,
    evicted_rows=31,
    kv_bytes=37,
    kv_bytes_allocated=41,
    kv_bytes_planned=43,
    queue_limit=47,
    prefill_tokens_per_second=53.5,
    decode_tokens_per_second=59.5,
    slots=(
        SlotStats("idle", 4, 8, kv_bytes=61),
        SlotStats("decoding", 9, 16, kv_bytes=6),
        SlotStats("decoding", 9, 1),
    ),
)


class Engine:
    def __init__(self) -> None:
        self.asked = 0

    def stats(self) -> EngineStats:
        self.asked += 1
        return STATS


def read(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {s.name + "".join(sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_the_engines_figures_are_of_the_scrape() -> None:
    engine: Any = Engine()
    metrics = Metrics(engine)
    assert engine.asked == 0
    got = read(metrics)
    assert engine.asked == 1
    expected = {
        "loaded": 1,
        "generations_running": 2,
        "generations_queued": 3,
        "generations_finished_total": 5,
        "generations_cancelled_total": 7,
        "generations_failed_total": 11,
        "generations_refused_total": 13,
        "prompt_tokens_total": 1700,
        "reused_tokens_total": 1900,
        "generated_tokens_total": 2300,
        "drafted_tokens_total": 29,
        "accepted_tokens_total": 23,
        "kv_evicted_rows_total": 31,
        "kv_bytes": 37,
        "kv_bytes_allocated": 41,
        "kv_bytes_planned": 43,
        "queue_limit": 47,
        "prefill_tokens_per_second": 53.5,
        "decode_tokens_per_second": 59.5,
        "kv_rows": 25,
        "kv_bytes_held": 67,
        "slotsidle": 1,
        "slotsdecoding": 2,
        "slotsreading": 0,
    }
    assert {name: got.get(f"ziggurat_{name}") for name in expected} == expected
    # every counter of the engine is told, but for what only one prompt has
    assert len(fields(EngineStats)) - 2 == sum(
        not n.startswith(("slots", "kv_rows", "kv_bytes_held")) for n in expected
    )


def test_two_servers_do_not_share_a_registry() -> None:
    one, other = Metrics(Engine()), Metrics(Engine())  # type: ignore[arg-type]
    one.first_token(1.0)
    assert read(one)["ziggurat_time_to_first_token_seconds_count"] == 1
    assert read(other)["ziggurat_time_to_first_token_seconds_count"] == 0
    assert not [family for family in REGISTRY.collect() if family.name.startswith("ziggurat")]
