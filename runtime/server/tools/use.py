"""What a request with tools asks of the engine, and how its answers are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ziggurat.runtime.engine import Message
from ziggurat.runtime.server.tools import history
from ziggurat.runtime.server.tools.definitions import Tools
from ziggurat.runtime.server.tools.forced import calls_grammar
from ziggurat.runtime.server.tools.forms import Form, detect
from ziggurat.runtime.server.tools.parser import ToolCallParser


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request in the form of a model."""

    form: Form
    tools: Tools
    template: str | None = None

    @classmethod
    def of(cls, template: str | None, tools: Tools) -> ToolUse:
        """Return the use of tools with a chat template (Jinja source)."""
        return cls(detect(template), tools, template)

    def messages(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Return a conversation as the template wants it, the functions described if it does not do this itself."""
        said = history.written(messages, self.form)
        offered = self.tools.offered
        if self.form.native or not offered or not said:
            return said
        which = "one of them" if len(offered) > 1 else offered[0].name
        must = f"You must call {which} now." if self.tools.forced else ""
        return history.instructed(said, offered, system=_has_system(self.template), more=must)

    def definitions(self) -> tuple[Mapping[str, Any], ...]:
        """Return the functions for the template; none where it knows no tools."""
        return tuple(function.as_mapping() for function in self.tools.offered) if self.form.native else ()

    def shown(self) -> tuple[str, ...]:
        """Return the texts of control tokens that have to be in the answer's text for the parser to see."""
        return self.form.control if self.tools.offered else ()

    def grammar(self, token_of: Callable[[str], int | None], text: str | None = None) -> str | None:
        """Return the grammar of answers; None where they are free.

        ``text`` is the grammar of those that are no calls, and ``token_of`` tells the control token of a text. Raises
        InvalidRequestError where the schema of a function makes none.
        """
        offered = self.tools.offered
        if not offered or (text is None and not self.tools.forced):
            return text
        otherwise = None if self.tools.forced else text
        parallel = self.tools.parallel
        return calls_grammar(self.form, offered, parallel=parallel, token_of=token_of, otherwise=otherwise)

    def parser(self, *, eager: bool) -> ToolCallParser | None:
        """Return a parser for one answer, None where there are no calls to look for."""
        offered = self.tools.offered
        if not offered:
            return None
        names = [function.name for function in offered]
        return ToolCallParser(self.form, names, eager=eager, single=not self.tools.parallel)


def _has_system(template: str | None) -> bool:
    """Whether a template takes system messages: some refuse them, or know the other two roles only."""
    return template is None or ("system" in template and "System role not supported" not in template)
