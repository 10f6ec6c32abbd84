"""``ziggurat serve``: an OpenAI-style API over a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
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
    from starlette.types import ASGIApp

    from ziggurat.runtime.engine import ModelInfo
    from ziggurat.runtime.engine.settings import EngineSettings
    from ziggurat.runtime.server.phase import Phase
    from ziggurat.runtime.server.settings import ServerSettings

_server_options = option_group(
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at."),
    click.option(
        "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 takes any that is free."
    ),
    click.option("--api-key", multiple=True, metavar="KEY", help="Let in only who knows it; may be repeated."),
    click.option(
        "--alias", multiple=True, metavar="NAME", help="Name of the model; may be repeated. Default: the file's."
    ),
    click.option(
        "--unix-socket", type=click.Path(path_type=Path), metavar="PATH", help="Listen at a Unix socket instead."
    ),
    click.option("--socket-mode", metavar="OCTAL", help="Its permissions; default: 600."),
    click.option(
        "--tls-certificate",
        type=click.Path(path_type=Path),
        metavar="FILE.pem",
        help="Serve HTTPS with this certificate and those behind it.",
    ),
    click.option("--tls-key", type=click.Path(path_type=Path), metavar="FILE.pem", help="Its key, if not in there."),
    click.option(
        "--cors-origin",
        multiple=True,
        metavar="ORIGIN",
        help="Let pages of this site use the server, * for all; may be repeated. Default: none.",
    ),
    click.option("--public-metrics", is_flag=True, help="Show /metrics to who knows no key."),
    click.option(
        "--kv-folder",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Keep conversations' rows here when a client asks for it; default: refuse to.",
    ),
    click.option(
        "--request-timeout", type=float, metavar="SECONDS", help="End requests that take longer; default: none."
    ),
    click.option(
        "--grace",
        type=float,
        metavar="SECONDS",
        help="For running requests to end when the server is stopped; default: 30.",
    ),
    click.option("--max-body", type=int, metavar="BYTES", help="Of a request at most; default: 8 MiB."),
    click.option("--max-requests", type=int, metavar="N", help="Requests answered at a time; default: 256."),
    click.option("--max-connections", type=int, metavar="N", help="Connections at a time; default: 512."),
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
    click.option("--embeddings", is_flag=True, help="Make embeddings as well, in a context of their own."),
    click.option(
        "--pooling",
        type=click.Choice(["mean", "cls", "last"]),
        help="How a text's vector is made of its tokens'; default: as the model's file says. Implies --embeddings.",
    ),
    title="Serving",
)


@click.command(cls=SectionedCommand)
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.gguf", required=False)
@_server_options
@_serving_options
@adapter_options
@speculation_options
@context_options
@kv_options
@device_options
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="ZIGGURAT_CONFIG",
    metavar="FILE.toml",
    help='Settings by the names of the options, such as kv_budget = "10%", and model. What is given as an option counts'
    " before ZIGGURAT_KV_BUDGET in the environment, and that before the file.",
)
@click.option("--verbose", "-v", is_flag=True, help="Show the library's log on stderr.")
@click.pass_context
def serve(context: click.Context, /, config: Path | None, verbose: bool, **_options: Any) -> int:
    """Serve the model in MODEL.gguf over an OpenAI-style API.

    What it takes in memory is shown before it is loaded.
    """
    from ziggurat.runtime.engine.llama_engine import LlamaEngine
    from ziggurat.runtime.serve_settings import read_settings
    from ziggurat.runtime.server import lifecycle
    from ziggurat.runtime.server.app import create_app
    from ziggurat.runtime.server.logs import log_to_stderr

    settings, options = read_settings(context, config)
    model: Path | None = options["model"]
    if model is None:
        raise click.MissingParameter(ctx=context, param=context.command.params[0])
    engine = LlamaEngine(model, serving_settings(options))
    log_to_stderr(logging.DEBUG if verbose else logging.INFO)

    def load(phase: Phase, url: str) -> ASGIApp:
        click.echo(f"ziggurat: {planned(model, serving_settings(options))}", err=True)
        app = create_app(engine, settings, phase)
        _announce(engine.load(phase.load_progress), url, settings)
        return app

    with engine:
        return lifecycle.serve(load, settings.listen(), grace=settings.grace, limits=settings.connection_limits())


def serving_settings(options: Mapping[str, Any]) -> EngineSettings:
    """Return how the engine of a server loads its model. Raises InvalidRequestError and UnsupportedError."""
    cached = options["cached"]
    if cached is None:
        cached = 0 if options["kv_budget"] is None else 1
    return engine_settings(
        options,
        parallel=options["parallel"],
        cached=cached,
        queue_limit=options["queue_limit"],
        embeddings=options["embeddings"] or options["pooling"] is not None,
        pooling=options["pooling"],
    )


def planned(model: Path, settings: EngineSettings) -> str:
    """Say in one line what a model takes with these settings. Raises ModelFileError and AdapterError."""
    from ziggurat.runtime.engine.memory_check import plan_all
    from ziggurat.runtime.gguf_file import read_gguf
    from ziggurat.runtime.lora import read_adapters
    from ziggurat.runtime.plan.machine import this_machine
    from ziggurat.runtime.sizes import human_bytes

    file = read_gguf(model)
    plan = plan_all(file, settings, read_adapters(settings.loras, file))
    machine = this_machine()
    parts = {"weights": plan.weights, "adapters": plan.adapters, "KV cache": plan.context}
    told = [f"{name} {human_bytes(size)}" for name, size in parts.items() if size]
    told.append(f"compute {human_bytes(plan.compute + plan.output)}")
    count = settings.parallel + settings.cached
    sequences = "one sequence" if count == 1 else f"{count} sequences"
    free = f"{human_bytes(machine.available)} free"
    if machine.gpus_free and plan.gpus:
        free += f", {human_bytes(machine.gpu_free)} on the GPU"
    return (
        f"planned memory {human_bytes(plan.total)} ({', '.join(told)}) for {sequences} of"
        f" {plan.settings.n_ctx:,} tokens; {free}"
    )


def _announce(info: ModelInfo, url: str, settings: ServerSettings) -> None:
    from ziggurat.runtime.kv_policy import not_used

    if info.kv_unsupported is not None:
        click.echo(f"ziggurat: {not_used(info.kv_unsupported)}", err=True)
    if not settings.api_key and not settings.listen().local:
        click.echo("ziggurat: everybody who reaches this address can use the server: set an --api-key", err=True)
    click.echo(f"ziggurat: {_told(info)} at {url}/v1", err=True)


def _told(info: ModelInfo) -> str:
    requests = "one request" if info.parallel == 1 else f"{info.parallel} requests"
    return f"{info.description}, {requests} at a time of {info.n_ctx:,} tokens,"
