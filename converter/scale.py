"""Searches activation-aware scales: AWQ (Lin et al., arXiv:2306.00978) with GGUF's own quantizers.

For each group of `scale_groups` the columns that read some channels are multiplied by s before they are quantized, and
what writes the channels is divided by it. Candidates are s = x^a (plain) and s = x^a / w^(1 - a) (duo), with x the
size of each channel's activations and w that of the weights which read it, for a on a grid; s = 1 is always one. Unlike
in AWQ

- a candidate is rounded by the quantizer, to the type and with the importance matrix (divided by s squared) that the
  file will have, and what it reads is rounded as llama.cpp's kernels do it;
- x and w are root mean squares instead of means of absolutes: measured better;
- the best on a sample of rows and activations are judged once more, by what the attention or the feed-forward part
  gives on activations that had no part in the statistics. Whatever does not lower the error there stays s = 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter import fold, ggml
from ziggurat.converter.activations import ChannelStatistics, Float64
from ziggurat.converter.blocks import Block
from ziggurat.converter.errors import CalibrationError, QuantizeError
from ziggurat.converter.ggml import ModelShape
from ziggurat.converter.matrices import matrices
from ziggurat.converter.quantize import BF16, F16, F32
from ziggurat.converter.scale_groups import Group
from ziggurat.converter.trial import Part, Substitute, restored

if TYPE_CHECKING:
    import torch

    from ziggurat.converter.tune import Captured

Float32 = npt.NDArray[np.float32]

NAME = "scale"
LOSSES = ":losses"
LEAST = 1e-4

# Readers whose outputs are those of their part of the block.
ENDS = ("attn_output", "ffn_down")


@dataclass(frozen=True)
class ScaleSettings:
    """How thoroughly scales are searched."""

    grid: int = 20
    """Exponents a between 0 and 1."""
    values: int = 1 << 16
    """Weights of a tensor that every candidate is tried on, in whole rows."""
    samples: int = 512
    """Activations of a layer that every candidate is tried on."""
    finalists: int = 3
    """Candidates that are judged on the held-out activations, beside s = 1."""
    final_values: int = 1 << 20
    """Weights of a tensor that these are tried on."""
    final_tokens: int = 1024
    """Held-out tokens that they are judged on, in whole sequences, one at least."""


@dataclass(frozen=True)
class ScaleSearch:
    """A `tune.BlockStep` that finds scales for the groups of each block."""

    groups: tuple[Group, ...]
    types: Mapping[str, int]
    """What the file will have: tensor to ggml type."""
    shape: ModelShape
    weighted: bool = True
    """Whether it will be quantized with an importance matrix."""
    importance: Mapping[str, Float32] | None = None
    """That, by tensor, if it does not come from the pass itself."""
    settings: ScaleSettings = ScaleSettings()
    threads: int = 1

    name = NAME
    grams = False

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that decides the scales beside the block."""
        given = given_hash(self.types, self.importance)
        return {**dataclasses.asdict(self.settings), "weighted": self.weighted, "types": given}

    def __call__(self, captured: Captured) -> dict[str, npt.NDArray[Any]]:
        """Scales of the groups that gain by them, and for every group its losses with s = 1 and as chosen.

        Raises:
            CalibrationError: activations are no numbers.
        """
        found: dict[str, npt.NDArray[Any]] = {}
        with ThreadPoolExecutor(self.threads, thread_name_prefix="scale") as pool:
            for group in self.groups:
                readers = self._readers(captured, group)
                if readers:
                    search = _Search(group, readers, self.shape, self.settings, pool)
                    s, losses = search.run(captured)
                    found[group.writer + LOSSES] = np.array(losses)
                    if s is not None:
                        found[group.writer] = s
        return found

    def _readers(self, captured: Captured, group: Group) -> list[_Reader]:
        """The quantized readers of a group."""
        views, layers = matrices(captured.block), {tensor: layer for layer, tensor in captured.tensors.items()}
        readers = []
        for stem in group.readers:
            tensor = f"blk.{captured.place}.{stem}.weight"
            type_id = self.types.get(tensor, F32)
            if type_id in (F32, F16, BF16) or tensor not in layers:
                continue
            layer, importance = layers[tensor], None
            if self.weighted:
                gathered = captured.all_channels[layer].mean_squares
                importance = gathered if self.importance is None else self.importance.get(tensor)
            ggml.prepare(type_id)
            readers.append(_reader(captured, layer, views[layer], type_id, importance))
        return readers


