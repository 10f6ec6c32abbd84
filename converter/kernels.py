"""Rounding of blocks in compiled code: patches/src/ziggurat-round.h, for tensors in the processor's memory.

They do what `feedback` and `descent` do in torch elsewhere, on one core; Python's lock is released meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

from ziggurat.converter import ggml
from ziggurat.converter.grids import Grid

if TYPE_CHECKING:
    import torch


class _Grid(ctypes.Structure):
    """`struct ziggurat_round_grid`."""

    _fields_ = [
        ("levels", ctypes.POINTER(ctypes.c_float)),
        ("zero", ctypes.c_float),
        ("lowest", ctypes.c_int32),
        ("highest", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("last", ctypes.c_int32),
        ("has_mins", ctypes.c_bool),
    ]


def feed_back(
    grid: Grid, factor: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, base: torch.Tensor,
    target: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor,
) -> None:  # fmt: skip
    """Choose a block's codes.

    Column j gets the value nearest to base[j] - sum over i < j of factor[i, j] * errors[i].

    Args:
        grid: what values there are.
        factor: shape [block, block]; what is above the diagonal is read.
        scales: what the levels of each group are multiplied by: shape [groups, n].
        mins: what is subtracted in each group: shape [groups, n].
        base: shape [block, n].
        target: what the errors are measured from: shape [block, n].
        codes: shape [block, n]; the result.
        errors: shape [block, n]; the result.
    """
    block, groups = (grid.block, base.shape[1]), (grid.groups, base.shape[1])
    ggml.libraries()[1].ziggurat_round_feed_back(
        ctypes.byref(_described(grid)), base.shape[1], _data(factor, grid.block, grid.block), _data(scales, *groups),
        _data(mins, *groups), *(_data(x, *block) for x in (base, target, codes, errors)),
    )  # fmt: skip


def descend(
    grid: Grid, metric: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor,
    codes: torch.Tensor, errors: torch.Tensor, gradient: torch.Tensor,
) -> None:  # fmt: skip
    """Improve a block's integer scales, mins and codes, group by group.

    Args:
        grid: what values there are.
        metric: H, shape [block, block].
        d: shape [n].
        dmin: shape [n].
        scales: integers of the groups, shape [groups, n]; changed.
        mins: integers of the groups, shape [groups, n]; changed.
        codes: shape [block, n]; changed.
        errors: shape [block, n]; changed.
        gradient: H e of the whole row's errors e, the block's part: shape [block, n].
    """
    n = errors.shape[1]
    ggml.libraries()[1].ziggurat_round_descend(
        ctypes.byref(_described(grid)), n, _data(metric, grid.block, grid.block), _data(d, n), _data(dmin, n),
        _data(scales, grid.groups, n), _data(mins, grid.groups, n),
        *(_data(x, grid.block, n) for x in (codes, errors, gradient)),
    )  # fmt: skip


@functools.cache
def _described(grid: Grid) -> _Grid:
    levels, (first, last) = grid.levels, grid.scale_range
    table = None if grid.line else (ctypes.c_float * len(levels))(*levels)
    return _Grid(
        table, levels[0], grid.lowest, len(levels) - 1, grid.block, grid.group, first, last, grid.dmin is not None
    )


def _data(x: torch.Tensor, *shape: int) -> int:
    import torch

    assert x.shape == shape and x.dtype == torch.float32 and x.is_contiguous() and x.device.type == "cpu"
    return x.data_ptr()
