"""From the options that ``run`` and ``serve`` share to how an engine loads its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ziggurat.runtime.engine.settings import EngineSettings


def engine_settings(options: Mapping[str, Any], **more: Any) -> EngineSettings:
    """Return the settings of the command line; ``more`` are those that no shared option stands for.

    Raises InvalidRequestError and UnsupportedError.
    """
    from ziggurat.runtime.engine.settings import EngineSettings
    from ziggurat.runtime.kv_policy import policy_of
    from ziggurat.runtime.lora import LoraAdapter

    return EngineSettings(
        n_ctx=options["ctx"],
        n_ubatch=options["ubatch"],
        n_batch=max(2048, options["ubatch"]),
        type_k=options["cache_type_k"],
        type_v=options["cache_type_v"],
        threads=options["threads"],
        gpu_layers=options["gpu_layers"],
        kv=policy_of(options),
        draft_model=options["draft_model"],
        draft_max=options["draft_max"],
        prompt_lookup=options["prompt_lookup"],
        loras=tuple(map(LoraAdapter.parse, options["loras"])),
        **more,
    )
