"""The functions that a request offers, and which of them the model may or must call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.json_schema import schema_rules

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_WITHOUT_TYPE = ("$ref", "anyOf", "oneOf", "allOf")

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Function:
    """A function as a request describes it; ``parameters`` is the JSON schema of its arguments, an object's.

    ``strict`` asks that no call breaks the schema. Raises InvalidRequestError for a name or schema that is none.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidRequestError(
                f"the function name {self.name!r:.80} must be 1 to 64 letters, digits, underscores, dots and dashes"
            )
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise InvalidRequestError(f"the parameters of {self.name} are an object's schema, not {kind!r:.80}")
        if self.strict:
            self.grammar()

    def schema(self) -> dict[str, Any]:
        """Return the schema of its arguments: that of an object, an empty one where nothing was said."""
        if self.parameters is None:
            return {"type": "object", "additionalProperties": False}
        if "type" in self.parameters or any(key in self.parameters for key in _WITHOUT_TYPE):
            return dict(self.parameters)
        return {"type": "object", **self.parameters}

    def grammar(self) -> str:
        """Return the rules of its arguments (``json_schema.schema_rules``). Raises InvalidRequestError for none."""
        try:
            return schema_rules(json.dumps(self.schema()))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"the parameters of {self.name}: {error}") from None

    def as_mapping(self) -> dict[str, Any]:
        """Return it as templates know it, which is how requests to OpenAI's chat completions have it."""
        function: dict[str, Any] = {"name": self.name, "description": self.description or ""}
        function["parameters"] = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Tools:
    """What may be called: ``functions``, and of these ``allowed`` ones (None: all), by their names.

    ``mode`` "none" forbids calls, "auto" leaves them to the model, "required" demands one at least. ``parallel`` allows
    more than one in an answer. Raises InvalidRequestError for functions of one name, and choices that are none of them.
    """

    functions: Sequence[Function] = ()
    mode: Mode = "auto"
    allowed: tuple[str, ...] | None = None
    parallel: bool = True
    by_name: dict[str, Function] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name: dict[str, Function] = {}
        for function in self.functions:
            if by_name.setdefault(function.name, function) is not function:
                raise InvalidRequestError(f"two tools have the name {function.name}")
        object.__setattr__(self, "by_name", by_name)
        if self.mode == "required" and not self.functions:
            raise InvalidRequestError("a tool is to be called, and there are no tools")
        for name in self.allowed or ():
            if name not in by_name:
                raise InvalidRequestError(f"the tool {name!r:.80} is to be called, and there is none of this name")
        if self.allowed is not None and not self.allowed:
            raise InvalidRequestError("no tool is allowed; to have none called, choose none")

    @property
    def offered(self) -> tuple[Function, ...]:
        """The functions that may be called."""
        if self.mode == "none":
            return ()
        return tuple(f for f in self.functions if self.allowed is None or f.name in self.allowed)

    @property
    def forced(self) -> bool:
        """Whether the answer has to be a call."""
        return self.mode == "required"
