"""What fits into a given memory: conversations, or context."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ziggurat.runtime.bindings.context_settings import MAX_ROWS, ContextSettings
from ziggurat.runtime.plan.kv import padded
from ziggurat.runtime.plan.memory import MemoryPlan
from ziggurat.runtime.plan.outline import Outline

#: ``LLAMA_MAX_SEQ``: sequences a context can have.
MAX_CONVERSATIONS = 256
#: Context searched up to for models that do not say what they were trained for.
_UNKNOWN_CTX = 2**20

Plan = Callable[[ContextSettings], MemoryPlan]
Size = Callable[[MemoryPlan], int]


def on_all_devices(plan: MemoryPlan) -> int:
    """Return the bytes of a plan, wherever they lie."""
    return plan.total


def on_gpus(plan: MemoryPlan) -> int:
    """Return the bytes of a plan that lie on GPUs."""
    return sum(device.total for device in plan.gpus)


def most_conversations(plan: Plan, settings: ContextSettings, memory: int, size: Size = on_all_devices) -> int:
    """Return how many conversations of ``settings.n_ctx`` tokens fit into ``memory`` bytes with the weights; 0 to 256.

    ``plan`` makes the plan of given settings, ``size`` says what of it has to fit.
    """

    def fits(count: int) -> bool:
        return size(plan(dataclasses.replace(settings, n_seq_max=count))) <= memory

    return _largest(fits, min(MAX_CONVERSATIONS, MAX_ROWS // settings.n_ctx))


def largest_ctx(plan: Plan, model: Outline, settings: ContextSettings, memory: int, size: Size = on_all_devices) -> int:
    """Return the largest context that fits ``settings.n_seq_max`` conversations into ``memory`` bytes, in tokens.

    No larger than the context the model was trained for; 0 when not even the smallest fits.
    """
    most = min(model.n_ctx_train or _UNKNOWN_CTX, MAX_ROWS // settings.n_seq_max)
    step = padded(1)  # rows are allocated in such steps, so every context within one takes the same

    def fits(steps: int) -> bool:
        return size(plan(dataclasses.replace(settings, n_ctx=min(steps * step, most)))) <= memory

    return min(_largest(fits, padded(most) // step) * step, most)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 0 to ``most`` that fits; it doubles first, so that nothing huge is tried."""
    high = 1
    while high <= most and fits(high):
        high *= 2
    low, high = high // 2, min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
