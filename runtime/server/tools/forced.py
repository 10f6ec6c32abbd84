"""Grammars for answers that must be tool calls, with arguments that fit the functions' schemas."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ziggurat.runtime.json_rules import literal
from ziggurat.runtime.server.tools.definitions import Function
from ziggurat.runtime.server.tools.forms import Form

#: Calls in one answer, at most: a model that writes one after the other has to end.
MAX_CALLS = 16

# What is no name of a rule in a grammar (strings, classes), and names.
_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|(?P<name>[a-zA-Z][a-zA-Z0-9-]*)')


def calls_grammar(
    form: Form,
    functions: Sequence[Function],
    *,
    parallel: bool,
    token_of: Callable[[str], int | None],
    otherwise: str | None = None,
) -> str:
    """Return a grammar (GBNF) of one call, or of several, of these functions.

    ``token_of`` tells the control token of a text, None when it is written in letters. ``otherwise`` is a grammar of
    texts that the answer may be instead. Raises InvalidRequestError naming the function whose schema makes none.
    """

    def written(text: str) -> str:
        token = token_of(text) if text in form.control else None
        return literal(text) if token is None else f"<[{token}]>"

    rules, calls = [], []
    for index, function in enumerate(functions):
        rules.append(renamed(function.grammar(), f"f{index}-"))
        arguments = f"f{index}-root"
        if form.named:
            calls.append(f"{literal(function.name)} {written('[ARGS]')} {arguments}")
        else:
            begin = literal(f'{{"name": "{function.name}", "{form.arguments}": ')
            calls.append(f'{begin} {arguments} "}}"')
    rules.append(f"call ::= {' | '.join(calls)}")
    more = f"{{0,{MAX_CALLS - 1}}}" if parallel and not form.one_call else "{0}"
    rules.append(f"answer ::= {_answer(form, written, more)}")
    if otherwise is None:
        rules.append("root ::= answer")
    else:
        rules += [renamed(otherwise, "otherwise-"), "root ::= answer | otherwise-root"]
    return "\n".join(rules) + "\n"


def _answer(form: Form, written: Callable[[str], str], more: str) -> str:
    """Return an expression for the whole answer, of ``call``s."""
    if form.named:
        one = f"{written(form.marker)} call"
        return one if more == "{0}" else f"{one} ({one}){more}"
    if form.at_start and not form.opening:  # an object alone, without its marker
        return "call"
    if not form.opening:  # each between its own tags
        one = f'{written(form.marker)} "\\n" call "\\n" {written(form.closers[0])}'
        return one if more == "{0}" else f'{one} ("\\n" {one}){more}'
    marker = f"{written(form.marker)} " if form.marker else ""
    opening, closing = literal("".join(form.opening)), literal("".join(form.closers[: _depth(form)]))
    following = "" if more == "{0}" else f' (", " call){more}'
    return f"{marker}{opening} call{following} {closing}"


def _depth(form: Form) -> int:
    """Return how many of the closers close what the opening opens."""
    return sum(token in "{[" for token in form.opening)


def renamed(grammar: str, prefix: str) -> str:
    """Return a grammar with a prefix before the name of every rule. It has no comments and names no tokens."""
    return _PARTS.sub(lambda part: prefix + part[0] if part["name"] else part[0], grammar.strip())
