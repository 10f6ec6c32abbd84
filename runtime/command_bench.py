"""``ziggurat bench``: prompt and decode rates over depths, streams, budgets and row types, beside what is possible."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ziggurat.runtime.bench_options import (
    FILE,
    MEASURED,
    axis_options,
    context_options,
    output_options,
    roof_options,
    work_options,
)
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.options import SectionedCommand

if TYPE_CHECKING:
    from ziggurat.runtime.bench.axes import Axes, Work
    from ziggurat.runtime.bench.bandwidth import Bandwidth
    from ziggurat.runtime.bench.report import Report
    from ziggurat.runtime.bench.roof import RoofLine
    from ziggurat.runtime.evaluate.monitor import Monitor
    from ziggurat.runtime.gguf_file import GGUFFile
    from ziggurat.runtime.plan.roofline import Demand, Device

_OUTPUTS = {"json_file": "--json", "csv_file": "--csv", "plot": "--plot"}


@click.command(cls=SectionedCommand)
@click.argument("model", type=FILE, metavar="[MODEL.gguf]", required=False)
@work_options
@axis_options
@context_options
@roof_options
@output_options
def bench(model: Path | None, **options: Any) -> int:
    """Measure how fast MODEL.gguf reads prompts (pp) and generates (tg).

    Settings take turns, in one order and then in the other; shown are medians with quartiles, of all streams together,
    and each setting's ratio to the first one, turn by turn. Long caches are filled with the rows of a short text.

    --roofline alone measures nothing for another device than this one, and takes a checkpoint's folder or config.json,
    or a --shape, as well.
    """
    from ziggurat.runtime.background import kill_as_interrupt
    from ziggurat.runtime.bench.axes import axes_of
    from ziggurat.runtime.bindings import kv

    if options["verbose"]:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s", stream=sys.stderr)
    axes, work = axes_of(options)
    _check(model, options)
    measures = _is_gguf(model) and _here(options)
    if measures and axes.budgeted:
        kv.require()
    with kill_as_interrupt():
        if measures:
            assert model is not None
            report, line = _measured(model, axes, work, options)
            _finish(report, line, options)
        else:
            demand, device = _demand(model, options), _device(options, work)
            _finish(None, _line(demand, device, axes, work), options)
    return 0


def _check(model: Path | None, options: dict[str, Any]) -> None:
    """Refuse what cannot work before anything is measured."""
    from ziggurat.runtime.bench.plot import FORMATS
    from ziggurat.runtime.evaluate.plot import check_available
    from ziggurat.runtime.files import check_target

    is_file = _is_gguf(model)
    if (model is None) == (options["shape"] is None):
        raise InvalidRequestError("give a MODEL.gguf" + (" or a --shape, not both" if model else ", or a --shape"))
    if not options["roofline"]:
        for name in ("device", "shape", "blocks", "bpw", "type_name"):
            if options[name] is not None:
                flag = "--type" if name == "type_name" else f"--{name}"
                raise InvalidRequestError(f"{flag} belongs to --roofline, which is not given")
        if not is_file:
            raise InvalidRequestError(f"{model}: is a checkpoint; only a GGUF file can be measured, convert it first")
    if is_file:
        for name in ("blocks", "bpw", "type_name"):
            if options[name] is not None:
                flag = "--type" if name == "type_name" else f"--{name}"
                raise InvalidRequestError(f"{flag} is for shapes and configs; a GGUF file says that itself")
    if options["bpw"] is not None and options["type_name"] is not None:
        raise InvalidRequestError("--bpw and --type: give one of them")
    taken = {model.resolve()} if model is not None else set()
    for name, flag in _OUTPUTS.items():
        if options[name] is not None:
            check_target(options[name], flag)
            if options[name].resolve() in taken:
                raise InvalidRequestError(f"{flag} {options[name]}: is read or written already; give another name")
            taken.add(options[name].resolve())
    if options["plot"] is not None:
        if options["plot"].suffix.lower().removeprefix(".") not in FORMATS:
            raise InvalidRequestError(f"--plot {options['plot']}: give a name that ends in .png or .svg")
        check_available()


def _is_gguf(model: Path | None) -> bool:
    return model is not None and not model.is_dir() and model.suffix != ".json"


def _here(options: dict[str, Any]) -> bool:
    """Whether the model is to be measured: always, unless the roof is that of a device which this machine has not."""
    from ziggurat.runtime import hardware
    from ziggurat.runtime.bindings import supports_gpu_offload
    from ziggurat.runtime.plan.roofline import DEVICES

    name = options["device"]
    if not options["roofline"] or name in (None, MEASURED):
        return True
    return supports_gpu_offload() and any(
        DEVICES[name].name.upper() in gpu.name.upper().split() for gpu in hardware.nvidia_gpus()
    )


def _measured(path: Path, axes: Axes, work: Work, options: dict[str, Any]) -> tuple[Report, RoofLine | None]:
    """Measure the machine, then the model."""
    from ziggurat.runtime import plan
    from ziggurat.runtime.background import in_thread
    from ziggurat.runtime.bench.memory import check_memory
    from ziggurat.runtime.errors import UnsupportedError
    from ziggurat.runtime.gguf_file import read_gguf
    from ziggurat.runtime.plan.roofline import DEVICES
    from ziggurat.runtime.plan.shapes import gguf_demand

    file = read_gguf(path)
    if options["roofline"] and options["device"] in (None, MEASURED) and _on_gpu(options):
        known = ", ".join(DEVICES)
        raise InvalidRequestError(
            f"--roofline: the model runs on a GPU, whose memory is not measured here: give --device ({known}), or"
            " --gpu-layers 0"
        )
    try:
        shape = plan.kv_shape(file)
    except UnsupportedError:
        shape = None
    for setting in axes.settings:
        if shape is not None:
            plan.check_cache_types(shape, setting.type_k, setting.type_v)
    check_memory(file, axes, work, options["gpu_layers"])
    trained, deepest = shape.n_ctx_train if shape is not None else 0, max(place.depth for place in axes.places)
    if deepest > trained > 0:
        _note(f"depths of {deepest} tokens exceed the {trained} that the model was trained for; rates are as they are")
    report = in_thread(lambda monitor: _bench(file, shape, axes, work, options, monitor), "ziggurat-bench")
    if not options["roofline"]:
        return report, None
    return report, _line(gguf_demand(file), _device(options, work, report.bandwidth), axes, work, report)


def _on_gpu(options: dict[str, Any]) -> bool:
    from ziggurat.runtime.bindings import supports_gpu_offload

    return supports_gpu_offload() and options["gpu_layers"] != 0


def _bench(file: GGUFFile, shape: Any, axes: Axes, work: Work, options: dict[str, Any], monitor: Monitor) -> Report:
    from ziggurat.runtime.bench.bandwidth import measure_bandwidth
    from ziggurat.runtime.bench.machine import describe
    from ziggurat.runtime.bench.report import About, Report
    from ziggurat.runtime.bench.runner import run
    from ziggurat.runtime.bindings import Model, devices, kv
    from ziggurat.runtime.errors import UnsupportedError
    from ziggurat.runtime.plan.shapes import gguf_demand

    gpus = [device.name for device in devices() if device.kind in ("gpu", "igpu")]
    on_gpu = _on_gpu(options)
    bandwidth = None if on_gpu else measure_bandwidth(max(work.threads))
    with Model(file.path, gpu_layers=options["gpu_layers"], progress=monitor.loading) as model:
        if not model.generates_text:
            raise UnsupportedError(f"{file.path}: a {file.architecture} model does not predict text token by token")
        if axes.budgeted and (reason := kv.unsupported(model)) is not None:
            raise UnsupportedError(f"{file.path}: this model cannot have a KV budget: {reason}; leave out --kv-budget")
        results = run(model, shape, axes, work, monitor)
        if bandwidth is not None:  # once more: what else ran on the machine before may be gone
            bandwidth = max(bandwidth, measure_bandwidth(bandwidth.threads), key=lambda each: each.bytes_per_second)
        about = About(
            str(file.path), model.description, model.n_bytes, model.n_params, ",".join(gpus) if on_gpu else "CPU"
        )
    return Report(about, gguf_demand(file), work, tuple(results), bandwidth, describe())


def _demand(model: Path | None, options: dict[str, Any]) -> Demand:
    from ziggurat.runtime.plan import shapes
    from ziggurat.runtime.plan.planner import DEFAULT_FILE_TYPE

    if model is not None and _is_gguf(model):
        return shapes.file_demand(model)
    given: dict[str, Any] = {"blocks": options["blocks"], "bpw": options["bpw"]}
    given["type_name"] = options["type_name"] or DEFAULT_FILE_TYPE
    if model is not None:
        return shapes.folder_demand(model, **given)
    return shapes.shape_demand(options["shape"], **given)


def _device(options: dict[str, Any], work: Work, bandwidth: Bandwidth | None = None) -> Device:
    from ziggurat.runtime import hardware
    from ziggurat.runtime.bench.bandwidth import measure_bandwidth
    from ziggurat.runtime.plan.roofline import DEVICES, Device

    if options["device"] not in (None, MEASURED):
        return DEVICES[options["device"]]
    found = bandwidth or measure_bandwidth(max(work.threads))
    threads = "one thread" if found.threads == 1 else f"{found.threads} threads"
    title = f"this machine's memory, {threads}"
    return Device(MEASURED, title, found.bytes_per_second, hardware.memory()[0], None, found.method)


def _line(demand: Demand, device: Device, axes: Axes, work: Work, report: Report | None = None) -> RoofLine:
    from ziggurat.runtime.bench.roof import roofline

    return roofline(demand, device, axes, work, report.results if report is not None else ())


def _finish(report: Report | None, line: RoofLine | None, options: dict[str, Any]) -> None:
    """Show the tables, then write the files."""
    from ziggurat.runtime.bench import plot
    from ziggurat.runtime.bench.report import roof_markdown
    from ziggurat.runtime.files import write_atomic

    if report is not None:
        click.echo(report.markdown())
        if report.bandwidth is not None:
            _note(_bandwidth_note(report.bandwidth))
        _note(f"peak memory of the process: {_human(max(result.peak_bytes for result in report.results))}")
    if line is not None:
        click.echo(("\n" if report is not None else "") + roof_markdown(line))
        _note(_device_note(line))
    content: dict[str, Any] = report.as_json() if report is not None else {}
    if line is not None:
        content["roofline"] = line.as_json()
    if options["json_file"] is not None:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(options["json_file"], text.encode(), "--json")
    if options["csv_file"] is not None and report is not None:
        write_atomic(options["csv_file"], report.csv().encode(), "--csv")
    if options["plot"] is not None:
        results = report.results if report is not None else ()
        kind = options["plot"].suffix.lower().removeprefix(".")
        write_atomic(options["plot"], plot.draw(_title(report, line), results, line, kind), "--plot")


def _title(report: Report | None, line: RoofLine | None) -> str:
    model = Path(report.about.path).name if report is not None else line.demand.name if line is not None else ""
    return model if line is None else f"{model}, roof of {line.device.title}"


def _bandwidth_note(bandwidth: Bandwidth) -> str:
    threads = "one thread reads" if bandwidth.threads == 1 else f"{bandwidth.threads} threads read"
    return (
        f"memory: {threads} {bandwidth.bytes_per_second / 1e9:.1f} GB/s ({bandwidth.method} of"
        f" {_human(bandwidth.buffer_bytes)}); share: of that, by the weights and rows that a step reads"
    )


def _device_note(line: RoofLine) -> str:
    from ziggurat.runtime.plan.roofline import RESERVE

    device = line.device
    flops = "computing not bounded" if device.flops is None else f"{device.flops / 1e12:.1f} TFLOPS f16"
    return (
        f"{device.title}: {device.bandwidth / 1e9:.1f} GB/s, {_human(device.memory)}, {flops} ({device.source});"
        f" weights {_human(line.demand.resident)}; fit: streams of this depth beside them and"
        f" {_human(RESERVE)} for the rest"
    )


def _human(size: float) -> str:
    from ziggurat.runtime.sizes import human_bytes

    return human_bytes(size)


def _note(message: str) -> None:
    click.echo(f"ziggurat: {message}", err=True)
