"""The ``ziggurat`` command: finds its subcommands, and turns every failure into one line and an exit code."""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from ziggurat.runtime.errors import ZigguratError

_GROUP = "ziggurat.commands"
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_BROKEN_PIPE = 141  # 128 + SIGPIPE

# Shown by --help without importing the command: some of them import torch or llama.cpp's bindings.
_SUMMARIES = {
    "convert": "Convert a Hugging Face model to a GGUF file.",
    "run": "Generate text from a prompt.",
    "chat": "Talk to a model in the terminal.",
    "serve": "Serve a model over an OpenAI-style API.",
    "eval": "Measure perplexity, divergence and retrieval.",
    "bench": "Measure speed and memory over context depth.",
    "plan": "Show what a model and its settings take in memory.",
    "inspect": "Show what is in a GGUF file.",
    "doctor": "Show which library and devices are used, and what is missing.",
}


class _ReaderLeft(Exception):
    """A broken pipe, under a name that click does not turn into exit code 1."""


class LazyGroup(click.Group):
    """A group whose commands are entry points, imported when they are called."""

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command; a reader of its output that leaves (``| head``) gets a status of its own."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            raise _ReaderLeft from None

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {entry.name: entry for entry in importlib.metadata.entry_points(group=_GROUP)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order a newcomer meets them, unknown ones last."""
        order = list(_SUMMARIES)
        return sorted(self._entry_points(), key=lambda name: (order.index(name) if name in order else len(order), name))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; a missing optional dependency is named."""
        entry = self._entry_points().get(cmd_name)
        if entry is None:
            return None
        try:
            command = entry.load()
        except ModuleNotFoundError as error:
            extra = " (pip install 'ziggurat[convert]')" if cmd_name == "convert" else ""
            raise ZigguratError(
                f"{cmd_name} needs the Python package {error.name}, which is not installed{extra}"
            ) from error
        if not isinstance(command, click.Command):
            raise ZigguratError(f"the entry point {entry.value} of {cmd_name} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing those whose summary is known."""
        rows = []
        for name in self.list_commands(ctx):
            summary = _SUMMARIES.get(name)
            if summary is None:
                summary = self._own_summary(ctx, name)
            rows.append((name, summary))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _own_summary(self, ctx: click.Context, name: str) -> str:
        try:
            command = self.get_command(ctx, name)
        except Exception as error:  # one broken command must not hide the others
            return f"(cannot be loaded: {error})"
        return command.get_short_help_str() if command else ""


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"ziggurat {importlib.metadata.version('ziggurat')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.option("--debug", is_flag=True, envvar="ZIGGURAT_DEBUG", expose_value=False, help="Show tracebacks of errors.")
def ziggurat() -> None:
    """Convert language models to GGUF and run them on llama.cpp."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ``ziggurat`` command and exit with its status. The console script's entry point."""
    sys.exit(run_command(ziggurat, "ziggurat", sys.argv[1:] if arguments is None else list(arguments)))


def run_command(command: click.Command, name: str, arguments: list[str]) -> int:
    """Run a click command the way all of ours end, and return the exit status.

    Errors are one line on stderr, ``name: error: …``, never a traceback unless ``--debug`` or ``ZIGGURAT_DEBUG`` asks
    for it. An exception class with an integer ``exit_code`` is taken as meant for people, whatever package it is from.
    """
    _make_output_safe()
    debug = "--debug" in arguments or bool(os.environ.get("ZIGGURAT_DEBUG"))
    try:
        result: Any = command.main(arguments, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return _INTERRUPTED
    except _ReaderLeft:
        # keep the interpreter from failing again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _BROKEN_PIPE
    except Exception as error:
        if debug:
            raise
        return _report(error, name)


def _report(error: Exception, name: str) -> int:
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see: {context.command_path} --help)" if context is not None else ""
        message, code = error.format_message() + hint, error.exit_code
    elif isinstance(getattr(error, "exit_code", None), int):
        message, code = str(error), error.exit_code  # type: ignore[attr-defined]
    else:
        message = f"{type(error).__name__}: {error} (a bug in Ziggurat; ZIGGURAT_DEBUG=1 shows where)"
        code = 1
    click.echo(f"{name}: error: {' '.join(message.split())}", err=True)
    return code


def _make_output_safe() -> None:
    """Text of a model may hold characters the terminal's encoding has not; show a mark instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
