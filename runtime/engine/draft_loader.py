"""From a path to a draft model that fits the target."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from ziggurat.runtime import plan
from ziggurat.runtime.bindings import Context, ContextSettings, Model, Vocab, kv
from ziggurat.runtime.engine.draft_model import THRESHOLD, DraftModel
from ziggurat.runtime.errors import UnsupportedError
from ziggurat.runtime.gguf_file import read_gguf
from ziggurat.runtime.kv_policy import KVPolicy

# Models of one family pad their vocabularies to different lengths; tokens beyond the shorter one are never text.
_PADDING = 1024


def draft_settings(settings: ContextSettings, policy: KVPolicy | None, windows: Sequence[int]) -> ContextSettings:
    """Return what a draft's context is made with: the target's settings, and the policy's rows for its own layers.

    ``windows`` are theirs, see ``kv_policy.Layers``; without a policy nobody asks for them. One prompt is read at a
    time, and may follow what its sequence holds.
    """
    if policy is None:
        return replace(settings, kv=None)
    policy = replace(policy, reading=1, copies=1)
    return replace(settings, kv=policy.settings(policy.rows(windows, settings.n_ctx)))


def plan_draft(
    path: str | os.PathLike[str], settings: ContextSettings, policy: KVPolicy | None = None, *, gpu_layers: int = 0
) -> plan.MemoryPlan:
    """Plan what a draft model takes, from its file alone; see ``load_draft``.

    Raises ModelFileError, and UnsupportedError for cache types that do not fit its heads.
    """
    model = plan.outline(read_gguf(path))
    if model.kv is None or not model.kv.full_layers:
        policy = None
    else:
        try:
            plan.check_cache_types(model.kv, settings.type_k, settings.type_v)
        except UnsupportedError as error:  # the types were asked for the other model's sake
            raise UnsupportedError(f"the draft model {os.fspath(path)}: {error}") from None
    windows = model.kv.window if model.kv is not None else ()
    return plan.plan_memory(model, draft_settings(settings, policy, windows), gpu_layers=gpu_layers)


def load_draft(
    path: str | os.PathLike[str],
    target: Model,
    settings: ContextSettings,
    policy: KVPolicy | None = None,
    *,
    gpu_layers: int | None = None,
    threshold: float = THRESHOLD,
    progress: Callable[[float], bool] | None = None,
) -> DraftModel:
    """Load a draft model for a target whose context has these settings.

    As many sequences of the same length get the same types of rows; with a ``policy`` they are bounded, unless this
    model cannot have a budget. ``threshold`` is the probability below which a token is not proposed any more, 0 to 1.

    Raises UnsupportedError when it has another vocabulary or cannot take tokens back; ModelFileError, ModelLoadError,
    ContextError. Nothing stays allocated then.
    """
    name = os.fspath(path)
    read_gguf(path)  # says best what is wrong with a file
    model = Model(path, gpu_layers=gpu_layers, progress=progress)
    try:
        if not model.generates_text:
            raise UnsupportedError(f"the draft model {name} does not generate text token by token")
        n_shared = _shared_vocabulary(model.vocab, target.vocab, name)
        if policy is not None and kv.unsupported(model) is not None:
            policy = None
        windows = kv.windows(model) if policy is not None else ()
        context = Context(model, draft_settings(settings, policy, windows))
        _check_takes_back(context, name)
        return DraftModel(model, context, n_shared, threshold)
    except BaseException:
        model.close()
        raise


def _shared_vocabulary(vocab: Vocab, target: Vocab, name: str) -> int:
    """Return how many tokens both have. Raises UnsupportedError where they differ."""
    shared = min(vocab.n_tokens, target.n_tokens)
    at = next((token for token in range(shared) if vocab.text_of(token) != target.text_of(token)), None)
    if at is not None:
        what = f"token {at} is {vocab.text_of(at)!r}, in the model {target.text_of(at)!r}"
    elif abs(vocab.n_tokens - target.n_tokens) > _PADDING:
        what = f"it has {vocab.n_tokens} tokens, the model {target.n_tokens}"
    else:
        return shared
    raise UnsupportedError(f"the draft model {name} has another vocabulary: {what}; take one of the same family")


def _check_takes_back(context: Context, name: str) -> None:
    """Raise UnsupportedError for a model whose memory is a state that tokens cannot be taken out of again."""
    batch = context.new_batch()
    batch.add((0,), 0, 0, output_last=False)
    context.decode(batch)
    batch.clear()
    batch.add((0,), 1, 0, output_last=True)
    context.decode(batch)
    if not context.remove(0, 1) or context.last_position(0) != 0:
        raise UnsupportedError(f"the draft model {name} cannot take back tokens that were not accepted")
    context.remove(0)
