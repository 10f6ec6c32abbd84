"""Command line options that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ziggurat.runtime.errors import InvalidRequestError

Command = TypeVar("Command", bound=Callable[..., Any])

CACHE_TYPES = ("f16", "bf16", "q8_0", "q4_0")
KV_POLICIES = ("none", "pyramid", "snapkv", "streaming", "h2o", "tova", "keydiff")
KV_SCORES = ("snapkv", "h2o", "tova", "keydiff", "recent", "random")
_TITLE = "ziggurat_title"


def option_group(*options: Callable[[Any], Any], title: str | None = None) -> Callable[[Command], Command]:
    """Return a decorator that adds options to a command, in this order; ``SectionedCommand`` shows the title."""

    def decorate(command: Command) -> Command:
        before = len(_parameters(command))
        for option in reversed(options):
            command = option(command)
        for parameter in _parameters(command)[before:]:
            if title is not None and not hasattr(parameter, _TITLE):
                setattr(parameter, _TITLE, title)
        return command

    return decorate


def _parameters(command: Any) -> list[click.Parameter]:
    parameters: list[click.Parameter] = getattr(command, "__click_params__", [])  # where click collects them
    return parameters


class SectionedCommand(click.Command):
    """A command whose help has a section for each titled group of options, after those without a title."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections in the order of the options."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, _TITLE, "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


kv_options = option_group(
    click.option(
        "--kv-budget",
        metavar="ROWS|N%",
        help="Mean KV rows per layer and head to keep after a prompt, or a part of its tokens. --ctx then bounds the"
        " prompt, not the generation.",
    ),
    click.option(
        "--kv-policy",
        type=click.Choice(KV_POLICIES),
        help="Preset of schedule and score; none keeps every row. Default with a budget: pyramid.",
    ),
    click.option(
        "--kv-schedule",
        type=click.Choice(["uniform", "pyramid"]),
        help="How many rows each layer keeps; default: the preset's.",
    ),
    click.option("--kv-score", type=click.Choice(KV_SCORES), help="Which rows are kept; default: the preset's."),
    click.option(
        "--kv-window",
        type=click.IntRange(1),
        metavar="N",
        help="Last tokens that always stay, and that snapkv scores by; default: 32.",
    ),
    click.option("--kv-sinks", type=click.IntRange(0), metavar="N", help="First tokens that always stay; default: 4."),
    click.option(
        "--kv-pool",
        type=click.IntRange(1, 255),
        metavar="N",
        help="Positions over which scores are pooled, odd: what stands beside a row with a high score stays too;"
        " default: 13 for snapkv, 1 (none) for the other scores.",
    ),
    click.option("--kv-pool-type", type=click.Choice(["avg", "max"]), help="How they are pooled; default: max."),
    click.option(
        "--kv-prefill",
        type=click.Choice(["exact", "bounded", "chunked"]),
        help="How prompts are read. exact (default): rows are chosen once it is whole, layer by layer, or beside a full"
        " cache where the model's graph cannot be cut; bounded: the same, but such a model is refused; chunked: after"
        " every --ubatch, which is lossy.",
    ),
    title="KV budget",
)

cache_options = option_group(
    click.option(
        "--cache-type-k", type=click.Choice(CACHE_TYPES), default="f16", show_default=True, help="Type of K rows."
    ),
    click.option(
        "--cache-type-v",
        type=click.Choice(CACHE_TYPES),
        default="f16",
        show_default=True,
        help="Type of V rows; quantized ones turn flash attention on.",
    ),
)

context_options = option_group(
    click.option(
        "--ctx",
        type=click.IntRange(1),
        metavar="N",
        help="Tokens per conversation; default: the trained context, at most 8192.",
    ),
    click.option(
        "--ubatch",
        type=click.IntRange(1),
        default=512,
        show_default=True,
        metavar="N",
        help="Prompt tokens computed at once.",
    ),
    cache_options,
    title="Context",
)

device_options = option_group(
    click.option(
        "--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads; default: the physical cores."
    ),
    click.option(
        "--gpu-layers",
        type=click.IntRange(0),
        metavar="N",
        help="Layers on the GPU; default: all, if the library has a GPU backend.",
    ),
    title="Device",
)


adapter_options = option_group(
    click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="FILE[=SCALE]",
        help="A LoRA adapter (GGUF) to apply to the model, by a factor or not; may be repeated.",
    ),
)


def parse_counts(text: str, option: str) -> list[int]:
    """Return ascending whole numbers of a list such as "512,2k". Raises InvalidRequestError naming the option."""
    counts = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d{0,8})([kK]?)\s*", part)
        if match is None:
            raise InvalidRequestError(f"{option} {text}: give numbers with commas between, such as 512,2k")
        counts.add(int(match[1]) * (1024 if match[2] else 1))
    return sorted(counts)


speculation_options = option_group(
    click.option(
        "--draft-model",
        type=click.Path(path_type=Path),
        metavar="FILE.gguf",
        help="A small model of the same vocabulary that proposes tokens, such as a pruned conversion of the same one.",
    ),
    click.option(
        "--draft-max",
        type=click.IntRange(1, 15),
        default=8,
        show_default=True,
        metavar="N",
        help="Tokens proposed at a time.",
    ),
    click.option(
        "--prompt-lookup",
        is_flag=True,
        help="Propose what followed the last tokens when they occurred before.",
    ),
    title="Speculation",
)
