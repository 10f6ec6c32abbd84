"""What a quantized GGUF tensor can stand for: its blocks taken apart into scales and integer codes, and put together.

In every type here a value is

    w = d * scale * level(code) - dmin * min

with `d` and `dmin` of the block (float16), the integers `scale` and `min` of the value's group, and a level per code:
a straight line, or the table of the IQ4 types. Where bits lie is data (`Plane`), as ggml-common.h of llama.cpp declares
it. Lattice types (IQ1, IQ2, IQ3), whose codes stand for several values at once, are not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Int16 = npt.NDArray[np.int16]
Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]

# ggml's kvalues_iq4nl
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Plane:
    """Bits of integers in a block: those of integer k * stride + j of a run lie in byte j, at k * bits."""

    offset: int
    """First byte in the block."""
    nbytes: int
    stride: int
    """Bytes of a run, which holds stride * 8 / bits integers; the next run follows."""
    bits: int
    shift: int = 0
    """Where these bits belong in the integer."""
    flip: int = 0
    """Bits that are stored inverted: 128 makes ascending integers of signed bytes."""


@dataclass(frozen=True)
class Grid:
    """How the blocks of one ggml type are laid out."""

    nbytes: int
    """Of a block."""
    block: int
    """Values of a block."""
    group: int
    """Values that share a scale and a min."""
    levels: tuple[int, ...]
    """What the codes stand for, ascending."""
    codes: tuple[Plane, ...]
    d: int
    """First byte of the scale `d`."""
    dmin: int | None = None
    """First byte of `dmin`; None: the type has no mins."""
    scales: tuple[Plane, ...] = ()
    """Integer scales of the groups, and behind them the mins if there are any; empty: all scales are 1."""
    scale_zero: int = 0
    """What is subtracted from stored scales."""
    six_bits: int | None = None
    """First of the twelve bytes in which Q4_K and Q5_K keep eight scales and eight mins."""
    lowest: int = 0
    """First code to use: ggml's products with Q8_0 are made for -127 and up."""

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.block // self.group

    @property
    def line(self) -> bool:
        """Whether each level is one above that before it."""
        return self.levels[-1] - self.levels[0] == len(self.levels) - 1

    @property
    def scale_range(self) -> tuple[int, int]:
        """Smallest and largest integer scale (and min) of a group; equal if there is no choice."""
        if self.six_bits is not None:
            return 0, 63
        stored = sum(plane.bits for plane in self.scales)
        return (-self.scale_zero, (1 << stored) - 1 - self.scale_zero) if stored else (1, 1)


@dataclass(frozen=True)
class Blocks:
    """The parts of blocks in any shape [...]: of a tensor's blocks it is [rows, blocks of a row]."""

    d: Float16
    """Shape [...]."""
    dmin: Float16
    """Shape [...]; zero if the type has none."""
    scales: Int16
    """Shape [..., groups]."""
    mins: Int16
    """Shape [..., groups]: 0 if the type has none, -1 in Q4_1 and Q5_1, which add `dmin`."""
    codes: UInt8
    """Shape [..., block]: indices into `Grid.levels`."""

    @property
    def scale(self) -> Float32:
        """What the levels of each group are multiplied by: shape [..., groups]; exact."""
        result: Float32 = self.d.astype(np.float32)[..., None] * self.scales.astype(np.float32)
        return result

    @property
    def minimum(self) -> Float32:
        """What is subtracted in each group: shape [..., groups]; exact."""
        result: Float32 = self.dmin.astype(np.float32)[..., None] * self.mins.astype(np.float32)
        return result


def _line(lowest: int, bits: int) -> tuple[int, ...]:
    return tuple(range(lowest, lowest + (1 << bits)))


