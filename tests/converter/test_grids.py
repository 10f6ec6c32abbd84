"""Blocks taken apart and put together: every bit of them, and what they stand for in ggml's eyes."""

from __future__ import annotations

import numpy as np
import pytest

from ziggurat.converter import ggml
from ziggurat.converter.grids import GRIDS, dequantize, pack, unpack

COLUMNS = 512


@pytest.fixture(params=GRIDS, ids=ggml.type_name)
def type_id(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def random_bytes(type_id: int) -> np.ndarray:
    """Rows of random blocks, with every code and every scale, whose `d` and `dmin` are finite."""
    grid = GRIDS[type_id]
    raw = np.random.default_rng(type_id).integers(0, 256, (64, COLUMNS // grid.block, grid.nbytes), np.uint8)
    for offset in (grid.d, grid.dmin):
        if offset is not None:
            raw[..., offset + 1] &= 0xBB  # not the largest exponent
    return raw.reshape(64, -1)


def test_rows_have_the_bytes_ggml_gives_them(type_id: int) -> None:
    grid = GRIDS[type_id]
    assert COLUMNS // grid.block * grid.nbytes == ggml.row_bytes(type_id, COLUMNS)


def test_unpacked_and_packed_blocks_are_the_same_bytes(type_id: int) -> None:
    packed = random_bytes(type_id)
    blocks = unpack(GRIDS[type_id], packed)
    assert blocks.codes.shape == (64, COLUMNS // GRIDS[type_id].block, GRIDS[type_id].block)
    assert len(np.unique(blocks.codes)) == len(GRIDS[type_id].levels)
    np.testing.assert_array_equal(pack(GRIDS[type_id], blocks), packed)


def test_values_are_those_that_ggml_reads(type_id: int) -> None:
    packed = random_bytes(type_id)
    values = dequantize(GRIDS[type_id], unpack(GRIDS[type_id], packed))
    np.testing.assert_array_equal(values, ggml.dequantize_rows(type_id, packed, COLUMNS))


def test_scales_are_within_their_range(type_id: int) -> None:
    grid = GRIDS[type_id]
    scales = unpack(grid, random_bytes(type_id)).scales
    assert (scales.min(), scales.max()) == grid.scale_range
