from __future__ import annotations

from typing import Any

import pytest

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.server.tools.definitions import Function, Tools

F, G = Function("f"), Function("g", "does g", {"properties": {"a": {"type": "integer"}}})


@pytest.mark.parametrize("name", ["", "a b", "ü", "x" * 65, "f\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="the function name"):
        Function(name)


@pytest.mark.parametrize("schema", [{"type": "string"}, {"type": ["object", "null"]}, {"type": None}])
def test_parameters_are_of_an_object(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="the parameters of f are an object's schema"):
        Function("f", parameters=schema)


def test_schemas_say_that_they_are_of_objects() -> None:
    assert F.schema() == {"type": "object", "additionalProperties": False}
    assert G.schema() == {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert Function("h", parameters={}).schema() == {"type": "object"}
    assert Function("h", parameters={"$ref": "#/$defs/a"}).schema() == {"$ref": "#/$defs/a"}


def test_templates_get_what_requests_have() -> None:
    empty = {"type": "object", "properties": {}}
    assert F.as_mapping() == {"type": "function", "function": {"name": "f", "description": "", "parameters": empty}}
    assert G.as_mapping()["function"] == {"name": "g", "description": "does g", "parameters": G.parameters}


@pytest.mark.parametrize(
    ("arguments", "offered", "forced"),
    [
        (((F, G),), (F, G), False),
        (((F, G), "none"), (), False),
        (((F, G), "required"), (F, G), True),
        (((F, G), "required", ("g",)), (G,), True),
        (((F, G), "auto", ("f",)), (F,), False),
        (((),), (), False),
    ],
)
def test_what_is_offered(arguments: tuple[Any, ...], offered: tuple[Function, ...], forced: bool) -> None:
    tools = Tools(*arguments)
    assert (tools.offered, tools.forced) == (offered, forced)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((F, Function("f")),), "two tools have the name f"),
        (((), "required"), "there are no tools"),
        (((F,), "required", ("h",)), "the tool 'h' is to be called, and there is none of this name"),
        (((F,), "auto", ()), "no tool is allowed"),
    ],
)
def test_what_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Tools(*arguments)