# By number of enum ggml_type.
GRIDS: dict[int, Grid] = {
    2: Grid(18, 32, 32, _line(-8, 4), (Plane(2, 16, 16, 4),), d=0),  # Q4_0
    3: Grid(20, 32, 32, _line(0, 4), (Plane(4, 16, 16, 4),), d=0, dmin=2),  # Q4_1
    6: Grid(22, 32, 32, _line(-16, 5), (Plane(6, 16, 16, 4), Plane(2, 4, 1, 1, 4)), d=0),  # Q5_0
    7: Grid(24, 32, 32, _line(0, 5), (Plane(8, 16, 16, 4), Plane(4, 4, 1, 1, 4)), d=0, dmin=2),  # Q5_1
    8: Grid(34, 32, 32, _line(-128, 8), (Plane(2, 32, 32, 8, flip=128),), d=0, lowest=1),  # Q8_0
    10: Grid(84, 256, 16, _line(0, 2), (Plane(16, 64, 32, 2),), d=80, dmin=82, scales=(Plane(0, 16, 16, 4),)),  # Q2_K
    11: Grid(
        110, 256, 16, _line(-4, 3), (Plane(32, 64, 32, 2), Plane(0, 32, 32, 1, 2)), d=108,
        scales=(Plane(96, 8, 8, 4), Plane(104, 4, 4, 2, 4)), scale_zero=32,
    ),  # Q3_K
    12: Grid(144, 256, 32, _line(0, 4), (Plane(16, 128, 32, 4),), d=0, dmin=2, six_bits=4),  # Q4_K
    13: Grid(
        176, 256, 32, _line(0, 5), (Plane(48, 128, 32, 4), Plane(16, 32, 32, 1, 4)), d=0, dmin=2, six_bits=4
    ),  # Q5_K
    14: Grid(
        210, 256, 16, _line(-32, 6), (Plane(0, 128, 64, 4), Plane(128, 64, 32, 2, 4)), d=208,
        scales=(Plane(192, 16, 16, 8, flip=128),), scale_zero=128,
    ),  # Q6_K
    20: Grid(18, 32, 32, _IQ4, (Plane(2, 16, 16, 4),), d=0),  # IQ4_NL
    23: Grid(
        136, 256, 32, _IQ4, (Plane(8, 128, 16, 4),), d=0,
        scales=(Plane(4, 4, 1, 4), Plane(2, 2, 1, 2, 4)), scale_zero=32,
    ),  # IQ4_XS
}  # fmt: skip


def unpack(grid: Grid, packed: UInt8) -> Blocks:
    """Take blocks apart.

    Args:
        grid: of their type.
        packed: bytes, shape [..., blocks * grid.nbytes].

    Returns:
        Parts whose leading shape is [..., blocks].
    """
    raw = packed.reshape(*packed.shape[:-1], -1, grid.nbytes)
    return Blocks(*unpack_scales(grid, raw), _read(grid.codes, raw))


def unpack_scales(grid: Grid, raw: UInt8) -> tuple[Float16, Float16, Int16, Int16]:
    """All parts but the codes, in the order of `Blocks`, of blocks [..., grid.nbytes]."""
    lead, none = raw.shape[:-1], np.zeros((*raw.shape[:-1], grid.groups), np.int16)
    mins = none
    if grid.six_bits is not None:
        scales, mins = _six_bits(raw[..., grid.six_bits : grid.six_bits + 12])
    elif grid.scales:
        both = _read(grid.scales, raw).astype(np.int16) - np.int16(grid.scale_zero)
        scales = both[..., : grid.groups]
        mins = none if grid.dmin is None else both[..., grid.groups :]
    else:
        scales, mins = none + np.int16(1), none if grid.dmin is None else none - np.int16(1)
    dmin = np.zeros(lead, np.float16) if grid.dmin is None else _half(raw, grid.dmin)
    return _half(raw, grid.d), dmin, scales, mins


