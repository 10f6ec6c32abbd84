"""``ziggurat doctor``: what this installation runs on, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from dataclasses import asdict
from typing import Any

import click

from ziggurat.runtime.errors import LibraryError

_SUPPORTED = "0.3.36"
_PACKAGES = ("ziggurat", "llama-cpp-python", "gguf", "numpy", "jinja2", "click", "rich", "psutil")
_CONVERT = ("torch", "transformers", "tokenizers", "safetensors", "sentencepiece", "huggingface-hub")
_LITTLE_MEMORY = 4 * 2**30


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def doctor(as_json: bool) -> int:
    """Show the library, devices, memory and packages in use; exit with 1 if nothing can run."""
    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0 if report["usable"] else 1


def examine() -> dict[str, Any]:
    """Return what ``doctor --json`` writes.

    ``problems`` are objects of ``severity`` (error, warning, note), ``what`` and ``remedy``; ``usable`` is false when
    the library cannot be loaded. Sizes in bytes. Imports neither torch nor transformers.
    """
    from ziggurat.runtime.hardware import default_threads, memory, nvidia_gpus

    total, available = memory()
    gpus = nvidia_gpus()
    problems: list[dict[str, str]] = []
    library, error = _library()
    report: dict[str, Any] = {
        "usable": error is None,
        "library": library,
        "gpus": [asdict(gpu) for gpu in gpus],
        "memory": {"total": total, "available": available},
        "cores": default_threads(),
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "packages": {name: _version(name) for name in _PACKAGES},
        "convert_packages": {name: _version(name) for name in _CONVERT},
        "problems": problems,
    }
    if error is not None:
        _note(problems, "error", str(error), "pip install ./patches")
    else:
        _check_library(library, {gpu.compute_capability for gpu in gpus}, problems)
    missing = [name for name, version in report["convert_packages"].items() if version is None]
    if missing:
        _note(problems, "note", f"convert needs {', '.join(missing)}", "pip install 'ziggurat[convert]'")
    if available < _LITTLE_MEMORY:
        _note(
            problems,
            "note",
            f"only {available / 2**30:.1f} GiB of memory are available",
            "close other programs, or take a smaller model or --ctx",
        )
    return report


def _library() -> tuple[dict[str, Any], LibraryError | None]:
    from ziggurat.runtime import bindings

    try:
        info = bindings.probe()
        return {
            **asdict(info),
            "patched": info.patched,
            "devices": [asdict(device) for device in bindings.devices()],
            "features": bindings.system_info(),
            "gpu_offload": bindings.supports_gpu_offload(),
            "kv_budgets": bindings.kv.available(),
        }, None
    except LibraryError as error:
        return {}, error


def _check_library(library: dict[str, Any], capabilities: set[str], problems: list[dict[str, str]]) -> None:
    from ziggurat.runtime.bindings.library import PATCHED_REMEDY

    if not library["patched"]:
        remedy = PATCHED_REMEDY.partition(": ")[2]
        _note(problems, "warning", "stock llama.cpp: everything works except convert and KV budgets", remedy)
    elif not library["kv_budgets"]:
        _note(problems, "warning", "these patches are too old for KV budgets", PATCHED_REMEDY.partition(": ")[2])
    if library["package_version"].partition("+")[0] != _SUPPORTED:
        what = f"llama-cpp-python {library['package_version']} is not the tested {_SUPPORTED}"
        _note(problems, "warning", what, f"pip install llama-cpp-python=={_SUPPORTED}")
    if capabilities and not library["gpu_offload"]:
        what = "there is an NVIDIA GPU, but the library was built without CUDA"
        # the setting's "on" builds for 8.6 alone
        wanted = "on" if capabilities == {"8.6"} else ",".join(sorted(c.replace(".", "") for c in capabilities))
        _note(problems, "warning", what, f"ZIGGURAT_CUDA={wanted} pip install --force-reinstall --no-deps ./patches")


def _note(problems: list[dict[str, str]], severity: str, what: str, remedy: str) -> None:
    problems.append({"severity": severity, "what": what, "remedy": remedy})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # paths are long, and their ends are what counts
    for label, value in _facts(report):
        table.add_row(Text(label, style="bold"), Text(value))
    console.print(table)
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for problem in report["problems"]:
        console.print()
        line = Text.assemble((problem["severity"], f"bold {colours[problem['severity']]}"), f": {problem['what']}")
        console.print(line, soft_wrap=True)
        console.print(Text(f"  {problem['remedy']}"), soft_wrap=True)  # unwrapped, so that it can be copied
    if not report["problems"]:
        console.print("\nNothing is missing.")


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    from ziggurat.runtime.sizes import human_bytes

    library = report["library"]
    facts: list[tuple[str, str]] = []
    if library:
        patches = f"patched (ziggurat {library['ziggurat_version']})" if library["patched"] else "stock"
        facts += [
            (
                "library",
                f"llama.cpp {library['llama_version']}, {patches}, llama-cpp-python {library['package_version']}",
            ),
            ("", library["path"]),
            ("KV budgets", "yes" if library["kv_budgets"] else "no"),
        ]
        for device in library["devices"]:
            free = human_bytes(device["memory_free"])
            memory = f", {free} free of {human_bytes(device['memory_total'])}" if device["memory_total"] else ""
            facts.append(("device", f"{device['name']} ({device['kind']}): {device['description']}{memory}"))
        facts += [(f"{backend} features", " ".join(names)) for backend, names in library["features"].items()]
    else:
        facts.append(("library", "cannot be loaded"))
    for gpu in report["gpus"]:
        memory = f"{human_bytes(gpu['memory_free'])} free of {human_bytes(gpu['memory_total'])}"
        facts.append(("GPU", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {memory}"))
    memory = f"{human_bytes(report['memory']['available'])} available of {human_bytes(report['memory']['total'])}"
    facts += [
        ("memory", memory),
        ("cores", str(report["cores"])),
        ("python", f"{report['python']['version']} on {report['python']['platform']}"),
        ("packages", ", ".join(f"{name} {version or 'missing'}" for name, version in report["packages"].items())),
    ]
    return facts