def given_hash(types: Mapping[str, int], importance: Mapping[str, Float32] | None) -> str:
    """Hash of the types of a file's tensors, and of an importance matrix that is given."""
    digest = hashlib.sha256(json.dumps(sorted(types.items())).encode())
    for key, values in sorted((importance or {}).items()):
        digest.update(key.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def not_finite(layer: str) -> CalibrationError:
    """What to raise where a layer's inputs are no numbers."""
    return CalibrationError(
        f"what {layer} reads on the calibration text has NaN or infinite values: the checkpoint is damaged, or "
        "computed in too narrow a type; download it again"
    )


def scales(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Float32]:
    """The scales, by group, among what `ScaleSearch` found for a block: what `fold.Scales` has for it."""
    return {key: np.asarray(value, np.float32) for key, value in arrays.items() if not key.endswith(LOSSES)}


@dataclass(frozen=True)
class _Reader:
    """A quantized tensor whose columns are scaled: one matrix, or one per expert."""

    layer: str
    type_id: int
    matrices: Sequence[torch.Tensor]
    """Views of the block's own, [rows, columns]."""
    inputs: Sequence[torch.Tensor]
    """What each of them read: [samples, columns]."""
    statistics: ChannelStatistics
    importance: Float32 | None
    """Shape [experts or 1, columns]."""


def _reader(
    captured: Captured, layer: str, views: Sequence[torch.Tensor], type_id: int,
    importance: npt.NDArray[np.floating] | None,
) -> _Reader:  # fmt: skip
    statistics, rows = captured.channels[layer], captured.samples[layer]
    if not (np.isfinite(statistics.squares).all() and bool(rows.isfinite().all())):
        raise not_finite(layer)
    experts = captured.sample_experts.get(layer)
    inputs = [rows] if experts is None else [rows[experts == i] for i in range(len(views))]
    weights = None if importance is None else np.asarray(importance, np.float32).reshape(-1, rows.shape[1])
    return _Reader(layer, type_id, views, inputs, statistics, weights)


@dataclass(frozen=True)
class _Sample:
    """What one matrix read and gave."""

    reader: _Reader
    index: int
    x: torch.Tensor
    wanted: torch.Tensor
    size: float
    """Sum of squares of what all matrices of the reader gave."""


class _Search:
    """The search for one group of one block."""

    def __init__(
        self, group: Group, readers: Sequence[_Reader], shape: ModelShape, settings: ScaleSettings, pool: Executor
    ) -> None:
        self._group, self._readers, self._shape = group, readers, shape
        self._settings, self._pool = settings, pool

    def run(self, captured: Captured) -> tuple[Float32 | None, tuple[float, float]]:
        """The best scales, None for s = 1, and the losses on held-out activations with s = 1 and with them."""
        settings = self._settings
        candidates = list(self._candidates())
        samples = list(self._samples())
        losses = [self._sample_loss(s, samples) for s in candidates]
        finalists = sorted(range(len(candidates)), key=lambda i: (losses[i], i))[: settings.finalists]
        sequences = max(1, settings.final_tokens // captured.held_out.shape[1])
        part = Part(captured.block, self._module(captured.block), captured.held_out[:sequences])
        best, chosen = self._final_loss(part, None), None
        unscaled = best
        for i in finalists:
            loss = self._final_loss(part, candidates[i])
            if loss < best:
                best, chosen = loss, candidates[i]
        return chosen, (unscaled, best)

    def _module(self, block: Block) -> Any:
        """What the last choice is made on: the attention or the feed-forward part, or the layer that ends it."""
        path = self._readers[0].layer.removeprefix(block.prefix)
        if self._group.readers[0] in ENDS:
            return operator.attrgetter(path)(block.layer)
        if self._group.readers[0].startswith("ffn"):
            return block.mlp
        return getattr(block.layer, path.split(".")[0])

    def _candidates(self) -> Iterator[Float32]:
        """Vectors of scales: shape [channels], or [experts, channels]."""
        x, w = self._activations(), self._weights()
        w = np.maximum(w, LEAST * w.max())
        for i in range(1, self._settings.grid + 1):
            a = i / self._settings.grid
            yield _normalized(x**a)
            if i < self._settings.grid:
                yield _normalized(x**a / w ** (1 - a))

    def _activations(self) -> Float64:
        """Root mean square of the group's channels."""
        statistics = self._readers[0].statistics
        squares, count = statistics.squares, statistics.count
        if squares.ndim > 1 and not self._group.per_expert:
            squares, count = squares.sum(0), count.sum()
        return np.sqrt(self._by_channel(squares / np.maximum(count, 1)[..., None]))

    def _weights(self) -> Float64:
        """Root mean square of the weights that read each of the group's channels."""
        each = np.stack(
            [[m.double().square().mean(0).cpu().numpy() for m in reader.matrices] for reader in self._readers]
        ).mean(0)
        return np.sqrt(self._by_channel(each if self._group.per_expert else each.mean(0)))

    def _by_channel(self, columns: Float64) -> Float64:
        """Means of what the readers' columns have, over those that read one channel."""
        head, heads = self._shape.n_embd_head_v, self._shape.n_head_kv
        return columns.reshape(heads, -1, head).mean(1).reshape(-1) if self._group.values else columns

    def _substitute(self, reader: _Reader, index: int, s: Float32 | None, values: int) -> Substitute:
        """Rows of a reader's matrix, of `values` values of the reader's at most, quantized with scales `s`."""
        import torch

        matrix = reader.matrices[index]
        rows, step = spread_rows(matrix, values // len(reader.matrices))
        plain, columns = rows.cpu().numpy(), None
        weights = None if reader.importance is None else reader.importance[index % len(reader.importance)]
        if s is not None:
            of_matrix = s[index] if self._group.per_expert else s
            columns = fold.spread(of_matrix, rows.shape[1], self._shape.n_embd_head_v)
            plain = plain * columns
            weights = None if weights is None else weights / np.square(columns)
        new = restored(plain, reader.type_id, self._pool, weights)
        return Substitute(
            rows,
            step,
            torch.from_numpy(new).to(rows.device),
            None if columns is None else torch.from_numpy(columns).to(rows.device),
            ggml.block_columns(reader.type_id),
        )

    def _samples(self) -> Iterator[_Sample]:
        """What every candidate is tried on."""
        for reader in self._readers:
            size, found = 0.0, []
            for i, (matrix, x) in enumerate(zip(reader.matrices, reader.inputs, strict=True)):
                x, _ = spread_rows(x, self._settings.samples * x.shape[1])
                wanted = x @ spread_rows(matrix, self._settings.values // len(reader.matrices))[0].T
                size += float(wanted.square().sum())
                found.append((i, x, wanted))
            yield from (_Sample(reader, i, x, wanted, size) for i, x, wanted in found if size)

    def _sample_loss(self, s: Float32, samples: Sequence[_Sample]) -> float:
        """Squared error of what the readers give for their samples, relative to its size, summed over the readers."""
        try:
            return sum(
                float(
                    (self._substitute(at.reader, at.index, s, self._settings.values)(at.x) - at.wanted).square().sum()
                )
                / at.size
                for at in samples
            )
        except QuantizeError:  # scales beyond the type's range
            return math.inf

    def _final_loss(self, part: Part, s: Float32 | None) -> float:
        """Squared error of what the part of the block gives, relative to that."""
        values = self._settings.final_values
        try:
            return part.loss([self._substitute(r, i, s, values) for r in self._readers for i in range(len(r.matrices))])
        except QuantizeError:
            return math.inf


def spread_rows(matrix: torch.Tensor, values: int) -> tuple[torch.Tensor, int]:
    """A view of evenly spread rows with at most `values` values, or of one, and their distance.

    It is odd, so that all places within heads are met.
    """
    step = max(1, math.ceil(matrix.numel() / max(values, matrix.shape[1])))
    step = step | 1 if step > 1 else 1
    return matrix[::step], step


def _normalized(s: Float64) -> Float32:
    s = np.maximum(s, LEAST)
    return np.asarray(s / np.sqrt(s.max(-1, keepdims=True) * s.min(-1, keepdims=True)), np.float32)
