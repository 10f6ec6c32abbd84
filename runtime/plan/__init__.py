"""What a model takes in memory, known before anything is loaded.

``kv`` is the arithmetic of KV rows and ``budgets`` of those that a budget keeps, ``outline`` and ``checkpoint`` read
what is needed of a GGUF file or a Hugging Face config, ``compute`` estimates the graph's buffers, ``memory`` puts the
plan together, ``fit`` searches for what fits, ``planner`` asks the library where it can say, ``machine`` compares with
what there is.
"""

from ziggurat.runtime.plan.budgets import BudgetMemory, budget_memory, takes_budget
from ziggurat.runtime.plan.kv import (
    CACHE_TYPE_BLOCKS,
    ROW_PADDING,
    KVShape,
    SlidingWindow,
    bytes_per_token,
    check_cache_types,
    kv_bytes,
    kv_bytes_per_layer,
    kv_shape,
    padded,
    row_bytes,
    rows_held,
    rows_per_layer,
)
from ziggurat.runtime.plan.memory import DeviceMemory, MemoryPlan, measured_plan, plan_memory
from ziggurat.runtime.plan.outline import Outline, Weights, outline
from ziggurat.runtime.plan.planner import Planner, open_planner

__all__ = [
    "CACHE_TYPE_BLOCKS",
    "ROW_PADDING",
    "BudgetMemory",
    "DeviceMemory",
    "KVShape",
    "MemoryPlan",
    "Outline",
    "Planner",
    "SlidingWindow",
    "Weights",
    "budget_memory",
    "bytes_per_token",
    "check_cache_types",
    "kv_bytes",
    "kv_bytes_per_layer",
    "kv_shape",
    "measured_plan",
    "open_planner",
    "outline",
    "padded",
    "plan_memory",
    "row_bytes",
    "rows_held",
    "rows_per_layer",
    "takes_budget",
]
