"""The commands `convert` and `ziggurat convert`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
from rich.console import Console
from rich.table import Table

from ziggurat.converter.display import Display, duration_text, fitted_text, mix_table, size_text
from ziggurat.converter.errors import ConvertError
from ziggurat.converter.mix import target
from ziggurat.converter.prune import CRITERIA, prune_settings
from ziggurat.converter.prune_display import ReportOptions, removed_text, show_prune_report
from ziggurat.converter.recipes import FTYPES
from ziggurat.converter.report import Report


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--type",
    "type_name",
    type=click.Choice(list(FTYPES), case_sensitive=False),
    help="Quantization recipe, as llama.cpp names it.  [default: q4_k_m]",
)
@click.option("--bpw", type=float, metavar="X", help="Choose each tensor's type for so many bits per weight instead.")
@click.option("--size", metavar="33GB|33GiB", help="Choose each tensor's type for a file of at most this size instead.")
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Importance matrix in llama.cpp's GGUF form; default: gathered on the calibration text.",
)
@click.option("--no-imatrix", is_flag=True, help="Quantize without an importance matrix.")
@click.option(
    "--export-imatrix",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the gathered importance matrix too.",
)
@click.option("--no-awq", is_flag=True, help="Quantize without activation-aware scales.")
@click.option("--prune", metavar="N|N%", help="Remove this many blocks, or this share of them, and repair the rest.")
@click.option("--prune-blocks", metavar="LIST", help="Remove these blocks, counted from 0: 5,8-10.")
@click.option("--prune-by", type=click.Choice(CRITERIA), help="What --prune chooses blocks by.  [default: influence]")
@click.option("--no-repair", is_flag=True, help="Leave the blocks that stay as they are.")
@click.option(
    "--prune-report", is_flag=True, help="Write no model: measure what removing 1, 2, … blocks (up to --prune) costs."
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the --prune-report there.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Text file, or folder of them, to measure the model on; default: a text that ships with Ziggurat.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(16),
    default=16384,
    show_default=True,
    metavar="N",
    help="Use at most so many tokens of it.",
)
@click.option(
    "--calibration-sequence",
    type=click.IntRange(8),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens in each of its sequences.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses its sequences.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to run the model on it.")
@click.option("--pre", metavar="NAME", help="Pre-tokenizer to write instead of the recognized one.")
@click.option("--name", metavar="TEXT", help="Model name to write; default: from the model card or the folder.")
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE.json", help="Write the report there as JSON.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Workers; default: all cores.")
@click.option("--force", is_flag=True, help="Replace an existing output file.")
@click.option(
    "--ignore-code", is_flag=True, help="Convert a checkpoint that brings its own Python code, without that code."
)
@click.option("--verbose", "-v", is_flag=True, help="Show what the libraries log.")
@click.option("--debug", is_flag=True, help="Show a traceback on errors.")
def convert(  # noqa: PLR0913 - one parameter per option
    model: str, out: Path | None, type_name: str | None, bpw: float | None, size: str | None,
    imatrix: Path | None, no_imatrix: bool,
    export_imatrix: Path | None, no_awq: bool,
    prune: str | None, prune_blocks: str | None, prune_by: str | None, no_repair: bool, prune_report: bool,
    plot: Path | None, calibration: Path | None, calibration_tokens: int, calibration_sequence: int, seed: int,
    device: str, pre: str | None, name: str | None, report: Path | None, threads: int | None, force: bool,
    ignore_code: bool, verbose: bool, debug: bool,
) -> None:  # fmt: skip
    """Convert MODEL, a Hugging Face folder or hub id, to the GGUF file OUT."""
    console = Console(stderr=True, highlight=False)
    if imatrix is not None and no_imatrix:
        raise click.UsageError("--imatrix and --no-imatrix exclude each other")
    if type_name is not None and (bpw is not None or size is not None):
        raise click.UsageError("--type is a recipe of its own: leave it out, or --bpw and --size")
    if out is None and not prune_report:
        raise click.UsageError("Missing argument 'OUT'.")
    if prune_report and (out is not None or prune_blocks is not None):
        raise click.UsageError("--prune-report writes no model and tries the blocks itself: no OUT, no --prune-blocks")
    if plot is not None and not prune_report:
        raise click.UsageError("--plot belongs to --prune-report")
    with _errors_as_lines(console, out, debug=debug), _signals_as_exceptions(), warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")  # libraries warn their users, the programmers, not ours
        _quiet_libraries(verbose=verbose)
        from ziggurat.converter.calibration_text import TextSettings
        from ziggurat.converter.pipeline import DEFAULT_TYPE, ConvertSettings
        from ziggurat.converter.pipeline import convert as run

        text = TextSettings(calibration, calibration_tokens, calibration_sequence, seed)
        if out is None:
            how = ReportOptions(model, prune, prune_by, not no_repair, text, device, threads, ignore_code, report, plot)
            show_prune_report(console, how)
            return
        settings = ConvertSettings(
            type=(type_name or DEFAULT_TYPE).lower(), size=target(bpw, size), imatrix=imatrix,
            gather_imatrix=not no_imatrix, export_imatrix=export_imatrix, awq=not no_awq, pre=pre,
            name=name, threads=threads, report=report, force=force,
            ignore_code=ignore_code, prune=prune_settings(prune, prune_blocks, prune_by, repair=not no_repair),
            calibration=text, device=device,
        )  # fmt: skip
        with Display(console) as display:
            result = run(model, out, settings, display)
        _print_report(console, result)


def main() -> None:
    """Entry point of `convert`; a wrong call is one line as well."""
    try:
        convert.main(prog_name="convert", standalone_mode=False)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as e:
        click.echo(f"convert: error: {' '.join(e.format_message().split())} (see: convert --help)", err=True)
        sys.exit(e.exit_code)


@contextmanager
def _errors_as_lines(console: Console, out: Path | None, *, debug: bool) -> Iterator[None]:
    """Every failure is one line and a non-zero exit code."""
    try:
        yield
    except (ConvertError, KeyboardInterrupt, MemoryError) as e:
        if debug:
            raise
        if isinstance(e, KeyboardInterrupt):
            _fail(console, f"interrupted, nothing was written{_kept(out)}", 130)
        if isinstance(e, MemoryError):
            advice = "close other programs or convert on a larger machine"
            _fail(console, f"out of memory, nothing was written: {advice}{_kept(out)}")
        _fail(console, str(e))
    except Exception as e:
        if debug:
            raise
        _fail(console, f"unexpected {type(e).__name__}: {e} (this is a bug of Ziggurat; --debug shows where)")


def _kept(out: Path | None) -> str:
    """What an interrupted conversion to `out` leaves to go on from, for the end of a message."""
    if out is None or "ziggurat.converter.pipeline" not in sys.modules:  # before that there is nothing
        return ""
    from ziggurat.converter.calibration_work import kept_text
    from ziggurat.converter.pipeline import work_folder

    return kept_text(work_folder(out))


def _fail(console: Console, message: str, code: int = 1) -> NoReturn:
    console.print(f"convert: error: {' '.join(message.split())}", style=None, markup=False, soft_wrap=True)
    sys.exit(code)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let a polite kill and a terminal that closes clean up like Ctrl-C; what nohup ignores stays ignored."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    old = [(number, signal.signal(number, interrupt)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in old:
            signal.signal(number, handler)


def _quiet_libraries(*, verbose: bool) -> None:
    """Libraries neither talk to the user nor report to anyone; comes before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.ERROR, format="%(name)s: %(message)s", stream=sys.stderr
    )
    if verbose:
        return
    logging.getLogger("ziggurat").setLevel(logging.WARNING)
    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it tells at once that torch is missing
    with contextlib.suppress(ImportError):  # who needs them says so
        import huggingface_hub  # noqa: F401 - it sets its own level when it is imported
        import transformers

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each retry, with page-long addresses
        transformers.logging.set_verbosity_error()


def _print_report(console: Console, report: Report) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("type", "tensors", "parameters", "size"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for name, share in report.types.items():
        table.add_row(name, str(share.tensors), f"{share.parameters / 1e6:.2f} M", size_text(share.bytes))
    console.print(table)
    if report.prune is not None:
        console.print(removed_text(report.prune), soft_wrap=True)
    if report.calibration is not None:
        console.print(fitted_text(report), soft_wrap=True)
    if report.mix is not None:
        console.print(mix_table(report.mix))
        if report.mix.note is not None:
            console.print(f"note: {report.mix.note}", soft_wrap=True)
    pre = f", pre-tokenizer {report.pre_tokenizer}" if report.pre_tokenizer else ""
    console.print(
        f"{report.output}: {report.name or report.architecture}, {report.type}, {size_text(report.output_bytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight, tokenizer {report.tokenizer}{pre}, "
        f"{duration_text(report.seconds)}", soft_wrap=True,
    )  # fmt: skip
