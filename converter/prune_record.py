"""What was done to a model's depth, as the GGUF's metadata tell it: keys `ziggurat.prune.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PREFIX = "ziggurat.prune."
BY_LIST = "list"


@dataclass(frozen=True)
class RepairRecord:
    """The repair that is in the file, or why there is none; losses and divergences in nats per held-out token."""

    method: str
    """Name of the repair, or "none"."""
    reason: str | None = None
    """Why there is none."""
    blocks: tuple[int, ...] = ()
    """Blocks whose down projection was changed, as the checkpoint numbers them."""
    ridge: tuple[float, ...] = ()
    """Regularization of each of them, relative to the mean square of the regressed activations."""
    loss_whole: float | None = None
    """Held-out loss of the whole model."""
    loss_pruned: float | None = None
    """Held-out loss without the removed blocks and without repair."""
    loss_repaired: float | None = None
    """Held-out loss of the repair that was tried, kept or not."""
    divergence_pruned: float | None = None
    """Held-out divergence from the whole model's predictions, without repair."""
    divergence_repaired: float | None = None
    """The same of the repair that was tried, kept or not."""


@dataclass(frozen=True)
class PruneRecord:
    """Which blocks were removed, and why these."""

    blocks: tuple[int, ...]
    """As the checkpoint numbers them."""
    n_layer: int
    """Blocks before."""
    criterion: str
    """A name of `prune.CRITERIA`, or "list"."""
    repair: RepairRecord
    calibration: str | None = None
    """Hash of the calibration tokens and of how they were read; None where nothing was calibrated."""
    calibration_tokens: int | None = None

    def metadata(self) -> dict[str, Any]:
        """Key to gguf value, as `upstream.Plan.metadata` has them."""
        from llama_cpp import _gguf as gguf

        kinds = gguf.GGUFValueType
        entries: dict[str, Any] = {}

        def put(key: str, value: Any, kind: Any, sub: Any = None) -> None:
            if value is not None and value != []:  # gguf has no empty arrays
                entries[PREFIX + key] = gguf.GGUFValue(value, kind, sub)

        put("blocks", list(self.blocks), kinds.ARRAY, kinds.INT32)
        put("block_count_before", self.n_layer, kinds.UINT32)
        put("criterion", self.criterion, kinds.STRING)
        put("calibration.hash", self.calibration, kinds.STRING)
        put("calibration.tokens", self.calibration_tokens, kinds.UINT32)
        put("repair", self.repair.method, kinds.STRING)
        put("repair.reason", self.repair.reason, kinds.STRING)
        put("repair.blocks", list(self.repair.blocks), kinds.ARRAY, kinds.INT32)
        put("repair.ridge", list(self.repair.ridge), kinds.ARRAY, kinds.FLOAT32)
        for name in ("loss_whole", "loss_pruned", "loss_repaired", "divergence_pruned", "divergence_repaired"):
            put(f"repair.{name}", getattr(self.repair, name), kinds.FLOAT32)
        return entries
