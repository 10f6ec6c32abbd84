"""What a model takes with its settings, by arithmetic: no library is loaded into the chat's process for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ziggurat.runtime.errors import ZigguratError
from ziggurat.runtime.options import KV_POLICIES
from ziggurat.tui.backend import BackendError, ModelFile, ModelSetup, Planned

if TYPE_CHECKING:
    from ziggurat.runtime.gguf_file import GGUFFile
    from ziggurat.runtime.plan import MemoryPlan
    from ziggurat.runtime.plan.machine import Machine

_SPLIT_MARK = "-of-"


async def plan(setup: ModelSetup, *, parallel: int = 1, freed: int = 0) -> Planned:
    """Plan a setup in a thread. ``freed`` bytes will be free as well, because what runs ends first.

    Raises BackendError for a file or a setting that makes no sense.
    """
    return await asyncio.to_thread(_plan, setup, parallel, freed)


def _plan(setup: ModelSetup, parallel: int, freed: int) -> Planned:
    from ziggurat.runtime.gguf_file import read_gguf
    from ziggurat.runtime.plan.machine import this_machine

    if setup.kv_policy is not None and setup.kv_policy not in KV_POLICIES:
        raise BackendError(
            f"there is no policy {setup.kv_policy!r}", f"write one of {', '.join(KV_POLICIES)}", kind="refused"
        )
    try:
        file = read_gguf(setup.path)
        machine = this_machine()
        machine = replace(machine, available=min(machine.available + freed, machine.total))
        on_host = _plan_of(file, setup, parallel, gpu_layers=0)
        plans = [on_host]
        if machine.gpus_free and setup.gpu_layers != 0:
            layers = file.integer(f"{file.architecture}.block_count") or 0
            plans.insert(0, _plan_of(file, setup, parallel, gpu_layers=setup.gpu_layers or layers + 1))
    except ZigguratError as error:
        raise BackendError(str(error), kind="refused") from None
    return replace(_planned(plans, machine), rows=_rows(file, setup, plans[0].settings.n_ctx))


def _planned(plans: list[MemoryPlan], machine: Machine) -> Planned:
    """Return the first plan. Whether the library uses a GPU that is there is not known: both have to lack memory.

    Weights are mapped: that they are read again and again is slow, but no reason to refuse.
    """
    from ziggurat.runtime.plan.machine import shortage

    lacks = [shortage(each, machine) for each in plans if not _only_slow(each, machine)]
    chosen = plans[0]
    budget = chosen.budget
    kv = sum(chosen.kv_per_layer)
    return Planned(
        total=chosen.total,
        weights=chosen.weights,
        kv=kv,
        kv_full=budget.full if budget is not None else kv,
        free=machine.gpu_free if chosen.gpus else machine.available,
        n_ctx=chosen.settings.n_ctx,
        shortage=lacks[0] if len(lacks) == len(plans) and all(lacks) else None,
    )


def _rows(file: GGUFFile, setup: ModelSetup, n_ctx: int) -> tuple[int, ...]:
    """Return the rows that each layer keeps of the longest prompt. What is allocated is for prompts of any length."""
    from ziggurat.runtime.kv_policy import policy_of
    from ziggurat.runtime.plan import outline

    policy = policy_of(_kv_options(setup))
    shape = outline(file).kv
    return policy.rows(shape.window, n_ctx) if policy is not None and shape is not None else ()


def _kv_options(setup: ModelSetup) -> dict[str, Any]:
    return {"kv_budget": setup.kv_budget, "kv_policy": setup.kv_policy}


def _only_slow(plan: MemoryPlan, machine: Machine) -> bool:
    return not plan.gpus and plan.host.fixed <= machine.available


def _plan_of(file: GGUFFile, setup: ModelSetup, parallel: int, *, gpu_layers: int) -> MemoryPlan:
    from ziggurat.runtime.engine.settings import EngineSettings
    from ziggurat.runtime.kv_policy import policy_of
    from ziggurat.runtime.plan import outline, plan_memory

    model = outline(file)
    settings = EngineSettings(
        n_ctx=setup.ctx,
        type_k=setup.cache_type_k or EngineSettings.type_k,
        type_v=setup.cache_type_v or EngineSettings.type_v,
        kv=policy_of(_kv_options(setup)),
        parallel=parallel,
        cached=0 if setup.kv_budget is None else 1,
    ).with_lanes()
    n_ctx = settings.ctx_of(model.n_ctx_train)
    context = settings.context(n_ctx)
    if settings.kv is not None and model.kv is not None and model.kv.full_layers:
        context = replace(context, kv=settings.kv.settings(settings.kv.most_rows(model.kv.window, n_ctx)))
    return plan_memory(model, context, gpu_layers=gpu_layers)


async def model_files(folders: tuple[Path, ...], setup: ModelSetup | None = None) -> tuple[ModelFile, ...]:
    """List the models of folders and of those in them, by name, with what they take as ``setup`` says.

    Of a split model only the first part is listed; folders that are not there are left out.
    """
    return await asyncio.to_thread(_model_files, folders, setup)


def _model_files(folders: tuple[Path, ...], setup: ModelSetup | None) -> tuple[ModelFile, ...]:
    paths: dict[Path, None] = {}
    for folder in folders:
        try:
            for path in folder.expanduser().rglob("*.gguf"):
                if path.is_file() and not _later_part(path):
                    paths.setdefault(path)
        except OSError:
            continue
    return tuple(model_file(path, setup) for path in sorted(paths, key=lambda path: (path.name.casefold(), path)))


def model_file(path: Path, setup: ModelSetup | None = None) -> ModelFile:
    """Describe a model's file; what is wrong with it goes into ``trouble``."""
    from ziggurat.runtime.gguf_file import read_gguf

    try:
        size = path.stat().st_size
        file = read_gguf(path)
        found = ModelFile(
            path=path,
            size=file.n_bytes,
            architecture=file.architecture,
            file_type=_file_type(file),
            n_params=file.n_params,
            n_ctx_train=file.integer(f"{file.architecture}.context_length") or 0,
        )
        if not file.tensors:
            return replace(found, trouble="has no weights")
        taken = _plan_of(file, replace(setup or ModelSetup(path), path=path), 1, gpu_layers=0)
        return replace(found, kv=sum(taken.kv_per_layer), total=taken.total)
    except OSError as error:
        return ModelFile(path, 0, trouble=f"cannot be read ({error.strerror or error})")
    except ZigguratError as error:
        return ModelFile(path, size, trouble=str(error).removeprefix(f"{path}: "))


def _later_part(path: Path) -> bool:
    """Whether a file is a part of a split model, and not the first."""
    stem, mark, _ = path.stem.rpartition(_SPLIT_MARK)
    number = stem[-5:]
    return bool(mark) and number.isdigit() and number != "00001"


def _file_type(file: GGUFFile) -> str:
    """Return the type that the file says most of its weights have, such as Q4_K_M."""
    from gguf.constants import LlamaFileType

    number = file.integer("general.file_type")
    try:
        return "" if number is None else LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return ""
