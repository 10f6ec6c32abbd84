"""The KV view with its budget: asks the backend what is kept and the host what another budget takes."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical

from ziggurat.runtime.budget import PRESETS
from ziggurat.tui.backend import BackendError
from ziggurat.tui.screens.loader import Loader, describe, with_budget
from ziggurat.tui.session import Session
from ziggurat.tui.widgets.background import background
from ziggurat.tui.widgets.budget_form import BudgetForm
from ziggurat.tui.widgets.kv_view import KvMap, KvView

_POLICIES = ("none", *PRESETS)


class KvPanel(Vertical):
    """Shows what the model still remembers of the conversation, and lets the budget be changed."""

    def __init__(self, session: Session, loader: Loader) -> None:
        super().__init__(id="kv")
        self._session, self._loader = session, loader
        self.view = KvView()
        self.form = BudgetForm(policies=_POLICIES)

    def compose(self) -> ComposeResult:
        """Compose the panel."""
        yield self.view
        yield self.form

    def refresh_kept(self) -> None:
        """Ask what is kept, if that is seen."""
        if self.display and self.is_mounted:
            background(self, self._show_kept, group="kept", exclusive=True)

    async def _show_kept(self) -> None:
        backend = self._session.backend
        if backend is None:
            self.view.show(None)
            return
        try:
            kept = await backend.kept(self._session.conversation.id)
        except BackendError as error:
            self.view.show(None, head=str(error))
            return
        status = self._session.figures().status
        if kept is None and status is not None and not status.ours:
            self.view.show(None, head="This server does not tell what it keeps: that needs ziggurat serve.")
        else:
            self.view.show(kept, head=status.kv_refused or "" if status is not None else "")

    def on_kv_map_chosen(self, event: KvMap.Chosen) -> None:
        """Ask for the words of a stretch."""
        event.stop()
        background(self, self._show_words, event, group="words", exclusive=True)

    async def _show_words(self, chosen: KvMap.Chosen) -> None:
        kept, backend = self.view.map.kept, self._session.backend
        if kept is None or backend is None:
            return
        try:
            text = await backend.text(kept.stretch(chosen.column, chosen.columns))
        except BackendError as error:
            text = "" if error.kind == "lost" else str(error)  # that the server is lost is said elsewhere
        self.view.show_words(chosen, text)

    def refresh_plan(self) -> None:
        """Fill the form with what is used now."""
        setup = self._loader.current
        self.form.display = setup is not None
        if setup is not None:
            self.form.budget.value = setup.kv_budget or ""
            self.form.policy.value = setup.kv_policy or ""

    def on_budget_form_changed(self, event: BudgetForm.Changed) -> None:
        """Ask what another budget takes, and show it."""
        event.stop()
        background(self, self._show_plan, event, group="plan", exclusive=True)

    async def _show_plan(self, asked: BudgetForm.Changed) -> None:
        setup = self._loader.current
        if setup is None:
            return
        try:
            planned = await self._loader.plan(with_budget(setup, asked.budget, asked.policy))
        except BackendError as error:
            self.form.tell(str(error), trouble=True)
            return
        if planned.shortage is not None:
            self.form.tell(planned.shortage, trouble=True)
        else:
            self.form.tell(describe(planned) + "   Enter applies it to the next prompt")
        if self.view.map.kept is None:
            self.view.show(None, planned.rows)

    def on_budget_form_applied(self, event: BudgetForm.Applied) -> None:
        """Start the model anew with the budget."""
        event.stop()
        if self._loader.current is not None:
            self._loader.start(with_budget(self._loader.current, event.budget, event.policy))
