"""``ziggurat serve``: an OpenAI-style API over a model."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ziggurat.runtime.engine_options import engine_settings
from ziggurat.runtime.options import (
    SectionedCommand,
    adapter_options,
    context_options,
    device_options,
    kv_options,
    option_group,
    speculation_options,
)

if TYPE_CHECKING:
    from ziggurat.runtime.engine import ModelInfo

_server_options = option_group(
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at."),
    click.option(
        "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 takes any that is free."
    ),
    click.option("--api-key", multiple=True, metavar="KEY", help="Let in only who knows it; may be repeated."),
    click.option(
        "--alias", multiple=True, metavar="NAME", help="Name of the model; may be repeated. Default: the file's."
    ),
    title="Server",
)

_serving_options = option_group(
    click.option(
        "--parallel",
        type=click.IntRange(1, 256),
        default=4,
        show_default=True,
        metavar="N",
        help="Requests that run at a time; each has --ctx tokens of its own.",
    ),
    click.option(
        "--cached",
        type=click.IntRange(0, 255),
        metavar="N",
        help="Sequences beside theirs that hold what earlier ones left; default: 1 with a KV budget, else 0.",
    ),
    click.option(
        "--queue-limit",
        type=click.IntRange(0),
        default=64,
        show_default=True,
        metavar="N",
        help="Requests that may wait.",
    ),
    title="Serving",
)


@click.command(cls=SectionedCommand)
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf")
@_server_options
@_serving_options
@adapter_options
@speculation_options
@context_options
@kv_options
@device_options
@click.option("--verbose", "-v", is_flag=True, help="Show the library's log on stderr.")
def serve(model: Path, **options: Any) -> int:
    """Serve the model in MODEL.gguf over an OpenAI-style API.

    What it takes in memory is shown before it is loaded.
    """
    from ziggurat.runtime.engine.llama_engine import LlamaEngine
    from ziggurat.runtime.kv_policy import not_used
    from ziggurat.runtime.server import lifecycle
    from ziggurat.runtime.server.app import create_app
    from ziggurat.runtime.server.settings import ServerSettings

    logging.basicConfig(
        level=logging.DEBUG if options["verbose"] else logging.WARNING,
        format="%(name)s: %(message)s",
        stream=sys.stderr,
    )
    settings = ServerSettings(
        host=options["host"], port=options["port"], alias=list(options["alias"]), api_key=list(options["api_key"])
    )
    cached = options["cached"]
    if cached is None:
        cached = 0 if options["kv_budget"] is None else 1
    engine_options = engine_settings(
        options, parallel=options["parallel"], cached=cached, queue_limit=options["queue_limit"]
    )
    with lifecycle.listen(settings) as listener, LlamaEngine(model, engine_options) as engine:
        info = engine.load()
        if info.kv_unsupported is not None:
            click.echo(f"ziggurat: {not_used(info.kv_unsupported)}", err=True)
        app = create_app(engine, settings)
        click.echo(f"ziggurat: {_told(info)} at {lifecycle.address_of(listener)}/v1", err=True)
        lifecycle.run(app, listener)
    return 0


def _told(info: ModelInfo) -> str:
    requests = "one request" if info.parallel == 1 else f"{info.parallel} requests"
    return f"{info.description}, {requests} at a time of {info.n_ctx:,} tokens,"
