"""Conversations that stay in their sequence: found by name, saved, restored, and looked into."""

from __future__ import annotations

import os
from pathlib import Path

from ziggurat.runtime.engine.loader import Loaded
from ziggurat.runtime.engine.protocol import KeptRows
from ziggurat.runtime.engine.reuse import oldest
from ziggurat.runtime.engine.slots import Slot, Slots
from ziggurat.runtime.errors import ConversationError
from ziggurat.runtime.kv_file import load_sequence, save_sequence


def save(slots: Slots, loaded: Loaded, conversation: str, path: str | os.PathLike[str]) -> int:
    """See ``Engine.save``."""
    slot = _idle(slots, conversation)
    save_sequence(Path(path), slots.context, slot.index, slot.tokens, loaded.hash())
    return len(slot.tokens)


def restore(slots: Slots, loaded: Loaded, conversation: str, path: str | os.PathLike[str]) -> int:
    """See ``Engine.restore``. It takes the sequence of its name, or the one that was used longest ago."""
    free = [slot for slot in slots.all if not slot.busy]
    named = [slot for slot in slots.all if slot.conversation == conversation]
    if any(slot.busy for slot in named):
        raise ConversationError(f"conversation {conversation!r} is running a request: restore it when that has ended")
    if not free:
        raise ConversationError("every sequence is running a request: restore the conversation when one has ended")
    slot = named[0] if named else min(free, key=oldest)
    tokens = load_sequence(Path(path), slots.context, slot.index, loaded.hash())
    slot.tokens, slot.budgets, slot.apart = tokens, (), False
    slots.name(slot, conversation)
    slots.measure(slot)
    slots.touch(slot)
    return len(tokens)


def kept(slots: Slots, conversation: str) -> KeptRows:
    """See ``Engine.kept``."""
    slot = _find(slots, conversation)
    context = slots.context
    if not context.kv_active:
        return KeptRows(tuple(slot.tokens), (), ())
    layers = range(context.model.n_layer)
    positions = tuple(context.kv_positions(slot.index, layer) for layer in layers)
    return KeptRows(tuple(slot.tokens), slot.budgets, positions)


def _find(slots: Slots, conversation: str) -> Slot:
    for slot in slots.all:
        if slot.conversation == conversation:
            return slot
    raise ConversationError(
        f"the engine holds no conversation {conversation!r}: it has not begun, or others have taken its place"
    )


def _idle(slots: Slots, conversation: str) -> Slot:
    slot = _find(slots, conversation)
    if slot.busy:
        raise ConversationError(f"conversation {conversation!r} is running a request: save it when that has ended")
    return slot
