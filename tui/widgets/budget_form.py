"""Two fields that say how many KV rows are kept and which, with what that will take."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.suggester import SuggestFromList
from textual.widgets import Input, Label, Static


class BudgetForm(Vertical):
    """Asks for a budget (rows, ``N%``, or nothing for every row) and a policy; Enter applies."""

    DEFAULT_CSS = """
    BudgetForm { height: auto; border-top: solid $primary; }
    BudgetForm > Horizontal { height: 1; }
    BudgetForm Label { width: auto; color: $text-muted; padding: 0 1 0 0; }
    BudgetForm Input { width: 1fr; height: 1; border: none; padding: 0 1; margin: 0 1 0 0; }
    BudgetForm Input:focus { border: none; }
    BudgetForm > .budget--plan { height: auto; color: $text-muted; }
    BudgetForm.-trouble > .budget--plan { color: $text-error; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "apply", "Apply", show=True)]

    class Changed(Message):
        """Something else is asked for; whoever knows says what it takes with ``tell``."""

        def __init__(self, budget: str, policy: str) -> None:
            super().__init__()
            self.budget, self.policy = budget, policy

    class Applied(Changed):
        """What is asked for is to be used from the next prompt on."""

    def __init__(self, budget: str = "", policy: str = "", *, policies: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.budget = Input(budget, placeholder="rows or N%; empty: all", id="budget")
        self.policy = Input(policy, placeholder="pyramid", suggester=SuggestFromList(policies), id="policy")
        self._plan = Static("", classes="budget--plan", markup=False)

    def compose(self) -> ComposeResult:
        """Compose the form."""
        with Horizontal():
            yield Label("budget")
            yield self.budget
            yield Label("policy")
            yield self.policy
        yield self._plan

    def tell(self, text: str, *, trouble: bool = False) -> None:
        """Say what the fields come to."""
        self._plan.update(text)
        self.set_class(trouble, "-trouble")

    def on_input_changed(self, event: Input.Changed) -> None:
        """Ask what it takes."""
        event.stop()
        self.post_message(self.Changed(self.budget.value.strip(), self.policy.value.strip()))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Apply."""
        event.stop()
        self.post_message(self.Applied(self.budget.value.strip(), self.policy.value.strip()))
