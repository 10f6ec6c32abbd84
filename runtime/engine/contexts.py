"""The context that prompts are read into: with a KV budget, how many rows it has depends on what is to be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from ziggurat.runtime import plan
from ziggurat.runtime.bindings import Batch, Context, ContextSettings, Model, kv
from ziggurat.runtime.engine.generation import KVFigures
from ziggurat.runtime.kv_policy import KVPolicy


@dataclass(frozen=True)
class Serving:
    """A context with the batch it is fed by and the figures of one sequence's cache.

    ``rows`` tells how many each layer keeps of so many tokens; nothing without a budget. ``kept`` and ``allocated`` are
    the cache's bytes for all sequences, after prompts and with what reading them takes, ``row_bytes`` those of a row of
    a layer, all KV heads together, in the mean of the layers.
    """

    context: Context
    batch: Batch
    kv: KVFigures
    rows: Callable[[int], tuple[int, ...]]
    kept: int = 0
    allocated: int = 0
    row_bytes: float = 0.0

    def keeps_all(self, n_tokens: int) -> bool:
        """Whether a prompt of so many tokens loses no row to the budget (layers that slide have none)."""
        return n_tokens <= min(rows for rows in self.rows(n_tokens) if rows)


class Contexts:
    """Makes contexts for one model.

    ``shape`` is None for models without attention. Raises what making a context raises. The model frees what is left.
    """

    def __init__(
        self,
        model: Model,
        shape: plan.KVShape | None,
        settings: ContextSettings,
        policy: KVPolicy | None,
    ) -> None:
        self._model, self._shape = model, shape
        self.settings, self.policy = settings, policy
        self._serving: Serving | None = None

    def for_prompt(self, n_tokens: int) -> Serving:
        """Return a context for one prompt of so many tokens; the one returned before is closed if it is another."""
        rows = None if self.policy is None else self._rows(n_tokens)
        settings = self._with_rows(rows)
        if self._serving is None or self._serving.context.settings != settings:
            if self._serving is not None:
                self._serving.context.close()
                self._serving = None
            self._serving = self._make(settings)
        return self._serving

    def for_all(self) -> Serving:
        """Return the context for prompts of any length up to the context's."""
        return self._make(self._with_rows(None if self.policy is None else self._most()))

    def _most(self) -> tuple[int, ...]:
        assert self.policy is not None
        return self.policy.most_rows(kv.windows(self._model), self.settings.n_ctx)

    def _with_rows(self, rows: tuple[int, ...] | None) -> ContextSettings:
        if rows is None or self.policy is None:
            return self.settings
        return dataclasses.replace(self.settings, kv=self.policy.settings(rows))

    def _make(self, settings: ContextSettings) -> Serving:
        context = Context(self._model, settings)
        figures, layout = self._figures(context), context.kv_layout()
        kept = layout.kept_bytes if layout is not None else figures.full * settings.n_seq_max
        allocated = layout.total_bytes if layout is not None else kept
        sizes = plan.bytes_per_token(self._shape, settings.type_k, settings.type_v) if self._shape is not None else (0,)
        row_bytes = sum(sizes) / len(sizes)
        return Serving(context, context.new_batch(), figures, self._rows, kept, allocated, row_bytes)

    def _rows(self, n_tokens: int) -> tuple[int, ...]:
        if self.policy is None:
            return ()
        return self.policy.rows(kv.windows(self._model), self.settings.n_ctx, n_tokens)

    def _figures(self, context: Context) -> KVFigures:
        if self._shape is None:
            return KVFigures(0, 0, 0, ())
        settings = context.settings
        n_ubatch = min(settings.n_ubatch, settings.n_batch, plan.padded(settings.n_ctx))
        full = plan.kv_bytes(
            self._shape, settings.n_ctx, type_k=settings.type_k, type_v=settings.type_v, n_ubatch=n_ubatch
        )
        layout = context.kv_layout()
        if layout is None:
            return KVFigures(full, full, full, plan.rows_per_layer(self._shape, settings.n_ctx, n_ubatch=n_ubatch))
        assert settings.kv is not None
        kept = layout.kept_bytes // settings.n_seq_max
        reading = (layout.total_bytes - layout.kept_bytes) // settings.kv.n_reading
        return KVFigures(
            bytes=kept,
            peak=kept + reading,
            full=full,
            rows_per_layer=context.kv_capacity(),
            endless=layout.stage_rows > 0,
        )
