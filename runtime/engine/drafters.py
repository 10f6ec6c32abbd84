"""The drafter that settings ask for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ziggurat.runtime.engine.draft_loader import load_draft
from ziggurat.runtime.engine.drafting import Drafting
from ziggurat.runtime.engine.ngram import NgramDrafter
from ziggurat.runtime.engine.speculation import Drafter

if TYPE_CHECKING:
    from ziggurat.runtime.engine.loader import Loaded
    from ziggurat.runtime.engine.settings import EngineSettings

_logger = logging.getLogger(__name__)


def make_drafting(loaded: Loaded, settings: EngineSettings) -> Drafting | None:
    """Load what is to propose tokens; None when nothing is. Prompt lookup goes before a draft model.

    Drafts that were wrong are taken back, so a model that cannot do that gets none. Raises what ``load_draft`` raises.
    """
    if loaded.model.recurrent:
        _logger.info("%s: no drafts: nothing can be taken back of a recurrent state", loaded.info.path)
        return None
    drafters: list[Drafter] = []
    if settings.prompt_lookup:
        drafters.append(NgramDrafter(loaded.model.vocab.eog_tokens()))
    if settings.draft_model is not None:
        context, policy = loaded.contexts.settings, loaded.contexts.policy
        drafters.append(load_draft(settings.draft_model, loaded.model, context, policy, gpu_layers=settings.gpu_layers))
    return Drafting(drafters, settings.draft_max) if drafters else None
