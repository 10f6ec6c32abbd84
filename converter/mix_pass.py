"""Measures what the model loses by each type of each tensor: a pass forward and one back, a block in memory at a time.

Forward, the hidden states before every block are kept in the work folder. Backward, from labels drawn from the model's
own predictions, each block is run once more on them with gradients; `mix_losses` does the rest. Both go on behind the
last finished block when they were killed.

Below COARSE_BELOW bits per weight the blocks compute with matrices of Q2_K meanwhile: errors are large there, and some
of what looks insensitive in the whole model, such as saturated attention, breaks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter import calibration_work, embedding, mix_losses, products, surgery
from ziggurat.converter.block_pass import Batches, BlockPass
from ziggurat.converter.calibrate import CalibrateSettings, CalibrationProgress, Silent, torch_threads
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.calibration_work import WorkFolder
from ziggurat.converter.hidden import HiddenStates
from ziggurat.converter.linears import HEAD_TENSOR
from ziggurat.converter.matrices import matrices
from ziggurat.converter.mix_losses import BLOCK, Float64, LossSettings, Quantizing, Seen
from ziggurat.converter.split import batches

if TYPE_CHECKING:
    import torch

    from ziggurat.converter.blocks import Block
    from ziggurat.converter.tune import TunedModel

COARSE_BELOW = 4.25
COARSE = 10  # Q2_K

# Tokens whose logits are held at a time.
LOGIT_TOKENS = 256


@dataclass(frozen=True)
class MixSettings:
    """How thoroughly losses are measured."""

    tokens: int = 4096
    """So many of the calibration tokens, in whole sequences, one at least."""
    coarse: bool = False
    """Measure in a model of Q2_K."""
    seed: int = 0
    """Draws the labels."""
    losses: LossSettings = LossSettings()


def measure(
    model: TunedModel, wanted: Mapping[str, Quantizing], tokens: CalibrationTokens, settings: MixSettings,
    calibrate: CalibrateSettings, progress: CalibrationProgress | None = None,
) -> dict[str, Float64]:  # fmt: skip
    """Measure the losses of tensors by type.

    The same inputs give the same losses, bit for bit, on the same machine, interrupted or not.

    Args:
        model: which.
        wanted: tensors of its GGUF: linear layers of blocks, the token embedding, the head.
        tokens: calibration text; a part of it is used.
        settings: how.
        calibrate: device, threads; `work` is where the passes leave off.
        progress: who is told; a step is a token that went through a block.

    Returns:
        By tensor, nats per token that each of its types costs.

    Raises:
        CalibrationError: hidden states are no numbers, the folder is of other inputs, or there is no room.
        QuantizeError: weights that a type cannot hold.
    """
    assert calibrate.work is not None
    count = max(1, min(len(tokens.ids), settings.tokens // tokens.ids.shape[1]))
    part = CalibrationTokens(tokens.ids[np.arange(count) * len(tokens.ids) // count], tokens.source)
    identity = _identity(model, wanted, part, settings, calibrate)
    folders = [calibrate.work / name for name in ("forward", "backward")]
    progress = progress or Silent()
    with (
        torch_threads(calibrate.threads),
        ThreadPoolExecutor(calibrate.threads or 1, thread_name_prefix="mix") as pool,
        WorkFolder(folders[0], identity, "measurement of losses") as forward,
        WorkFolder(folders[1], identity, "measurement of losses") as backward,
    ):
        steps = _Steps(model, wanted, part, settings, pool)
        if backward.finished == 0:
            steps.forward(dataclasses.replace(calibrate, keep_hidden=True), forward, progress)
        return steps.backward(forward, backward, progress)


def _identity(
    model: TunedModel, wanted: Mapping[str, Quantizing], tokens: CalibrationTokens, settings: MixSettings,
    calibrate: CalibrateSettings,
) -> dict[str, Any]:  # fmt: skip
    from ziggurat.converter.tune import folds_hash

    digest = hashlib.sha256()
    for name, how in sorted(wanted.items()):
        digest.update(f"{name} {list(how.types)}\n".encode())
        for values in (how.importance, how.scales):
            digest.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())
    return calibration_work.identity(
        model.blocks.checkpoint, tokens, calibrate, removed_blocks=list(model.removed), repair=folds_hash(model.folds),
        quantizing=digest.hexdigest(), how=dataclasses.asdict(settings),
    )  # fmt: skip


class _Steps:
    """The two passes."""

    def __init__(
        self, model: TunedModel, wanted: Mapping[str, Quantizing], tokens: CalibrationTokens, settings: MixSettings,
        pool: Executor,
    ) -> None:  # fmt: skip
        self._model, self._wanted, self._tokens, self._settings, self._pool = model, wanted, tokens, settings, pool
        self._blocks, self._kept = model.blocks, model.kept
        self._places = surgery.renumber(model.blocks.n_layer, model.removed)
        self._shape = (*tokens.ids.shape, model.blocks.n_embd)

    def forward(self, settings: CalibrateSettings, work: WorkFolder, progress: CalibrationProgress) -> None:
        """Keep the hidden states before every block, and behind the last."""
        windows = batches(len(self._tokens.ids), self._tokens.ids.shape[1], settings.batch_tokens)
        progress.stage("sensitivity, forward", (len(self._kept) - work.finished) * self._tokens.ids.size)

        def visit(block: Block, passing: Batches) -> dict[str, npt.NDArray[Any]]:
            for _ in passing:
                pass
            return {}

        def prepare(block: Block) -> None:
            self._fold(block)
            self._coarsen(block)

        BlockPass(self._blocks, self._tokens, windows, settings, work).run(self._kept, visit, progress, prepare=prepare)

    def backward(self, forward: WorkFolder, work: WorkFolder, progress: CalibrationProgress) -> dict[str, Float64]:
        """Losses of all tensors: of the head first, then from the last block to the first, then of the embedding."""
        n = len(self._kept)
        progress.stage("sensitivity, backward", (n + 1 - work.finished) * self._tokens.ids.size)
        for step in range(work.finished, n + 1):
            hidden = HiddenStates(self._shape, forward.hidden_path(n - max(step - 1, 0)), create=False)
            before = HiddenStates(self._shape, forward.hidden_path(n - step), create=False)
            new = HiddenStates(self._shape, work.partial_path())
            if step == 0:
                found = self._head(hidden, new)
            else:
                gradients = HiddenStates(self._shape, work.hidden_path(step), create=False)
                found = self._block(self._kept[n - step], before, gradients, new)
            if step == n:
                found.update(self._embedding(before, new))
            new.save(work.hidden_path(step + 1))
            work.finish(step, found, keep=False)
            progress.step(self._tokens.ids.size, "head" if step == 0 else f"block {self._kept[n - step]}")
        losses: dict[str, npt.NDArray[Any]] = {}
        for step in range(n + 1):
            for name, values in work.block(step).items():  # a tied embedding has two parts
                losses[name] = losses[name] + values if name in losses else values
        return losses

    def _fold(self, block: Block) -> None:
        fold = self._model.folds.get(block.index)
        if fold is not None:
            block.fold_down(fold)

    def _named(self, block: Block) -> Iterator[tuple[str, str, list[torch.Tensor], Quantizing]]:
        """Layer, tensor, matrices and how they are quantized."""
        for layer, views in matrices(block).items():
            tensor = self._model.tensors.get(layer)
            if tensor is not None and tensor in self._wanted:
                yield layer, tensor, views, self._wanted[tensor]

    def _coarsen(self, block: Block) -> None:
        """Let the block compute with Q2_K."""
        if not self._settings.coarse:
            return
        for *_, views, how in self._named(block):
            if views[0].shape[1] % BLOCK:
                continue
            for expert, matrix in enumerate(views):
                matrix.add_(how.errors(matrix, expert, COARSE, self._pool).to(matrix.dtype))

    def _block(
        self, index: int, before: HiddenStates, gradients: HiddenStates, new: HiddenStates
    ) -> dict[str, npt.NDArray[Any]]:
        """Losses of a block's tensors, and the gradients before it from those behind it."""
        import torch

        block = self._blocks.block(index)
        self._fold(block)
        whole = {name: [m.clone() for m in views] if self._settings.coarse else views
                 for name, _, views, _ in self._named(block)}  # fmt: skip
        self._coarsen(block)
        seen: dict[str, dict[int, Seen]] = {}
        sequence = 0

        def see(layers: tuple[str, ...], x: Any, out: Any, expert: int | None, experts: int | None) -> None:
            wanted = [layer in whole for layer in layers]
            if not any(wanted):
                return
            read = x.detach().reshape(-1, x.shape[-1])
            at = sequence

            def keep(gradient: torch.Tensor) -> None:
                parts = gradient.detach().reshape(-1, gradient.shape[-1]).chunk(len(layers), dim=-1)
                for layer, mine, part in zip(layers, wanted, parts, strict=True):
                    if mine:
                        of_matrix = seen.setdefault(layer, {}).setdefault(expert or 0, Seen())
                        of_matrix.inputs[at], of_matrix.gradients[at] = read, part

            out.register_hook(keep)

        with products.watching(block, see):
            for sequence in range(self._shape[0]):
                states = before.read(sequence, sequence + 1).to(self._blocks.device, self._blocks.dtype)
                states.requires_grad_()
                behind = block(states, differentiable=True)
                back = gradients.read(sequence, sequence + 1).to(behind.device, behind.dtype)
                new.write(sequence, torch.autograd.grad(behind, states, back)[0])
        found = {}
        for layer, tensor, _, how in self._named(block):
            views, of_layer = whole[layer], seen.get(layer, {})
            found[tensor] = mix_losses.matrix_losses(
                views, [of_layer.get(i, Seen()) for i in range(len(views))], how, self._tokens.ids.size,
                self._settings.losses, self._pool,
            )  # fmt: skip
        return found

    def _head(self, hidden: HiddenStates, new: HiddenStates) -> dict[str, npt.NDArray[Any]]:
        """Gradients behind the last block, of labels drawn from the predictions; losses of the head's matrix."""
        import torch

        blocks, matrix = self._blocks, self._blocks.head_matrix
        generator = torch.Generator().manual_seed(self._settings.seed)
        mass = torch.zeros(len(matrix), dtype=torch.float64, device=matrix.device)
        inputs, logs = [], []
        for sequence in range(self._shape[0]):
            states = hidden.read(sequence, sequence + 1).to(blocks.device, blocks.dtype).requires_grad_()
            normed = blocks.final_norm(states, differentiable=True)
            read = normed.detach().flatten(0, 1)
            back = torch.empty_like(read)
            for i in range(0, len(read), LOGIT_TOKENS):
                logits, slope = self._logits(read[i : i + LOGIT_TOKENS])
                logs.append(logits.logsumexp(-1))
                p = logits.softmax(-1)
                mass += (p * (1 - p) * slope.square()).double().sum(0)
                label = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
                g = (torch.zeros_like(p).scatter_(-1, label, 1.0) - p) * slope
                back[i : i + LOGIT_TOKENS] = (g.to(blocks.dtype) @ matrix.to(blocks.dtype)).to(back.dtype)
            new.write(sequence, torch.autograd.grad(normed, states, back.view_as(normed))[0])
            inputs.append(read)
        tensor = HEAD_TENSOR if HEAD_TENSOR in self._wanted else embedding.TENSOR
        found = {}
        if tensor in self._wanted:
            mass *= matrix.float().square().sum(1)
            places, weights = mix_losses.systematic(mass.cpu().numpy(), self._settings.losses.head_rows)
            x = torch.cat(inputs)
            logits, slope = self._logits(x, matrix[torch.from_numpy(places).to(matrix.device)])
            p = (logits - torch.cat(logs)[:, None]).exp()
            found[tensor] = mix_losses.head_losses(
                matrix, x.float(), p * (1 - p) * slope.square(), places, weights, self._wanted[tensor], self._pool
            )
        blocks.release_head()
        return found

    def _logits(self, read: torch.Tensor, matrix: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits in float32, and their slope over the matrix product: 1 where they are not capped."""
        import torch

        matrix, cap = self._blocks.head_matrix if matrix is None else matrix, self._blocks.logit_cap
        logits = (read @ matrix.to(read.dtype).T).float()
        if cap is None:
            return logits, torch.ones((), device=logits.device)
        squashed = torch.tanh(logits / cap)
        return squashed * cap, 1 - squashed.square()

    def _embedding(self, first: HiddenStates, gradients: HiddenStates) -> dict[str, npt.NDArray[Any]]:
        """Losses of the token embedding, from the gradients before the first block."""
        import torch

        if embedding.TENSOR not in self._wanted:
            return {}
        ids, sequences = self._tokens.ids, self._shape[0]
        unique = np.unique(ids)
        rows = self._blocks.embedding_rows(torch.from_numpy(unique.astype(np.int64)))
        states, back = first.read(0, sequences), gradients.read(0, sequences)
        factor = _embedding_factor(ids, unique, rows, states)
        losses = mix_losses.embedding_losses(
            ids, rows, unique, back * factor, self._wanted[embedding.TENSOR], self._pool
        )
        return {embedding.TENSOR: losses}


def _embedding_factor(
    ids: npt.NDArray[np.integer], unique: npt.NDArray[np.integer], rows: torch.Tensor, states: torch.Tensor
) -> float:
    """What the model multiplies embeddings by (Gemma): from differences between neighbours in a column of `ids`.

    Whatever it adds depends on the position alone (GPT-2) and is not in them.
    """
    import torch

    if len(ids) < 2:
        stored = rows[torch.from_numpy(np.searchsorted(unique, ids[0]))]
        a, b = stored, states[0]
    else:
        at = torch.from_numpy(np.searchsorted(unique, ids[:2]))
        a, b = rows[at[1]] - rows[at[0]], states[1] - states[0]
    size = float(a.double().square().sum())
    return float((a.double() * b.double()).sum()) / size if size else 1.0
