"""The context that a prompt is read into: with a KV budget, how many rows it has can depend on the prompt's length."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ziggurat.runtime import plan
from ziggurat.runtime.bindings import Batch, Context, ContextSettings, Model
from ziggurat.runtime.engine.generation import KVFigures
from ziggurat.runtime.kv_policy import KVPolicy


@dataclass(frozen=True)
class Serving:
    """A context with the batch it is fed by and the figures of its cache."""

    context: Context
    batch: Batch
    kv: KVFigures


class Contexts:
    """Makes the context that a prompt needs, and keeps it as long as the next prompts need the same.

    ``shape`` is None for models without attention. Without a policy, or with one that gives prompts of all lengths the
    same rows, there is one context, made at once. Raises what making a context raises. The model frees what is left.
    """

    def __init__(
        self, model: Model, shape: plan.KVShape | None, settings: ContextSettings, policy: KVPolicy | None
    ) -> None:
        self._model, self._shape, self._settings, self._policy = model, shape, settings, policy
        self._serving: Serving | None = None
        if policy is None or not policy.varies:
            self.for_prompt(settings.n_ctx)

    def for_prompt(self, n_tokens: int) -> Serving:
        """Return the context for a prompt of so many tokens; the one returned before is closed if it is another."""
        settings = self._settings
        if self._policy is not None:
            rows = self._policy.rows(self._model.n_layer, settings.n_ctx, n_tokens)
            settings = dataclasses.replace(settings, kv=self._policy.settings(rows))
        if self._serving is not None and self._serving.context.settings == settings:
            return self._serving
        if self._serving is not None:
            self._serving.context.close()
            self._serving = None
        context = Context(self._model, settings)
        self._serving = Serving(context, context.new_batch(), self._figures(context))
        return self._serving

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
        return KVFigures(
            bytes=layout.kept_bytes,
            peak=layout.total_bytes,
            full=full,
            rows_per_layer=context.kv_capacity(),
            endless=layout.stage_rows > 0,
        )
