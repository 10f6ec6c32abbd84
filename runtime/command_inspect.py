"""``ziggurat inspect``: what is in a GGUF file. Reads metadata only and needs no llama.cpp library."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ziggurat.runtime.errors import UnsupportedError
from ziggurat.runtime.options import cache_options, parse_counts

if TYPE_CHECKING:
    from rich.table import Table

    from ziggurat.runtime.gguf_file import GGUFFile
    from ziggurat.runtime.plan import KVShape

_PRUNE = "ziggurat.prune."
_CALIBRATION = "ziggurat.calibration."

_DEFAULT_CONTEXTS = (4096, 8192, 32768, 131072)

# first match wins; names are llama.cpp's
_GROUPS = (
    ("norm", re.compile(r"norm")),
    ("embedding", re.compile(r"^(token_embd|position_embd|token_types|per_layer_token_embd)")),
    ("output", re.compile(r"^output")),
    ("experts", re.compile(r"_exps|_shexp|ffn_gate_inp")),
    ("attention", re.compile(r"attn")),
    ("ffn", re.compile(r"ffn")),
)


def tensor_group(name: str) -> str:
    """Return which part of a model a tensor belongs to: embedding, attention, ffn, experts, norm, output or other."""
    return next((group for group, pattern in _GROUPS if pattern.search(name)), "other")


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf")
@click.option(
    "--ctx", "contexts", metavar="LIST", help="Contexts to show KV sizes for: 4096,32k; default: 4k to the trained one."
)
@cache_options
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def inspect(model: Path, contexts: str | None, cache_type_k: str, cache_type_v: str, as_json: bool) -> int:
    """Show architecture, sizes, types by tensor group and memory by context of MODEL.gguf.

    Compute buffers are an estimate here; ziggurat plan asks the library.
    """
    from ziggurat.runtime.gguf_file import read_gguf

    wanted = parse_counts(contexts, "--ctx") if contexts is not None else None
    report = describe(read_gguf(model), wanted, cache_type_k, cache_type_v)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0


def describe(file: GGUFFile, contexts: list[int] | None, type_k: str, type_v: str) -> dict[str, Any]:
    """Return what ``inspect --json`` writes; sizes in bytes."""
    arch = file.architecture
    n_params, weights = file.n_params, file.weights_bytes
    tokens = file.fields.get("tokenizer.ggml.tokens")
    return {
        "path": str(file.path),
        "name": file.text("general.name"),
        "architecture": arch,
        "file_type": _file_type(file),
        "parameters": n_params,
        "file_bytes": file.n_bytes,
        "weights_bytes": weights,
        "bits_per_weight": weights * 8 / n_params if n_params else 0.0,
        "layers": file.integer(f"{arch}.block_count"),
        "embedding_length": file.integer(f"{arch}.embedding_length"),
        "context_length": file.integer(f"{arch}.context_length"),
        "experts": file.integer(f"{arch}.expert_count"),
        "experts_used": file.integer(f"{arch}.expert_used_count"),
        "tokenizer": {
            "model": file.text("tokenizer.ggml.model"),
            "pre": file.text("tokenizer.ggml.pre"),
            "tokens": getattr(tokens, "length", None),
            "chat_template": file.text("tokenizer.chat_template") is not None,
        },
        "tensors": _groups(file),
        "kv": _kv(file, contexts, type_k, type_v),
        "memory": _memory(file, contexts, type_k, type_v),
        "ziggurat": {key: value for key in file.fields if key.startswith("ziggurat.") for value in [_plain(file, key)]},
    }


def _plain(file: GGUFFile, key: str) -> Any:
    value = file.scalar(key)
    return file.array(key) if value is None else value


def _file_type(file: GGUFFile) -> str | None:
    from gguf.constants import LlamaFileType

    number = file.integer("general.file_type")
    if number is None:
        return None
    try:
        name: str = LlamaFileType(number).name
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return f"unknown ({number})"


def _groups(file: GGUFFile) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    types: dict[str, Counter[str]] = defaultdict(Counter)
    for tensor in file.tensors:
        group = tensor_group(tensor.name)
        row = rows.setdefault(group, {"count": 0, "parameters": 0, "bytes": 0, "types": {}})
        row["count"] += 1
        row["parameters"] += tensor.n_elements
        row["bytes"] += tensor.n_bytes
        types[group][tensor.type] += 1
    for group, row in rows.items():
        row["types"] = dict(types[group].most_common())
    return dict(sorted(rows.items(), key=lambda item: -item[1]["bytes"]))


def _kv(file: GGUFFile, contexts: list[int] | None, type_k: str, type_v: str) -> dict[str, Any] | None:
    from ziggurat.runtime import plan

    try:
        shape = plan.kv_shape(file)
    except UnsupportedError:
        return None
    plan.check_cache_types(shape, type_k, type_v)
    per_layer = plan.bytes_per_token(shape, type_k, type_v)
    return {
        "type_k": type_k,
        "type_v": type_v,
        "exact": shape.exact,
        "heads": _once(shape.n_head),
        "kv_heads": _once(shape.n_head_kv),
        "key_length": shape.key_length,
        "value_length": shape.value_length,
        "sliding_window_layers": sum(bool(window) for window in shape.window),
        "sliding_window": max(shape.window, default=0),
        "bytes_per_token": sum(per_layer),
        "bytes_per_token_by_layer": list(per_layer),
        "bytes_at_context": {
            str(n_ctx): plan.kv_bytes(shape, n_ctx, type_k=type_k, type_v=type_v)
            for n_ctx in contexts or _default_contexts(shape)
        },
    }


def _memory(file: GGUFFile, contexts: list[int] | None, type_k: str, type_v: str) -> dict[str, Any] | None:
    from ziggurat.runtime.bindings.context_settings import ContextSettings
    from ziggurat.runtime.plan import outline, plan_memory
    from ziggurat.runtime.plan.machine import this_machine

    model, machine = outline(file), this_machine()
    if model.kv is None:
        return None
    rows = []
    for n_ctx in contexts or _default_contexts(model.kv):
        planned = plan_memory(model, ContextSettings(n_ctx, type_k=type_k, type_v=type_v))
        rows.append(
            {
                "ctx": n_ctx,
                "kv_bytes": planned.context,
                "compute_bytes": planned.compute,
                "output_bytes": planned.output,
                "total_bytes": planned.total,
                "fits_memory": planned.total <= machine.available,
                "fits_gpu": planned.total <= machine.gpu_free,
            }
        )
    return {
        "available_bytes": machine.available,
        "gpu_free_bytes": machine.gpu_free,
        "contexts": rows,
    }


def _once(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _default_contexts(shape: KVShape) -> list[int]:
    trained = shape.n_ctx_train
    return sorted({n for n in _DEFAULT_CONTEXTS if not trained or n < trained} | ({trained} if trained else set()))


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ziggurat.runtime.sizes import human_bytes, human_count

    console = Console(highlight=False)
    head = Table(show_header=False, box=None, pad_edge=False)
    for label, value in _facts(report):
        head.add_row(Text(label, style="bold"), Text(value))
    console.print(head)

    tensors = Table(title="Tensors", title_justify="left", title_style="bold")
    for column in ("group", "tensors", "weights", "size", "types"):
        tensors.add_column(column, justify="left" if column in ("group", "types") else "right")
    for group, row in report["tensors"].items():
        kinds = ", ".join(f"{name} x{count}" for name, count in row["types"].items())
        tensors.add_row(group, str(row["count"]), human_count(row["parameters"]), human_bytes(row["bytes"]), kinds)
    console.print(tensors)

    kv = report["kv"]
    if kv is None:
        console.print("No attention, so no KV cache.")
        return
    console.print(_memory_table(report["memory"], f"Memory, one conversation, KV {kv['type_k']}/{kv['type_v']}"))
    if not kv["exact"]:
        console.print("This family does not keep plain rows in every layer: take the KV figures as an upper estimate.")


def _memory_table(memory: dict[str, Any], title: str) -> Table:
    from rich.table import Table

    from ziggurat.runtime.sizes import human_bytes

    table = Table(title=title, title_justify="left", title_style="bold")
    places = {"fits_memory": f"fits {human_bytes(memory['available_bytes'])} free"}
    if memory["gpu_free_bytes"]:
        places["fits_gpu"] = f"fits {human_bytes(memory['gpu_free_bytes'])} of GPU"
    for column in ("context", "KV", "compute (estimate)", "with the weights", *places.values()):
        table.add_column(column, justify="right")
    for row in memory["contexts"]:
        sizes = (human_bytes(row[key]) for key in ("kv_bytes", "compute_bytes", "total_bytes"))
        table.add_row(f"{row['ctx']:,}", *sizes, *("yes" if row[key] else "no" for key in places))
    return table


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    from ziggurat.runtime.sizes import human_bytes, human_count

    tokenizer, kv = report["tokenizer"], report["kv"]
    facts = [
        ("file", report["path"]),
        ("name", report["name"] or "-"),
        ("architecture", f"{report['architecture']}, {report['layers']} layers, width {report['embedding_length']}"),
        ("parameters", human_count(report["parameters"])),
        ("size", f"{human_bytes(report['file_bytes'])} on disk, weights {human_bytes(report['weights_bytes'])}"),
        ("type", f"{report['file_type'] or '-'}, {report['bits_per_weight']:.2f} bits per weight"),
        ("trained context", f"{report['context_length']:,}" if report["context_length"] else "-"),
    ]
    if report["experts"]:
        facts.append(("experts", f"{report['experts']}, {report['experts_used']} used per token"))
    if kv is not None:
        window = kv["sliding_window_layers"]
        sliding = f", {window} layers see {kv['sliding_window']} tokens" if window else ""
        facts.append(("heads", f"{kv['heads']} query, {kv['kv_heads']} KV, {kv['key_length']} wide{sliding}"))
        facts.append(("KV per token", human_bytes(kv["bytes_per_token"])))
    template = "with a chat template" if tokenizer["chat_template"] else "no chat template"
    facts.append(
        (
            "tokenizer",
            f"{tokenizer['model'] or '-'}/{tokenizer['pre'] or '-'}, {tokenizer['tokens']} tokens, {template}",
        )
    )
    facts += _pruned(report["ziggurat"]) + _calibrated(report["ziggurat"])
    told = (_PRUNE, _CALIBRATION)
    facts += [(key, str(value)) for key, value in report["ziggurat"].items() if not key.startswith(told)]
    return facts


def _pruned(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """What the converter notes about removed blocks, in words; `--json` has all of it."""

    def numbers(key: str) -> str:
        value = fields.get(_PRUNE + key)
        return ", ".join(map(str, value)) if isinstance(value, list) else "?"

    def value(key: str) -> Any:
        return fields.get(_PRUNE + key)

    if not isinstance(value("blocks"), list):
        return []
    before, criterion = value("block_count_before"), value("criterion")
    by = "as listed" if criterion == "list" else f"by {criterion}"
    facts = [("removed blocks", f"{numbers('blocks')} of {before} (counted from 0), {by}")]
    if value("repair") in (None, "none"):
        repair = f"none: {value('repair.reason') or 'not noted why'}"
    else:
        repair = f"{value('repair')} in blocks {numbers('repair.blocks')} of the model before"
    divergence = value("repair.divergence_pruned"), value("repair.divergence_repaired")
    if all(isinstance(x, float) for x in divergence):
        repair += f"; held-out divergence {divergence[0]:.4f} without, {divergence[1]:.4f} nats with it"
    facts.append(("repair", repair))
    if value("calibration.tokens"):
        facts.append(("calibration", f"{value('calibration.tokens')} tokens, sha256 {value('calibration.hash')}"))
    return facts


def _calibrated(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """What the converter notes about the text that the quantization was fitted on."""
    source, tokens, sha256 = (fields.get(_CALIBRATION + key) for key in ("source", "tokens", "hash"))
    return [] if source is None else [("calibrated on", f"{tokens} tokens of {source}, sha256 {sha256}")]
