"""The order of a conversion: open, plan, choose types, check, write. The work itself is in the modules it calls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ziggurat.converter import depth, fit_cost, fitting, hub, mixing, quantize, recipes, surgery, upstream
from ziggurat.converter.calibrate import CalibrateSettings
from ziggurat.converter.calibration_text import TextSettings
from ziggurat.converter.calibration_work import discard
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.errors import ConvertError, ImatrixError, OutputError, TokenizerError
from ziggurat.converter.imatrix import read_imatrix
from ziggurat.converter.loadable import check_loadable
from ziggurat.converter.mix import Target
from ziggurat.converter.prune import PruneSettings
from ziggurat.converter.report import Estimate, Report, estimate, peak_memory_bytes, share_by_type, write_json
from ziggurat.converter.tuning_record import CompensationRecord
from ziggurat.converter.write import GGUFFile, check_target, real

DEFAULT_TYPE = "q4_k_m"


@dataclass(frozen=True)
class ConvertSettings:
    """How to convert; the defaults are those of the command."""

    type: str = DEFAULT_TYPE
    """A key of `recipes.FTYPES`."""
    size: Target | None = None
    """Choose types by measured losses for a file of this size instead."""
    imatrix: Path | None = None
    """Importance matrix in llama.cpp's GGUF form."""
    gather_imatrix: bool = True
    """Gather one on the calibration text where there is no such file."""
    export_imatrix: Path | None = None
    """Where to write the gathered one too, in llama.cpp's GGUF form."""
    awq: bool = True
    """Fit the weights to the activations of the calibration text: scales, and compensation of errors."""
    compensate: bool = True
    """Whether errors are compensated as well."""
    pre: str | None = None
    """Pre-tokenizer name to write instead of the recognized one."""
    name: str | None = None
    """Model name in the metadata; default: from the model card or the folder."""
    threads: int | None = None
    """Workers; default: all cores this process may use."""
    report: Path | None = None
    """Where to write the report as JSON."""
    force: bool = False
    """Replace an existing output file."""
    ignore_code: bool = False
    """Convert a checkpoint that brings its own Python code as what its architecture's name says, without that code."""
    prune: PruneSettings | None = None
    """Which blocks to remove; None: none."""
    calibration: TextSettings = TextSettings()
    """The text that is run through the model where something is measured on it."""
    device: str = "cpu"
    """Where it is run: `cpu` or `cuda`."""


class Progress(Protocol):
    """Who wants to see how far a conversion is."""

    def planned(self, estimate: Estimate) -> None:
        """Everything was checked; the heavy work starts now."""

    def advance(self, parameters: int, tensor: str) -> None:
        """`parameters` more are in the file; `tensor` is being written."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins that runs the calibration text."""

    def step(self, count: int, what: str) -> None:
        """`count` more of its steps are done; `what` is being worked on."""


class _Silent:
    def planned(self, estimate: Estimate) -> None: ...

    def advance(self, parameters: int, tensor: str) -> None: ...

    def stage(self, name: str, total: int) -> None: ...

    def step(self, count: int, what: str) -> None: ...


