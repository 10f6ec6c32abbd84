"""Compares a plan with the memory that the machine has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ziggurat.runtime import hardware
from ziggurat.runtime.plan.fit import on_gpus
from ziggurat.runtime.plan.memory import MemoryPlan
from ziggurat.runtime.sizes import human_bytes


@dataclass(frozen=True)
class Machine:
    """Memory in bytes: the host's with and without what others use, swap, and each GPU's free memory."""

    total: int
    available: int
    swap: int
    gpus_free: tuple[int, ...] = ()

    @property
    def gpu_free(self) -> int:
        """Free memory of all GPUs together."""
        return sum(self.gpus_free)


def this_machine(gpus_free: Sequence[int] | None = None) -> Machine:
    """Look at this machine; GPUs by their driver unless their free memory is given."""
    total, available = hardware.memory()
    free = [gpu.memory_free for gpu in hardware.nvidia_gpus()] if gpus_free is None else gpus_free
    return Machine(total, available, hardware.swap(), tuple(free))


def shortage(plan: MemoryPlan, machine: Machine) -> str | None:
    """Say in one line what a plan lacks on this machine now; None when it fits.

    GPUs are taken together: how the library spreads the layers over several is not planned.
    """
    if on_gpus(plan) > machine.gpu_free:
        return (
            f"needs {human_bytes(on_gpus(plan))} on the GPU and {human_bytes(machine.gpu_free)} are free:"
            f" {_remedy(plan, 'lower --gpu-layers')}"
        )
    host = plan.host
    if host.fixed > machine.available:
        return (
            f"needs {human_bytes(host.fixed)} {_what(plan)} and {human_bytes(machine.available)} are free:"
            f" {_remedy(plan)}"
        )
    if host.total > machine.available:
        return (
            f"needs {human_bytes(host.total)} and {human_bytes(machine.available)} are free:"
            " it will be slow, because weights are read from disk again and again"
        )
    return None


def impossible(plan: MemoryPlan, machine: Machine) -> str | None:
    """Say in one line why a plan can never be loaded on this machine; None when it might.

    Weights on the host are mapped from the file, so any number of them can be run, slowly. What is not mapped (repacked
    weights too) has to be in memory or in swap: more of it than there is of both cannot be, whoever else leaves.
    """
    fixed, room = plan.host.fixed, machine.total + machine.swap
    if fixed <= room:
        return None
    settings = plan.settings
    return (
        f"with a context of {settings.n_ctx} tokens it needs {human_bytes(fixed)} {_what(plan)}, and this machine has"
        f" {human_bytes(room)}, swap included: {_remedy(plan)}"
    )


def _what(plan: MemoryPlan) -> str:
    repacked = plan.host.repacked
    return f"({human_bytes(repacked)} of it weights)" if repacked else "beside the weights"


def _remedy(plan: MemoryPlan, last: str = "take a smaller model") -> str:
    """Say what takes less: rows of a KV cache first, where there are any."""
    kv = ", keep fewer rows with --kv-budget" if plan.kv_per_layer else ""
    return f"lower --ctx{kv}, or {last}"