def pack(grid: Grid, blocks: Blocks) -> UInt8:
    """Put blocks together: the inverse of `unpack`, bit for bit."""
    raw = np.zeros((*blocks.d.shape, grid.nbytes), np.uint8)
    raw[..., grid.d : grid.d + 2] = np.ascontiguousarray(blocks.d)[..., None].view(np.uint8)
    if grid.dmin is not None:
        raw[..., grid.dmin : grid.dmin + 2] = np.ascontiguousarray(blocks.dmin)[..., None].view(np.uint8)
    if grid.six_bits is not None:
        raw[..., grid.six_bits : grid.six_bits + 12] = _twelve_bytes(blocks.scales, blocks.mins)
    elif grid.scales:
        parts = [blocks.scales] if grid.dmin is None else [blocks.scales, blocks.mins]
        _write(grid.scales, (np.concatenate(parts, -1) + np.int16(grid.scale_zero)).astype(np.uint8), raw)
    _write(grid.codes, blocks.codes, raw)
    return raw.reshape(*blocks.d.shape[:-1], -1)


def dequantize(grid: Grid, blocks: Blocks) -> Float32:
    """What blocks stand for, equal to ggml's reading in every bit: shape [..., blocks * block]."""
    levels = np.array(grid.levels, np.float32)[blocks.codes].reshape(*blocks.scales.shape, grid.group)
    values: Float32 = blocks.scale[..., None] * levels
    if grid.dmin is not None:
        values = values - blocks.minimum[..., None]
    return values.reshape(*blocks.d.shape[:-1], -1)


def _half(raw: UInt8, offset: int) -> Float16:
    return np.ascontiguousarray(raw[..., offset : offset + 2]).view(np.float16)[..., 0]


def _read(planes: Sequence[Plane], raw: UInt8) -> UInt8:
    """Integers whose bits are in `planes` of blocks [..., nbytes]: shape [..., integers]."""
    total: UInt8 | None = None
    for p in planes:
        runs = raw[..., p.offset : p.offset + p.nbytes].reshape(*raw.shape[:-1], -1, 1, p.stride)
        places = np.arange(0, 8, p.bits, dtype=np.uint8)[:, None]
        part = ((runs ^ np.uint8(p.flip)) >> places) & np.uint8((1 << p.bits) - 1)
        part = (part << np.uint8(p.shift)).reshape(*raw.shape[:-1], -1)
        total = part if total is None else total | part
    assert total is not None
    return total


def _write(planes: Sequence[Plane], integers: UInt8, raw: UInt8) -> None:
    """Set the bits of `planes` in blocks [..., nbytes] to those of integers [..., n]."""
    for p in planes:
        places = np.arange(0, 8, p.bits, dtype=np.uint8)[:, None]
        part = (integers >> np.uint8(p.shift)) & np.uint8((1 << p.bits) - 1)
        runs = part.reshape(*integers.shape[:-1], -1, 8 // p.bits, p.stride) << places
        merged = np.bitwise_or.reduce(runs, axis=-2) ^ np.uint8(p.flip)
        raw[..., p.offset : p.offset + p.nbytes] = merged.reshape(*integers.shape[:-1], -1)


def _six_bits(twelve: UInt8) -> tuple[Int16, Int16]:
    """Eight scales and eight mins of 6 bits, from the bytes of Q4_K and Q5_K.

    Four of each lie whole in the first eight bytes; of the others the low bits share the last four bytes, the high ones
    are on top of the first eight.
    """
    first, last = twelve[..., :8], twelve[..., 8:]
    high = (first >> 6) << 4
    scales = np.concatenate([first[..., :4] & 63, (last & 15) | high[..., :4]], -1)
    mins = np.concatenate([first[..., 4:] & 63, (last >> 4) | high[..., 4:]], -1)
    return scales.astype(np.int16), mins.astype(np.int16)


def _twelve_bytes(scales: Int16, mins: Int16) -> UInt8:
    s, m = scales.astype(np.uint8), mins.astype(np.uint8)
    first = np.concatenate([s[..., :4] | (s[..., 4:] >> 4 << 6), m[..., :4] | (m[..., 4:] >> 4 << 6)], -1)
    return np.concatenate([first, (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4], -1)
