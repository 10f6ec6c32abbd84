"""One pass of the calibration text through a model, block by block, that gathers what pruning and scaling look at.

Of the model there is one block in memory at a time. Block influence is that of ShortGPT (arXiv:2403.03853), one less
the mean cosine between the hidden states of a token before and behind the block; the states behind the last block are
taken as they are, before the final norm. Angular distances are those of Gromov et al. (arXiv:2403.17887), but averaged
over a sample of all tokens, where they take the last one of each sequence.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ziggurat.converter import activations
from ziggurat.converter.activations import ChannelStatistics, Float64
from ziggurat.converter.block_pass import Batches, BlockPass
from ziggurat.converter.blocks import Block, Blocks
from ziggurat.converter.calibration_work import WorkFolder, identity
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.hidden import HiddenStates, nbytes
from ziggurat.converter.split import batches

if TYPE_CHECKING:
    import torch

    from ziggurat.converter.calibration_text import CalibrationTokens

# Floats of the samples that are compared at a time.
SAMPLE_FLOATS = 1 << 24


@dataclass(frozen=True)
class CalibrateSettings:
    """How to run the calibration text through the model."""

    device: str = "cpu"
    """`cpu` or `cuda`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What blocks compute in; hidden states are kept in float32."""
    batch_tokens: int = 2048
    """Tokens that go through a block at once, rounded down to whole sequences, at least one."""
    angular_tokens: int = 1024
    """Tokens whose angular distances are taken; 0: none."""
    memory_share: float = 0.25
    """Hidden states that take more than this share of the free memory go to a file."""
    work: Path | None = None
    """Folder from which a killed stage (this, the greedy search, a repair) is taken up again, each in a folder of its
    own in it; None: nothing is kept."""
    keep_hidden: bool = False
    """Leave the hidden states before every block in the calibration's folder, for others to start from."""
    threads: int | None = None
    """Threads of torch on the CPU; None: as many as it takes by itself."""