def convert(
    model: str | Path,
    out: str | Path,
    settings: ConvertSettings | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a Hugging Face checkpoint to a GGUF file.

    Args:
        model: a local folder or a hub id `owner/name[@revision]`.
        out: the GGUF to write; it appears only when it is complete.
        settings: how; default `ConvertSettings()`.
        progress: who is told about it.

    Raises:
        ConvertError: the input, the settings or the output place will not do; nothing was written.
    """
    settings, progress, out = settings or ConvertSettings(), progress or _Silent(), Path(out)
    start = time.perf_counter()
    if settings.type not in recipes.FTYPES:
        raise ConvertError(f"there is no type {settings.type!r}: choose one of {', '.join(recipes.FTYPES)}")
    _check_names(settings)
    _check_outputs(out, settings)
    checkpoint = open_checkpoint(hub.resolve(model), ignore_code=settings.ignore_code)
    if out.resolve() in {tensor.file.resolve() for tensor in checkpoint.tensors.values()}:
        raise OutputError(f"{out} is a part of the checkpoint: name another file")
    importance = None if settings.imatrix is None else read_imatrix(settings.imatrix)

    base = settings.type if settings.type in recipes.FLOAT_TYPES else "bf16"
    plan = upstream.plan(checkpoint, base, pre=settings.pre, name=settings.name, called=hub.called(model))
    if settings.pre is not None and plan.value("tokenizer.ggml.pre") != settings.pre:
        kind = plan.value("tokenizer.ggml.model")
        raise TokenizerError(f"a tokenizer of the kind {kind!r} has no pre-tokenizer to name: leave --pre out")
    _check_importance(plan, importance)
    wanted = _fit_settings(settings)
    if wanted.needed or settings.size is not None:
        fitting.check(checkpoint)
    threads = settings.threads or len(os.sched_getaffinity(0))
    work, shape = work_folder(out), plan.model_shape()
    calibrate = CalibrateSettings(device=settings.device, threads=settings.threads, work=work)
    measuring = depth.Measuring(checkpoint, settings.calibration, calibrate, progress)

    def choose_types(removed: tuple[int, ...] = ()) -> tuple[str, list[int], mixing.Mixer | None]:
        names = fitting.importance_names(checkpoint, plan, removed) if wanted.importance else importance
        if settings.size is None:
            return settings.type, recipes.choose(plan, settings.type, imatrix=names, shape=shape), None
        recipe = mixing.nearest_recipe(plan, settings.size, names, shape)
        types = recipes.choose(plan, recipe, imatrix=names, shape=shape)
        measured = mixing.measurable(measuring, plan, removed)
        return recipe, types, mixing.Mixer(settings.size, plan, types, measured, names or ())

    (recipe, types, mixer), pruned = choose_types(), None
    if settings.prune is not None:
        n_layer = surgery.block_count(plan)
        pruned = depth.prune(checkpoint, plan, settings.prune, measuring)
        plan = pruned.plan
        if importance is not None:
            importance = surgery.renumber_keys(importance, n_layer, pruned.record.blocks)
        recipe, types, mixer = choose_types(pruned.record.blocks)

    def planned(file: GGUFFile) -> None:
        file.write_header()
        check_loadable(file.partial)
        if mixer is not None:
            mixer.capacity(file.header_bytes)
        weighted = wanted.importance or importance is not None
        expected = estimate(plan, types, file.sizes, checkpoint.nbytes, threads=threads, weighted=weighted)
        if wanted.needed:
            expected = fit_cost.add_cost(expected, plan, measuring, wanted, mixed=mixer is not None)
        progress.planned(expected)

    def open_file() -> GGUFFile:
        layout = [(t.name, t.shape, type_id) for t, type_id in zip(plan.tensors, types, strict=True)]
        return GGUFFile(out, plan.arch, _metadata(plan, settings, recipe), layout)

    fitted = mixed = None
    removed, folds = ((), {}) if pruned is None else (pruned.record.blocks, pruned.folds)
    measured = wanted.needed or mixer is not None
    if measured:
        with open_file() as file:  # what it refuses, it refuses now
            planned(file)
    whole, given = plan, importance
    if wanted.needed:
        first = wanted if mixer is None else dataclasses.replace(wanted, compensate=False)
        fitted = fitting.fit(plan, types, first, measuring, importance=given, removed=removed, folds=folds)
        plan, importance = fitted.plan, fitted.importance
    if mixer is not None:
        if wanted.compensates:  # as long as what will be said of it
            plan = dataclasses.replace(plan, metadata={**plan.metadata, **CompensationRecord(0, 0).metadata()})
        with open_file() as file:  # for the length of what comes before the tensors
            file.write_header()
        columns = {} if fitted is None else fitted.columns
        types, mixed = mixer.choose(file.header_bytes, measuring, importance, columns, removed=removed, folds=folds)
        if fitted is not None and wanted.compensates:
            fitted = fitting.compensate(
                fitted, whole, types, wanted, measuring, importance=given, removed=removed, folds=folds
            )
            plan = fitted.plan
    with open_file() as file:
        if measured:
            file.write_header()
        else:
            planned(file)
        with contextlib.closing(quantize.stream(plan.tensors, types, threads=threads, importance=importance)) as slabs:
            for slab in slabs:
                file.write(slab.data)
                progress.advance(slab.elements, slab.tensor.name)
        output_bytes = file.commit()
    discard(work)

    report = Report(
        model=str(model),
        output=str(out),
        architecture=plan.arch,
        name=str(plan.value("general.name", "")),
        type=settings.type if mixed is None else f"a mix nearest to {recipe}",
        tokenizer=str(plan.value("tokenizer.ggml.model", "")),
        pre_tokenizer=plan.value("tokenizer.ggml.pre"),
        parameters=plan.parameters,
        source_bytes=checkpoint.nbytes,
        output_bytes=output_bytes,
        bits_per_weight=8 * sum(file.sizes) / plan.parameters,
        types=share_by_type(plan, types, file.sizes),
        seconds=time.perf_counter() - start,
        threads=threads,
        peak_memory_bytes=peak_memory_bytes(),
        prune=None if pruned is None else pruned.record,
        calibration=None if fitted is None else fitted.calibration,
        importance=None if fitted is None else fitted.record,
        scales=None if fitted is None else fitted.scales,
        compensation=None if fitted is None else fitted.compensation,
        mix=mixed,
    )
    if settings.report is not None:
        write_json(settings.report, report.to_json())
    return report


def work_folder(out: Path) -> Path:
    """Where a conversion to `out` keeps what a killed one goes on from: hidden, beside it."""
    return real(out).with_name(f".{real(out).name}.work")


def _fit_settings(settings: ConvertSettings) -> fitting.FitSettings:
    """What is to be measured; nothing for a file of floats."""
    quantized = settings.type not in recipes.FLOAT_TYPES
    return fitting.FitSettings(
        importance=settings.gather_imatrix and settings.imatrix is None and quantized,
        awq=settings.awq and quantized,
        compensate=settings.compensate,
        export=settings.export_imatrix,
    )


def _check_outputs(out: Path, settings: ConvertSettings) -> None:
    """Refuse places where the model or the report cannot or should not be written."""
    check_target(out, force=settings.force)
    if settings.report is not None:
        check_target(settings.report, force=True, special=True)
        if settings.report.resolve() == out.resolve():
            raise OutputError(f"{out} cannot be the report as well: name another file")
    if settings.export_imatrix is not None:
        if settings.imatrix is not None or not settings.gather_imatrix or settings.type in recipes.FLOAT_TYPES:
            raise ConvertError(
                "--export-imatrix has nothing to export: leave out --imatrix and --no-imatrix, and take a quantized "
                "--type"
            )
        check_target(settings.export_imatrix, force=settings.force)
        for other in (out, settings.report):
            if other is not None and settings.export_imatrix.resolve() == other.resolve():
                raise OutputError(f"{other} cannot be the importance matrix as well: name another file")


def _check_names(settings: ConvertSettings) -> None:
    """Refuse names that cannot be written."""
    for option, value in (("name", settings.name), ("pre", settings.pre)):
        if value is not None and (not value.strip() or value != value.encode(errors="replace").decode()):
            raise ConvertError(f"--{option} is empty or no text: give another, or leave it out")


def _metadata(plan: upstream.Plan, settings: ConvertSettings, recipe: str) -> dict[str, Any]:
    """Upstream's metadata with the final file type, and what llama.cpp's quantizer notes about an importance matrix."""
    from llama_cpp import _gguf as gguf

    metadata = dict(plan.metadata)
    if settings.size is not None:
        metadata.update(mixing.metadata(settings.size))
    if recipe not in recipes.FLOAT_TYPES:
        ftype = recipes.FTYPES[recipe]
        metadata["general.file_type"] = gguf.GGUFValue(ftype, gguf.GGUFValueType.UINT32)
    if settings.imatrix is not None:
        metadata["quantize.imatrix.file"] = gguf.GGUFValue(settings.imatrix.name, gguf.GGUFValueType.STRING)
    return metadata


def _check_importance(plan: upstream.Plan, importance: Mapping[str, npt.NDArray[np.float32]] | None) -> None:
    """Refuse an importance matrix of another model."""
    if importance is None:
        return
    shapes = {t.name: t.shape for t in plan.tensors}
    if not any(name in shapes for name in importance):
        raise ImatrixError("the importance matrix names no tensor of this model: it belongs to another model")
    for name, values in importance.items():
        shape = shapes.get(name)
        if shape is None or name == "token_embd.weight":
            continue
        experts = math.prod(shape[:-2]) if len(shape) > 2 else 1
        if values.size != experts * shape[-1]:
            raise ImatrixError(
                f"the importance matrix has {values.size} values for {name}, the model {experts * shape[-1]}: "
                "it belongs to another model"
            )
