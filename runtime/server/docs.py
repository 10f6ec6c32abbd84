"""``GET /docs``: the OpenAPI document as a page to read, which loads nothing from anywhere else."""

from __future__ import annotations

import html
import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from ziggurat.runtime.server.openapi import Json, operations

router = APIRouter(include_in_schema=False)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre, code { font: 14px/1.4 ui-monospace, monospace; } pre { padding: .7rem; overflow: auto; background: #8882; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .2rem .6rem;
border-top: 1px solid #8884; } h2 { margin-top: 3rem; } summary { cursor: pointer; }
"""


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Show what the server understands."""
    return HTMLResponse(page(request.app.openapi()))


def page(document: Json) -> str:
    """Return the page of a document."""
    info = document["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{_text(info['title'])}</title><style>{_STYLE}</style>",
        f"<h1>{_text(info['title'])} {_text(info['version'])}</h1><p>{_text(info['description'])}</p>",
        "<p>For programs: <a href=openapi.json>openapi.json</a></p>",
    ]
    parts += [_operation(document, path, method, operation) for path, method, operation in operations(document)]
    return "\n".join(parts)


def _operation(document: Json, path: str, method: str, operation: Json) -> str:
    key = " <small>needs an API key</small>" if operation.get("security") else ""
    parts = [
        f"<h2><code>{method.upper()} {_text(path)}</code></h2><p>{_text(operation.get('description', ''))}{key}</p>"
    ]
    parameters = operation.get("parameters", [])
    if parameters:
        rows = [(each["name"], each["schema"], each.get("description", "")) for each in parameters]
        parts.append(_table(rows))
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body is not None:
        parts.append(_fields("Request", _resolved(document, body["schema"])))
        if "example" in body:
            parts.append(f"<pre>{_text(_curl(path, body['example']))}</pre>")
    answer = operation["responses"]["200"].get("content", {}).get("application/json", {}).get("schema")
    if answer:
        parts.append(_fields("Answer", _resolved(document, answer)))
    errors = [(status, each["description"]) for status, each in operation["responses"].items() if status >= "400"]
    cells = "".join(f"<tr><td>{status}<td>{_text(text)}" for status, text in errors)
    parts.append(f"<details><summary>Errors</summary><table>{cells}</table></details>")
    return "\n".join(parts)


def _fields(title: str, schema: Json) -> str:
    rows = [(name, each, each.get("description", "")) for name, each in schema.get("properties", {}).items()]
    required = schema.get("required", [])
    rows = [(f"{name} *" if name in required and title == "Request" else name, each, text) for name, each, text in rows]
    intro = f"<p>{_text(schema.get('description', ''))}</p>"
    return f"<details open><summary>{title}</summary>{intro}{_table(rows)}</details>"


def _table(rows: list[tuple[str, Json, str]]) -> str:
    cells = "".join(
        f"<tr><td><code>{_text(name)}</code><td>{_text(_kind(schema))}<td>{_text(text)}" for name, schema, text in rows
    )
    return f"<table>{cells}</table>"


def _kind(schema: Json) -> str:
    """Return a schema's type in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "const" in schema or "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(map(_kind, schema[union])))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if low is not None or high is not None:
        kind += f" {'' if low is None else low} to {'' if high is None else high}".rstrip()
    return kind


def _resolved(document: Json, schema: Json) -> Json:
    if "$ref" not in schema:
        return schema
    found: Any = document["components"]["schemas"][str(schema["$ref"]).rsplit("/", 1)[-1]]
    return dict(found)


def _curl(path: str, example: Json) -> str:
    return f"curl http://127.0.0.1:8080{path} -H 'Content-Type: application/json' -d '{json.dumps(example)}'"


def _text(text: object) -> str:
    return html.escape(str(text))