class CalibrationProgress(Protocol):
    """Who wants to see how far a long computation is."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, count: int, what: str) -> None:
        """`count` more steps are done; `what` is being worked on."""


class Silent:
    """Tells no one."""

    def stage(self, name: str, total: int) -> None:
        """Nothing."""

    def step(self, count: int, what: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Calibration:
    """What one pass gathered."""

    influence: Float64
    """Block influence, shape [n_layer]."""
    angular: Float64 | None
    """Mean angular distance, 0 to 1, between the hidden states before block i and those before block j > i, that is
    behind block j - 1: shape [n_layer, n_layer + 1], NaN elsewhere. None when it was not asked for."""
    channels: dict[str, ChannelStatistics]
    """Inputs of every linear layer, named as its weight in the checkpoint without `.weight`."""
    tokens: int
    """How many tokens went through."""
    identity: dict[str, Any]
    """Hashes of the inputs and the parameters that decide the figures."""


def calibrate(
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    settings: CalibrateSettings | None = None,
    progress: CalibrationProgress | None = None,
) -> Calibration:
    """Run the calibration text through the model.

    The same inputs and parameters give the same figures, bit for bit, on the same machine with the same number of
    threads, whether or not it was interrupted in between and wherever the hidden states were kept.

    Args:
        checkpoint: of a family in `families.FAMILIES`.
        tokens: what to run.
        settings: how; default `CalibrateSettings()`.
        progress: who is told about it; a step is a token that went through a block.

    Raises:
        UnsupportedModelError: the family is not known, or the weights are quantized.
        CheckpointError: weights are missing or do not fit the configuration.
        CalibrationError: a block gives NaN or infinite values, the work folder is of other inputs, or there is no room.
        ConvertError: there is no such device.
    """
    settings, progress = settings or CalibrateSettings(), progress or Silent()
    blocks = Blocks(checkpoint, settings.device, settings.dtype)
    inputs = identity(checkpoint, tokens, settings, angular_tokens=settings.angular_tokens)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(settings.threads))
        folder = settings.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ziggurat-")))
        work = stack.enter_context(WorkFolder(folder / "calibration", inputs))
        gathered = _Influence(tokens, settings, work)
        progress.stage("calibration", (blocks.n_layer - work.finished) * tokens.ids.size)
        BlockPass(blocks, tokens, gathered.windows, settings, work).run(
            range(blocks.n_layer), gathered.visit, progress, before=gathered.before
        )
        figures = [work.block(i) for i in range(blocks.n_layer)]
        angular = _angular(work, blocks, _sample_places(tokens, settings)) if settings.angular_tokens else None
    return Calibration(
        influence=np.array([float(f["influence"]) for f in figures]),
        angular=angular,
        channels={name: s for f in figures for name, s in activations.unpack(f).items()},
        tokens=tokens.ids.size,
        identity=inputs,
    )


class _Influence:
    """What is gathered of each block and of the hidden states before it."""

    def __init__(self, tokens: CalibrationTokens, settings: CalibrateSettings, work: WorkFolder) -> None:
        self._tokens, self._work = tokens, work
        self.windows = batches(tokens.ids.shape[0], tokens.ids.shape[1], settings.batch_tokens)
        self._places = _sample_places(tokens, settings)
        self._collector = activations.Collector()

    def visit(self, block: Block, passing: Batches) -> dict[str, npt.NDArray[Any]]:
        """Influence and channel statistics of a block."""
        total = 0.0
        with self._collector.watching(block):
            for _, before, behind in passing:
                total += float((1 - _cosines(before, behind)).sum())
        influence = total / self._tokens.ids.size
        return {"influence": np.array(influence), **activations.pack(self._collector.take())}

    def before(self, index: int, hidden: HiddenStates) -> None:
        """Save the sample of the hidden states before block `index`."""
        if len(self._places):
            self._work.write_sample(index, self._sample(hidden))

    def _sample(self, hidden: HiddenStates) -> npt.NDArray[np.float32]:
        """The sampled tokens' hidden states at unit length: shape [samples, n_embd]."""
        import torch

        positions, parts = hidden.shape[1], []
        for start, stop in self.windows:
            inside = self._places[(self._places >= start * positions) & (self._places < stop * positions)]
            if len(inside):
                flat = hidden.read(start, stop).flatten(0, 1)
                chosen = flat[torch.from_numpy(inside - start * positions)].double()
                parts.append((chosen / chosen.norm(dim=-1, keepdim=True).clamp_min(1e-30)).float().numpy())
        return np.concatenate(parts)


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch use that many threads meanwhile."""
    import torch

    old = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(old)


@contextlib.contextmanager
def rounded_products() -> Iterator[None]:
    """Let products of float32 matrices on a CPU round their factors to bfloat16 meanwhile, where that is faster.

    Factors are rounded by processors that have matrix units for bfloat16 only; on others this merely chooses oneDNN's
    kernels, which on AMD's are twice as fast as MKL's.
    """
    import torch

    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    if matmul is None:
        yield
        return
    old = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = old


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of each token's states, in double precision: most are within 1e-3 of one."""
    a, b = a.double(), b.double()
    norms: torch.Tensor = a.norm(dim=-1) * b.norm(dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(1e-30)


def _sample_places(tokens: CalibrationTokens, settings: CalibrateSettings) -> npt.NDArray[np.int64]:
    """Which tokens are compared, by their place among all, ascending: evenly spread, so that all texts take part."""
    count = min(settings.angular_tokens, tokens.ids.size)
    return (np.arange(count, dtype=np.int64) * tokens.ids.size) // max(count, 1)


def _angular(work: WorkFolder, blocks: Blocks, places: npt.NDArray[np.int64]) -> Float64:
    """Mean angular distances between the samples before all blocks, a few tokens at a time."""
    states = blocks.n_layer + 1
    total = np.zeros((states, states))
    step = max(1, SAMPLE_FLOATS // (states * blocks.n_embd))
    for start in range(0, len(places), step):
        sample = work.samples(states, start, min(start + step, len(places))).transpose(1, 0, 2)
        cosines = np.matmul(sample, sample.transpose(0, 2, 1), dtype=np.float64)
        total += (np.arccos(np.clip(cosines, -1, 1)) / math.pi).sum(0)
    result = (total / len(places))[: blocks.n_layer]
    result[np.tril_indices(blocks.n_layer)] = np.nan
    return result


def hidden_bytes(tokens: CalibrationTokens, n_embd: int) -> int:
    """Bytes of the hidden states of all tokens between two blocks."""
    return nbytes((*tokens.ids.shape, n_embd))
