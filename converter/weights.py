"""Reads a checkpoint's tensors into torch modules, a few at a time, nothing kept open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import CheckpointError, UnsupportedModelError
from ziggurat.converter.families import Experts

if TYPE_CHECKING:
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse checkpoints whose weights are not floats.

    Raises:
        UnsupportedModelError: the message names what was found.
    """
    if checkpoint.config.get("quantization_config"):
        found = "it is quantized"
    else:
        other = next((n for n, t in checkpoint.tensors.items() if t.dtype not in FLOATS and n.endswith("weight")), None)
        if other is None:
            return
        found = f"{other} is of type {checkpoint.tensors[other].dtype}"
    raise UnsupportedModelError(
        f"{checkpoint.folder} cannot be calibrated: {found}; give the original checkpoint, the one before "
        "quantization, or convert this with --no-awq --no-imatrix, or with --imatrix FILE --no-awq"
    )


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor in its stored type, in memory of its own.

    Raises:
        CheckpointError: there is no such tensor.
    """
    with _opened(checkpoint, name) as file:
        tensor: torch.Tensor = file.get_tensor(name).clone()  # not a view of the mapped file
    return tensor


def rows(checkpoint: Checkpoint, name: str, indices: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix in its stored type: shape [len(indices), columns]; only their pages of the file are read.

    Raises:
        CheckpointError: there is no such tensor, or it has not that many rows.
    """
    info = checkpoint.tensors.get(name)
    if info is not None and len(indices) and int(indices.max()) >= info.shape[0]:
        raise CheckpointError(
            f"{checkpoint.folder}: the tokenizer gives the id {int(indices.max())}, the embedding has {info.shape[0]} "
            "rows: they are not of one model, copy the tokenizer's files again"
        )
    with _opened(checkpoint, name) as file:
        selected: torch.Tensor = file.get_tensor(name)[indices]
    return selected


def _opened(checkpoint: Checkpoint, name: str) -> Any:
    from safetensors import safe_open

    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{checkpoint.folder} has no tensor {name}: download it again")
    return safe_open(info.file, framework="pt", device="cpu")


def fill(
    module: Any,
    checkpoint: Checkpoint,
    prefix: str,
    experts: Experts | None,
    device: torch.device,
    dtype: torch.dtype,
    computed: Sequence[str] = (),
) -> None:
    """Give a module's parameters the values of the tensors whose names begin with `prefix`.

    Args:
        module: built without memory; its parameters are replaced.
        checkpoint: where they are read from.
        prefix: of the names of its tensors.
        experts: how the checkpoint names experts that the module may keep fused.
        device: where they go.
        dtype: the type they get.
        computed: endings of tensors that may be stored but are not wanted.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no place in the module.
    """
    left = {name for name in checkpoint.tensors if name.startswith(prefix) and not name.endswith(tuple(computed))}
    state: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        parts = _sources(checkpoint, prefix, name, experts)
        left.difference_update(stored for group in parts for stored in group)
        value = _assemble(checkpoint, parts, parameter.shape, device, dtype)
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {parts[0][0]} has the shape {list(value.shape)}, config.json asks for "
                f"{list(parameter.shape)}: they are not of one model, download it again"
            )
        state[name] = value
    if left:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {min(left)} has no place in transformers' {type(module).__name__}, so the "
            "model would be computed without it: use another version of transformers"
        )
    module.load_state_dict(state, strict=False, assign=True)
    module.requires_grad_(False)


def _sources(checkpoint: Checkpoint, prefix: str, name: str, experts: Experts | None) -> list[list[str]]:
    """Stored tensors of a parameter: of each expert those that are put below each other, else one alone."""
    stored = prefix + name
    if experts is None or stored in checkpoint.tensors:
        return [[stored]]
    inner = name.removeprefix("mlp.")
    fused = {"experts.gate_up_proj": (experts.gate, experts.up), "experts.down_proj": (experts.down,)}
    if inner not in fused:
        return [[prefix + stored_path(name, experts)]]
    place = f"{prefix}{experts.module}.experts."
    groups: list[list[str]] = []
    while f"{place}{len(groups)}.{experts.down}.weight" in checkpoint.tensors:
        groups.append([f"{place}{len(groups)}.{part}.weight" for part in fused[inner]])
    return groups or [[stored]]


def stored_path(path: str, experts: Experts | None) -> str:
    """What the checkpoint calls `path` within a block: old ones have another name for a mixture than transformers."""
    if experts is None or not path.startswith("mlp."):
        return path
    return f"{experts.module}.{path.removeprefix('mlp.')}"


def _assemble(
    checkpoint: Checkpoint, parts: list[list[str]], shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    import torch

    if parts == [[parts[0][0]]]:
        return read(checkpoint, parts[0][0]).to(device, dtype)
    fused = torch.empty(shape, device=device, dtype=dtype)
    if len(parts) != len(fused):
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(parts)} experts, config.json asks for {len(fused)}: they are not of one "
            "model, download it again"
        )
    for expert, names in zip(fused, parts, strict=True):
        expert.copy_(torch.cat([read(checkpoint, name) for name in names]))
    return fused
