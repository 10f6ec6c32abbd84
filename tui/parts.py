"""What the app is put together from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ziggurat.tui.backend import Backend, Host, ModelSetup
from ziggurat.tui.session import Session
from ziggurat.tui.settings import Settings
from ziggurat.tui.store import Store


@dataclass
class ChatParts:
    """``backend`` is there for a server that runs already, ``host`` and ``setup`` for models of this machine.

    With neither ``backend`` nor ``setup`` the chat begins without a model. ``store`` is None where nothing is kept.
    """

    session: Session
    backend: Backend | None = None
    host: Host | None = None
    store: Store | None = None
    settings: Settings = field(default_factory=Settings)
    log_file: Path | None = None
    setup: ModelSetup | None = None
    settings_file: Path | None = None
