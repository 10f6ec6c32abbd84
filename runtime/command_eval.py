"""``ziggurat eval``: perplexity, divergence from a reference, multiple choice and retrieval, as a table and JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ziggurat.runtime.background import in_thread, kill_as_interrupt, progress
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.eval_options import FILE, choices_options, compute_options, needle_options, text_options
from ziggurat.runtime.options import device_options, kv_options

if TYPE_CHECKING:
    from ziggurat.runtime.eval_parts import NeedleGrid
    from ziggurat.runtime.kv_policy import KVPolicy

_PARTS = ("text", "choices", "needle", "generate_needle")
_NEEDLE_ONLY = ("needle_lengths", "needle_text", "needle_fact", "needle_question")
_INPUTS = ("text", "against", "choices", "needle_text")
_OUTPUTS = ("json_file", "plot", "save_logits", "generate_needle")
_NEEDS = {"against": "text", "save_logits": "text", "chunks": "text", "limit": "choices", "choices_prompt": "choices"}


@click.command("eval")
@click.argument("model", type=FILE, metavar="MODEL.gguf")
@text_options
@choices_options
@needle_options
@click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write all figures there as JSON.")
@click.option("--plot", type=FILE, metavar="FILE.png", help="Draw the figures.")
@compute_options
@kv_options
@device_options
@click.option("--verbose", is_flag=True, help="Show what the library logs.")
def evaluate(model: Path, **options: Any) -> int:
    """Measure the model in MODEL.gguf on a text, on questions, or on looking things up.

    With a KV budget, --text scores what follows an evicted prompt: the first half of each chunk is read as one prompt,
    the second half token by token; the reference of --against keeps every row. --needle and --choices read each
    document or question as a prompt.
    """
    from ziggurat.runtime import eval_parts
    from ziggurat.runtime.eval_parts import measure_choices
    from ziggurat.runtime.evaluate.chunks import read_text

    options["kv"] = _policy(options)
    if options["verbose"]:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s", stream=sys.stderr)
    _check(model, options)
    eval_parts.checked(model, options)
    # all parts are read before one is measured, so that a mistake in the last does not cost the work on the first
    text = read_text(options["text"]) if options["text"] is not None else None
    questions = eval_parts.questions(options) if options["choices"] is not None else None
    asks = options["needle"] or options["generate_needle"] is not None
    grid = eval_parts.NeedleGrid(model, options, _note) if asks else None
    figures: dict[str, Any] = {"model": str(model)}
    with kill_as_interrupt():
        if text is not None:
            figures |= _text(model, text, options)
        if questions is not None:
            figures["choices"] = in_thread(
                lambda monitor: measure_choices(model, questions, options, monitor, _note), "ziggurat-eval"
            )
        if grid is not None:
            _needle(grid, options, figures)
        if options["kv"] is not None:  # it still is if the model can have one
            figures["kv"] = options["kv"].as_json()
        _finish(figures, options)
    return 0


def _policy(options: dict[str, Any]) -> KVPolicy | None:
    from ziggurat.runtime.bindings import kv
    from ziggurat.runtime.kv_policy import policy_of

    policy = policy_of(options)
    if policy is not None:
        kv.require()
    return policy


def _check(model: Path, options: dict[str, Any]) -> None:
    """Refuse what cannot work before a model is loaded."""
    from ziggurat.runtime.evaluate.plot import check_available
    from ziggurat.runtime.files import check_target

    if not any(options[part] for part in _PARTS):
        raise InvalidRequestError("there is nothing to evaluate: give --text FILE, --choices FILE or --needle")
    for name, part in _NEEDS.items():
        if options[name] is not None and options[part] is None:
            raise InvalidRequestError(f"--{name.replace('_', '-')} belongs to --{part}, which is not given")
    if not options["needle"] and options["generate_needle"] is None:
        for name in _NEEDLE_ONLY:
            if options[name] is not None:
                raise InvalidRequestError(f"--{name.replace('_', '-')} belongs to --needle, which is not given")
    against = options["against"]
    if against is not None and not against.exists():
        raise InvalidRequestError(f"--against {against}: does not exist")
    taken = {path.resolve() for path in (model, *(options[name] for name in _INPUTS)) if path is not None}
    for name in _OUTPUTS:
        if options[name] is not None:
            option = "--" + name.replace("_file", "").replace("_", "-")
            check_target(options[name], option)
            if options[name].resolve() in taken:
                raise InvalidRequestError(f"{option} {options[name]}: is read or written already; give another name")
            taken.add(options[name].resolve())
    if options["plot"] is not None:
        check_available()
        if not any(options[part] for part in _PARTS if part != "generate_needle"):
            raise InvalidRequestError("--plot has nothing to draw: add --text, --choices or --needle")


def _text(path: Path, text: str, options: dict[str, Any]) -> dict[str, Any]:
    from ziggurat.runtime.eval_parts import measure_text
    from ziggurat.runtime.evaluate.reference import as_gguf

    against = options["against"]
    figures: dict[str, Any] = {"text": str(options["text"])}
    if against is not None:
        figures["reference"] = str(against)
    with contextlib.ExitStack() as stack:
        if against is not None and against.is_dir():
            against = stack.enter_context(as_gguf(against, _note))
        figures |= in_thread(
            lambda monitor: measure_text(path, text, against, options, monitor, _note), "ziggurat-eval"
        )
    return figures


def _needle(grid: NeedleGrid, options: dict[str, Any], figures: dict[str, Any]) -> None:
    from ziggurat.runtime.evaluate.monitor import Monitor
    from ziggurat.runtime.files import write_atomic

    target = options["generate_needle"]
    if target is not None:
        write_atomic(target, grid.jsonl().encode(), "--generate-needle")
        _note(f"{len(grid.needles)} documents in {target}")
    if options["needle"]:
        with progress() as report:  # the engine has a thread of its own, so Ctrl-C arrives here
            figures["needle"] = grid.measure(Monitor(report))


def _finish(figures: dict[str, Any], options: dict[str, Any]) -> None:
    """Show the tables, then write the files."""
    from rich.console import Console

    from ziggurat.runtime.evaluate import plot, table
    from ziggurat.runtime.files import write_atomic

    console = Console(highlight=False)
    if "perplexity" in figures:
        console.print(table.text_table(figures, figures["text"]))
    if "choices" in figures:
        console.print(table.choices_table(figures["choices"], figures["choices"]["file"]))
    for grid in table.needle_tables(figures["needle"]) if "needle" in figures else ():
        console.print(grid)
    if options["json_file"] is not None:
        content = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(options["json_file"], content.encode(), "--json")
    if options["plot"] is not None:
        write_atomic(options["plot"], plot.draw(figures), "--plot")


def _note(message: str) -> None:
    click.echo(f"ziggurat: {message}", err=True)
