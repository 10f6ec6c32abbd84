"""``ziggurat eval``: perplexity, divergence from a reference, multiple choice and retrieval, as a table and JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.options import CACHE_TYPES, device_options, kv_options, refuse_budgets

if TYPE_CHECKING:
    from ziggurat.runtime.bindings import Model
    from ziggurat.runtime.evaluate.decoder import DecodeSettings
    from ziggurat.runtime.evaluate.monitor import Monitor, Report

T = TypeVar("T")
_FILE = click.Path(path_type=Path)
_CTX = 512


@click.command("eval")
@click.argument("model", type=_FILE, metavar="MODEL.gguf")
@click.option("--text", type=_FILE, metavar="FILE", help="Measure perplexity on this UTF-8 text.")
@click.option(
    "--against",
    type=_FILE,
    metavar="REFERENCE",
    help="Compare with another GGUF, a Hugging Face folder, or a file of --save-logits.",
)
@click.option("--save-logits", type=_FILE, metavar="FILE", help="Keep the model's log-probabilities as a reference.")
@click.option("--chunks", type=click.IntRange(1), metavar="N", help="Use only the text's first N chunks.")
@click.option("--json", "json_file", type=_FILE, metavar="FILE", help="Write all figures there as JSON.")
@click.option("--plot", type=_FILE, metavar="FILE.png", help="Draw the figures.")
@click.option("--ctx", type=click.IntRange(4), metavar="N", help=f"Tokens per chunk of --text; default: {_CTX}.")
@click.option("--batch", type=click.IntRange(1), default=2048, show_default=True, metavar="N", help="Tokens per batch.")
@click.option(
    "--ubatch", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Tokens computed at once."
)
@click.option("--cache-type-k", type=click.Choice(CACHE_TYPES), default="f16", show_default=True, help="Type of K rows.")
@click.option("--cache-type-v", type=click.Choice(CACHE_TYPES), default="f16", show_default=True, help="Type of V rows.")
@kv_options
@device_options
@click.option("--verbose", is_flag=True, help="Show what the library logs.")
def evaluate(model: Path, **options: Any) -> int:
    """Measure the model in MODEL.gguf on a text, on questions, or on looking things up."""
    refuse_budgets({name: value for name, value in options.items() if name.startswith("kv_")})
    if options["verbose"]:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s", stream=sys.stderr)
    _check(options)
    figures: dict[str, Any] = {"model": str(model)}
    if options["text"] is not None:
        figures |= _text(model, options)
    _finish(figures, options)
    return 0


def _check(options: dict[str, Any]) -> None:
    """Refuse what cannot work before a model is loaded."""
    from ziggurat.runtime.files import check_target

    if options["text"] is None:
        raise InvalidRequestError("there is nothing to evaluate: give --text FILE")
    for name in ("json_file", "plot", "save_logits"):
        if options[name] is not None:
            check_target(options[name], "--" + name.replace("_file", "").replace("_", "-"))


def _settings(options: dict[str, Any]) -> DecodeSettings:
    from ziggurat.runtime.evaluate.decoder import DecodeSettings

    return DecodeSettings(
        n_batch=options["batch"],
        n_ubatch=options["ubatch"],
        type_k=options["cache_type_k"],
        type_v=options["cache_type_v"],
        threads=options["threads"],
    )


def _text(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    from ziggurat.runtime.evaluate.chunks import read_text
    from ziggurat.runtime.evaluate.reference import as_gguf

    text, against = read_text(options["text"]), options["against"]
    figures: dict[str, Any] = {"text": str(options["text"]), "reference": str(against) if against else None}
    with contextlib.ExitStack() as stack:
        if against is not None and against.is_dir():
            against = stack.enter_context(as_gguf(against, _note))
        figures |= _in_thread(lambda monitor: _measure_text(path, text, against, options, monitor))
    return figures


def _measure_text(
    path: Path, text: str, against: Path | None, options: dict[str, Any], monitor: Monitor
) -> dict[str, Any]:
    from ziggurat.runtime.evaluate.chunks import cut
    from ziggurat.runtime.evaluate.decoder import ChunkDecoder
    from ziggurat.runtime.evaluate.logits_file import LogitsWriter
    from ziggurat.runtime.evaluate.reference import fingerprint, open_reference
    from ziggurat.runtime.evaluate.text import evaluate_text

    settings = _settings(options)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_load(path, options, monitor))
        chunks = cut(model.vocab, text, options["ctx"] or _CTX, options["chunks"], source=str(options["text"]))
        if chunks.n_ctx > model.n_ctx_train > 0:
            _note(f"chunks of {chunks.n_ctx} tokens exceed the {model.n_ctx_train} the model was trained for")
        reference = writer = None
        if against is not None:
            opened = open_reference(
                against, model.vocab, chunks, settings, monitor, gpu_layers=options["gpu_layers"]
            )
            reference = stack.enter_context(opened)
        decoder = stack.enter_context(ChunkDecoder(model, chunks, settings, monitor))
        if (target := options["save_logits"]) is not None:
            writer = stack.enter_context(
                LogitsWriter(target, chunks, path.name, fingerprint(model.vocab), model.vocab.n_tokens)
            )
        result = evaluate_text(
            decoder, chunks, monitor, reference=reference, writer=writer, threads=settings.n_threads
        )
    return result.as_json()


def _load(path: Path, options: dict[str, Any], monitor: Monitor) -> Model:
    from ziggurat.runtime import plan
    from ziggurat.runtime.bindings import Model
    from ziggurat.runtime.errors import UnsupportedError
    from ziggurat.runtime.gguf_file import read_gguf

    file = read_gguf(path)
    with contextlib.suppress(UnsupportedError):  # no attention, no cache types to check
        shape = plan.kv_shape(file)
        plan.check_cache_types(shape, options["cache_type_k"], options["cache_type_v"])
    model = Model(path, gpu_layers=options["gpu_layers"], progress=monitor.loading)
    if not model.generates_text:
        model.close()
        raise UnsupportedError(f"{path}: a {file.architecture} model does not predict text token by token")
    return model


def _in_thread(work: Callable[[Monitor], T]) -> T:
    """Run the work beside the main thread, which shows its progress and stays free for Ctrl-C."""
    from ziggurat.runtime.evaluate.monitor import Monitor

    with _progress() as report:
        monitor = Monitor(report)
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work(monitor))
            except BaseException as error:
                done.set_exception(error)

        thread = threading.Thread(target=run, name="ziggurat-eval")
        thread.start()
        try:
            return done.result()
        finally:
            monitor.stop()
            thread.join()


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """Show a bar with the time left while stderr is a terminal, and nothing otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report


def _finish(figures: dict[str, Any], options: dict[str, Any]) -> None:
    """Show the tables, then write the files."""
    from rich.console import Console

    from ziggurat.runtime.evaluate import table
    from ziggurat.runtime.files import write_atomic

    console = Console(highlight=False)
    if "perplexity" in figures:
        console.print(table.text_table(figures, figures["text"]))
    if options["json_file"] is not None:
        content = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(options["json_file"], content.encode(), "--json")


def _note(message: str) -> None:
    click.echo(f"ziggurat: {message}", err=True)
