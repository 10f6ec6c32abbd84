"""``ziggurat run``: one prompt, its answer on stdout."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ziggurat.runtime.engine_options import engine_settings
from ziggurat.runtime.errors import InvalidRequestError, ZigguratError
from ziggurat.runtime.files import check_target, write_atomic
from ziggurat.runtime.options import (
    SectionedCommand,
    adapter_options,
    context_options,
    device_options,
    kv_options,
    speculation_options,
)
from ziggurat.runtime.sampling_options import sampling_of, sampling_options

if TYPE_CHECKING:
    from ziggurat.runtime.engine import Engine, FinishEvent, GenerationRequest, GenerationStats, ModelInfo
    from ziggurat.runtime.sampling import SamplingParams

# what a terminal would obey instead of show: a model's text is not trusted
_CONTROLS = dict.fromkeys([*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F, *range(0x80, 0xA0)])


@click.command(cls=SectionedCommand)
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf")
@click.argument("prompt", metavar="PROMPT|-")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the model's chat template.")
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option(
    "-n",
    "max_tokens",
    type=click.IntRange(-1),
    default=-1,
    metavar="N",
    help="Tokens to generate at most; default, or -1: until the model ends or the context is full (with a KV budget it"
    " never is).",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@adapter_options
@speculation_options
@context_options
@kv_options
@sampling_options
@device_options
@click.option(
    "--stats", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json", help="Write the figures there."
)
@click.option("--verbose", "-v", is_flag=True, help="Show the library's log on stderr.")
def run(model: Path, prompt: str, **options: Any) -> int:
    """Generate text from PROMPT (- reads it from stdin) with the model in MODEL.gguf.

    The text goes to stdout as it is made, everything else to stderr. Without a chat template in the file the prompt is
    given as it is.
    """
    from ziggurat.runtime.engine.llama_engine import LlamaEngine
    from ziggurat.runtime.kv_policy import not_used

    settings = engine_settings(options, one_shot=True)
    if options["verbose"]:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s", stream=sys.stderr)
    sampling = sampling_of(options)
    text = _read_prompt(prompt)
    stats_file = options["stats"]
    if stats_file is not None:
        check_target(stats_file, "--stats", special=True)
    with LlamaEngine(model, settings) as engine:
        info = engine.load()
        if info.kv_unsupported is not None:
            click.echo(f"ziggurat: {not_used(info.kv_unsupported)}", err=True)
        request = _request(info, text, sampling, options)
        done = generate(engine, request)
    click.echo(_summary(done), err=True)
    if stats_file is not None:
        content = json.dumps({**done.stats.as_json(), "finish_reason": done.reason}, indent=2) + "\n"
        write_atomic(stats_file, content.encode(), "--stats")
    return 0


def generate(engine: Engine, request: GenerationRequest) -> FinishEvent:
    """Write a generation to stdout as it is made, a line break at its end, and return its last event."""
    from ziggurat.runtime.engine import FinishEvent

    shown = "\n"
    terminal = sys.stdout.isatty()
    with engine.stream(request) as events:
        for event in events:
            text = event.text.translate(_CONTROLS) if terminal else event.text
            if text:
                sys.stdout.write(text)
                sys.stdout.flush()
                shown = text
            if isinstance(event, FinishEvent):
                if not shown.endswith("\n"):
                    sys.stdout.write("\n")
                    sys.stdout.flush()
                return event
    raise ZigguratError("the engine ended without a result; this is a bug in Ziggurat")


def _read_prompt(argument: str) -> str:
    if argument != "-":
        text, where = argument, "PROMPT"
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidRequestError("PROMPT is not valid UTF-8")
    else:
        data, where = sys.stdin.buffer.read(), "stdin"
        try:
            # the line break that echo and editors put at the end is not part of the question
            text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"stdin is not valid UTF-8: byte {data[error.start]:#04x} at {error.start}"
            ) from None
    if not text.strip():
        raise InvalidRequestError(f"{where} is empty: there is nothing to generate from")
    return text


def _request(info: ModelInfo, text: str, sampling: SamplingParams, options: dict[str, Any]) -> GenerationRequest:
    from ziggurat.runtime.engine import GenerationRequest, Message

    limit: int | None = options["max_tokens"]
    if limit == 0:
        raise InvalidRequestError("-n 0 generates nothing; give a number of tokens, or -1 for no limit")
    common: dict[str, Any] = {
        "max_tokens": None if limit == -1 else limit,
        "sampling": sampling,
        "stop": options["stop"],
    }
    raw, system = options["raw"], options["system"]
    if not raw and not info.has_chat_template:
        click.echo("ziggurat: the model has no chat template; the prompt is given as it is (--raw)", err=True)
        raw = True
    if raw and system is not None:
        raise InvalidRequestError("--system needs a chat template; put the text into the prompt itself")
    if raw:
        return GenerationRequest(prompt=text, **common)
    before = (Message("system", system),) if system is not None else ()
    return GenerationRequest(messages=(*before, Message("user", text)), **common)


def _summary(done: FinishEvent) -> str:
    stats = done.stats
    return (
        f"[{stats.prompt_tokens} prompt tokens, {stats.prompt_tokens_per_second:.1f}/s"
        f" | {stats.generated_tokens} generated, {stats.decode_tokens_per_second:.1f}/s"
        f" | first after {stats.time_to_first_token_s:.2f} s"
        f"{_draft_summary(stats)}"
        f" | {_kv_summary(stats)}"
        f" | {done.reason}]"
    )


def _draft_summary(stats: GenerationStats) -> str:
    drafted = stats.drafted_tokens
    return f" | {stats.accepted_tokens} of {drafted} drafted tokens accepted" if drafted else ""


def _kv_summary(stats: GenerationStats) -> str:
    size = f"KV {stats.kv_bytes / 2**20:.1f} MiB"
    if stats.kv_bytes_peak == stats.kv_bytes_full:  # without a budget all is allocated at once
        return size
    rows = stats.kv_rows_per_layer
    most, least = max(rows), min(rows)
    each = f"{most}" if most == least else f"{most} to {least}"
    return (
        f"{size} of {stats.kv_bytes_full / 2**20:.1f}, {stats.kv_bytes_peak / 2**20:.1f} while the prompt was read"
        f" | {each} rows a layer, {stats.evicted_rows} evicted"
    )
