"""Folds activation-aware scales into a planned GGUF: what writes a channel is divided, what reads it multiplied.

Done on GGUF-side tensors, when they are read: there Gemma's norms have their + 1 already. Scaled matrices are F32 in
the plan, so that they are quantized as they are and not rounded to bf16 first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter.quantize import F32
from ziggurat.converter.scale_groups import Group
from ziggurat.converter.upstream import Plan, PlannedTensor

Float32 = npt.NDArray[np.float32]

Scales = Mapping[int, Mapping[str, Float32]]
"""By index of the block in the GGUF and by group (`Group.writer`): above zero, shape [channels] or, where every expert
has its own, [experts, channels]. Blocks and groups that are not there stay as they are."""


def fold(plan: Plan, groups: Sequence[Group], scales: Scales) -> Plan:
    """The plan of a model that computes the same with scaled channels.

    The types of an unquantized file that the plan gives change with it: choose types with the plan as it was.
    """
    rows = {
        f"blk.{place}.{group.writer}.{kind}": s
        for place, group, s in _found(groups, scales)
        for kind in ("weight", "bias")
    }
    columns = column_scales(plan, groups, scales)
    return dataclasses.replace(plan, tensors=[_folded(t, rows.get(t.name), columns.get(t.name)) for t in plan.tensors])


def column_scales(plan: Plan, groups: Sequence[Group], scales: Scales) -> dict[str, Float32]:
    """What the columns of each scaled matrix are multiplied by: shape [columns] or [experts, columns]."""
    shapes, head = {t.name: t.shape for t in plan.tensors}, plan.model_shape().n_embd_head_v
    return {
        name: spread(s, shapes[name][-1], head)
        for place, group, s in _found(groups, scales)
        for name in (f"blk.{place}.{reader}.weight" for reader in group.readers)
        if name in shapes
    }


def scaled_importance(importance: Mapping[str, Float32], columns: Mapping[str, Float32]) -> dict[str, Float32]:
    """The importance matrix of the scaled model, whose activations are divided by what its columns are multiplied by.

    Args:
        importance: mean squares of the unscaled model's activations by tensor, shape [experts or 1, columns] each.
        columns: of `column_scales`.
    """
    result = dict(importance)
    for name, s in columns.items():
        if name in result:
            old = result[name].reshape(-1, s.shape[-1])
            result[name] = np.asarray(old / np.square(s), np.float32)
    return result


def spread(s: Float32, columns: int, head: int) -> Float32:
    """Scales of `columns` columns from those of their channels: a KV head's for every query head that reads it.

    Args:
        s: shape [..., channels].
        columns: channels, or a multiple of it.
        head: channels of a KV head.
    """
    times, left = divmod(columns, s.shape[-1])
    assert left == 0 and (times == 1 or s.shape[-1] % head == 0)
    if times == 1:
        return s
    return np.repeat(s.reshape(-1, head), times, axis=0).reshape(columns)


def _found(groups: Sequence[Group], scales: Scales) -> Iterator[tuple[int, Group, Float32]]:
    for place, of_block in scales.items():
        for group in groups:
            if group.writer in of_block:
                s = np.asarray(of_block[group.writer], np.float32)
                assert bool(np.isfinite(s).all()) and float(s.min()) > 0
                yield place, group, s


def _folded(tensor: PlannedTensor, rows: Float32 | None, columns: Float32 | None) -> PlannedTensor:
    if rows is None and columns is None:
        return tensor

    def load() -> npt.NDArray[Any]:
        values = np.array(tensor.load(), np.float32)
        if rows is not None:
            count = rows.shape[-1]
            if values.ndim == rows.ndim:  # a norm's weight, or a bias
                values[..., -count:] /= rows
            else:
                values[..., -count:, :] /= rows[..., None]
        if columns is not None:
            values *= columns[..., None, :]
        return values

    return dataclasses.replace(tensor, type_id=F32, load=load)
