"""The models of this machine, with what each takes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from ziggurat.runtime.sizes import human_bytes, human_count
from ziggurat.tui.backend import BackendError, Host, ModelFile
from ziggurat.tui.widgets.background import background
from ziggurat.tui.widgets.chooser import Choice, Chooser


def choice_of(file: ModelFile, current: Path | None = None) -> Choice:
    """Return a model's line."""
    parts = [human_bytes(file.size)]
    if file.file_type:
        parts.append(file.file_type)
    if file.n_params:
        parts.append(human_count(file.n_params))
    if file.n_ctx_train:
        parts.append(f"context {file.n_ctx_train}")
    if file.kv:
        parts.append(f"KV {human_bytes(file.kv)}")
    if file.total:
        parts.append(f"in all {human_bytes(file.total)}")
    mark = "●" if current == file.path else ""
    return Choice(str(file.path), file.path.name, " · ".join(parts), mark, file.trouble or "")


class ModelsScreen(ModalScreen[Path | None]):
    """Lets one choose a model; dismissed with its path."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]

    def __init__(self, host: Host, current: Path | None, query: str = "") -> None:
        super().__init__()
        self._host, self._current, self._query = host, current, query
        self.chooser = Chooser(placeholder="Search models", empty="Looking…")

    def compose(self) -> ComposeResult:
        """Compose the screen."""
        with Vertical(classes="dialog") as box:
            box.border_title = "Models"
            box.border_subtitle = "Enter loads · Esc leaves"
            yield self.chooser

    def on_mount(self) -> None:
        """Look for models."""
        self.chooser.field.value = self._query
        background(self, self._fill)

    async def _fill(self) -> None:
        empty = self.chooser.query_one(".chooser--empty", Static)
        try:
            files = await self._host.models()
        except BackendError as error:
            empty.update(str(error))
            return
        empty.update('No GGUF was found. The settings name the folders that are searched:\nmodels = ["~/models"]')
        self.chooser.set([choice_of(file, self._current) for file in files])

    def on_chooser_chosen(self, event: Chooser.Chosen) -> None:
        """Leave with the model."""
        event.stop()
        if event.choice.trouble:
            self.notify(f"{event.choice.name} {event.choice.trouble}", severity="error")
            return
        self.dismiss(Path(event.choice.id))
