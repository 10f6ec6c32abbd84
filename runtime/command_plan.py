"""``ziggurat plan``: what a model and its settings take in memory, before anything is loaded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.options import adapter_options, context_options, kv_options

if TYPE_CHECKING:
    from ziggurat.runtime.plan import MemoryPlan, Planner
    from ziggurat.runtime.plan.machine import Machine


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf|CONFIG")
@adapter_options
@context_options
@kv_options
@click.option(
    "--parallel", type=click.IntRange(1, 256), default=1, show_default=True, metavar="N", help="Conversations at once."
)
@click.option(
    "--kv-reading",
    type=click.IntRange(1),
    metavar="N",
    help="With a KV budget, prompts that may be read at a time, each in memory of its own; default: 2, for one"
    " conversation 1.",
)
@click.option("--batch", type=click.IntRange(1), default=2048, show_default=True, metavar="N", help="Largest batch.")
@click.option(
    "--flash-attention", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True, help="As in run."
)
@click.option("--gpu-layers", type=click.IntRange(0), metavar="N", help="Layers on the GPU; default: as run would do.")
@click.option("--memory", metavar="SIZE", help="Say what fits into so much, such as 48GiB; default: what is free here.")
@click.option("--type", "type_name", metavar="TYPE", help="File type a checkpoint would get; default: q4_k_m.")
@click.option("--estimate", is_flag=True, help="Do not ask the library; arithmetic alone.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def plan(model: Path, **options: Any) -> int:
    """Show what MODEL.gguf, or a checkpoint not yet converted (its folder or config.json), takes in memory.

    The library is asked where it can say: it simulates the allocation. With a stock library, and for checkpoints, the
    compute buffers are an estimate. Prompts are taken to be as long as the context.
    """
    from ziggurat.runtime.bindings import ContextSettings
    from ziggurat.runtime.engine.settings import DEFAULT_CTX
    from ziggurat.runtime.kv_policy import policy_of
    from ziggurat.runtime.lora import LoraAdapter
    from ziggurat.runtime.plan import open_planner
    from ziggurat.runtime.plan.machine import this_machine
    from ziggurat.runtime.sizes import parse_bytes

    policy = policy_of(options)
    memory = parse_bytes(options["memory"]) if options["memory"] is not None else None
    if options["type_name"] is not None and model.suffix == ".gguf":
        raise InvalidRequestError("--type is for checkpoints; a GGUF file has its types already")
    with open_planner(
        model,
        gpu_layers=options["gpu_layers"],
        file_type=options["type_name"],
        ask_library=not options["estimate"],
        policy=policy,
        loras=tuple(map(LoraAdapter.parse, options["loras"])),
    ) as planner:
        settings = ContextSettings(
            n_ctx=options["ctx"] or min(planner.model.n_ctx_train or DEFAULT_CTX, DEFAULT_CTX),
            n_batch=max(options["batch"], options["ubatch"]),
            n_ubatch=options["ubatch"],
            n_seq_max=options["parallel"],
            type_k=options["cache_type_k"],
            type_v=options["cache_type_v"],
            flash_attention=options["flash_attention"],
        )
        report = describe(planner, settings, memory, this_machine())
    report["plan"]["kv_budget_asked"] = None if policy is None else str(policy.budget)
    if options["as_json"]:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0


def describe(planner: Planner, settings: Any, memory: int | None, machine: Machine) -> dict[str, Any]:
    """Return what ``plan --json`` writes; sizes in bytes."""
    from ziggurat.runtime.plan.fit import on_all_devices, on_gpus
    from ziggurat.runtime.plan.machine import shortage

    planned: MemoryPlan = planner.plan(settings)
    size = on_all_devices
    if memory is None:
        memory, size = (machine.gpu_free, on_gpus) if planned.gpus else (machine.available, on_all_devices)
    return {
        "path": str(planned.path),
        "architecture": planner.model.architecture,
        "context_length": planner.model.n_ctx_train or None,
        "plan": planned.as_json(),
        "fits": {
            "memory_bytes": memory,
            "conversations": planner.most_conversations(settings, memory, size),
            "largest_ctx": planner.largest_ctx(settings, memory, size),
        },
        "machine": {
            "memory_total": machine.total,
            "memory_available": machine.available,
            "gpu_memory_free": list(machine.gpus_free),
            "shortage": shortage(planned, machine),
        },
    }


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ziggurat.runtime.sizes import human_bytes

    planned, fits, machine = report["plan"], report["fits"], report["machine"]
    console = Console(highlight=False)
    count = planned["parallel"]
    conversations = "one conversation" if count == 1 else f"{count} conversations"
    console.print(f"{report['path']} ({report['architecture']})", markup=False)
    types = f"{planned['cache_type_k']}/{planned['cache_type_v']}"
    console.print(f"[bold]{conversations.capitalize()} of {planned['ctx']:,} tokens, KV {types}[/bold]")
    table = Table()
    devices = planned["devices"]
    several = len(devices) > 1
    for column in ("", *(device["device"] for device in devices), *(["total"] if several else [])):
        table.add_column(column, justify="right" if column else "left")
    rows = {"weights": "weights", "adapters": "adapters", "KV rows": "context", "compute": "compute"}
    rows |= {"logits": "output", "total": "total"}
    for label, key in rows.items():
        sizes = [device[key] for device in devices]
        if key == "adapters" and not sum(sizes):
            continue
        table.add_row(label, *(human_bytes(size) for size in [*sizes, *([sum(sizes)] if several else [])]))
    console.print(table)
    for line in _remarks(planned):
        console.print(line, markup=False)
    largest = f"the largest context of {conversations} is {fits['largest_ctx']:,} tokens"
    console.print(f"Into {human_bytes(fits['memory_bytes'])} {_fitting(fits['conversations'])}; {largest}.")
    if machine["shortage"] is not None:
        console.print(f"On this machine it {machine['shortage']}.", markup=False)


def _fitting(conversations: int) -> str:
    from ziggurat.runtime.plan.fit import MAX_CONVERSATIONS

    if conversations < 2:
        return f"fits {'one' if conversations else 'no'} conversation of this context"
    most = ", the most the library runs" if conversations == MAX_CONVERSATIONS else ""
    return f"fit {conversations} conversations of this context{most}"


def _budget_remarks(planned: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    from ziggurat.runtime.sizes import human_bytes

    rows, asked = budget["rows_per_layer"], planned["kv_budget_asked"]
    sizes = {name: human_bytes(size) for name, size in budget.items() if name.endswith("_bytes")}
    bounded = [count for count in rows if count]
    each = f"{bounded[0]:,}" if bounded[0] == bounded[-1] else f"{bounded[0]:,} to {bounded[-1]:,}"
    among = f" in the {len(bounded)} layers without a sliding window" if len(bounded) < len(rows) else ""
    stage = "stage of one layer" if budget["layer_major"] else "lane, a full cache"
    count = budget["prompts_at_a_time"]
    prompts = "a prompt is" if count == 1 else f"{count} prompts are"
    sums = f", sums of attention {sizes['sum_bytes']}" if budget["sum_bytes"] else ""
    return [
        f"KV budget {asked}: {each} rows per layer and head{among}, {sum(bounded) / len(bounded):,.0f} on average;"
        f" to keep every row would take {human_bytes(budget['kv_bytes_full'])}.",
        f"KV rows: {sizes['rows_bytes']} (room for generated tokens included), positions {sizes['position_bytes']},"
        f" queries {sizes['query_bytes']}{sums}; while {prompts} read: {stage} {sizes['stage_bytes']},"
        f" a copy of the sequence's rows {sizes['copy_bytes']},"
        f" hidden states {sizes['hidden_bytes']}.",
    ]


def _remarks(planned: dict[str, Any]) -> list[str]:
    from ziggurat.runtime.sizes import human_bytes

    lines = []
    budget = planned["kv_budget"]
    layers = [] if budget else Counter(planned["kv_bytes_per_layer"]).most_common()
    if budget:
        lines += _budget_remarks(planned, budget)
    elif planned["kv_budget_asked"]:
        lines.append("This model cannot have a KV budget as far as its metadata tells: every row is kept.")
    if layers:
        # a model whose layers all differ would make a list as long as it has layers
        told = ", ".join(f"{count} x {human_bytes(size)}" for size, count in layers[:6])
        lines.append(f"KV by layer: {told}{', …' if len(layers) > 6 else ''}")
    if not planned["weights_exact"]:
        lines.append("The bytes of the weights are an estimate: the model is not converted yet.")
    if not planned["measured"]:
        lines.append("The compute buffers are an estimate, mostly within 10 % on a CPU.")
    if not planned["kv_exact"]:
        lines.append("This family does not keep plain rows in every layer: KV by layer is an upper estimate.")
    return lines
