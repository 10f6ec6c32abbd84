"""The engine's counters, read from any thread while its own goes on."""

from __future__ import annotations

from dataclasses import asdict

from ziggurat.runtime.engine.protocol import EngineStats, SlotStats
from ziggurat.runtime.engine.slots import Slot
from ziggurat.runtime.engine.worker import Worker


def engine_stats(worker: Worker) -> EngineStats:
    """Put the counters together. Nothing is locked: figures of one moment may be of two neighbouring steps."""
    scheduler, inbox = worker.scheduler, worker.inbox
    running = list(scheduler.running)
    ready = scheduler.ready
    reading = [generation.prompt_progress for generation in running if generation.reading]
    kept = allocated = 0
    slots: tuple[SlotStats, ...] = ()
    if ready:
        kept, allocated = scheduler.serving.kept, scheduler.serving.allocated
        row_bytes = scheduler.serving.row_bytes
        slots = tuple(_slot(slot, row_bytes) for slot in scheduler.slots.all)
    return EngineStats(
        loaded=not inbox.closing,
        running=len(running),
        queued=len(inbox.waiting),
        refused=inbox.refused,
        queue_limit=inbox.limit,
        kv_bytes=kept,
        kv_bytes_allocated=allocated,
        kv_bytes_planned=worker.loaded.planned.context,
        prefill_tokens_per_second=scheduler.reading.rate.per_second if ready else 0.0,
        decode_tokens_per_second=scheduler.decoding.rate.per_second if ready else 0.0,
        prompt_progress=reading[0] if reading else None,
        slots=slots,
        **asdict(scheduler.counts),
    )


def _slot(slot: Slot, row_bytes: float) -> SlotStats:
    generation, rows = slot.generation, slot.rows
    if generation is None:
        return SlotStats("idle", len(slot.tokens), rows, round(rows * row_bytes), conversation=slot.conversation)
    reading = generation.reading
    return SlotStats(
        "reading" if reading else "decoding",
        len(slot.tokens),
        rows,
        round(rows * row_bytes),
        request_id=generation.job.request.id,
        conversation=slot.conversation,
        prompt_progress=generation.prompt_progress if reading else None,
    )
