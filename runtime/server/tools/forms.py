"""The forms in which families of models write tool calls, and which of them a chat template speaks.

A form is data; ``parser.py`` reads calls in it, ``forced.py`` makes grammars of it, ``history.py`` writes earlier calls
as its templates want them. What is told here of the families comes from the templates that their models ship with.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Form:
    """How calls are written.

    Each is a JSON object with a ``name`` and ``arguments`` (the key is called so or otherwise, and both are read), or
    with ``named`` its name and then the object of arguments. ``marker`` comes before them; with ``at_start`` they may
    also stand without it where the answer begins. ``opening`` leads to the first one, ``separators`` may stand between
    calls, ``closers`` may follow the last one, in this order. ``control`` lists the texts above that are control tokens
    in vocabularies of the family.

    ``native``: the model's template describes the tools, and writes calls and results; else messages of ours do.
    ``one_call``: it takes no more than one call in a message. ``short_ids``: it takes ids of nine letters and digits.
    """

    name: str
    marker: str = ""
    at_start: bool = False
    opening: tuple[str, ...] = ()
    arguments: Literal["arguments", "parameters"] = "arguments"
    named: bool = False
    separators: str = ""
    closers: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    native: bool = True
    one_call: bool = False
    short_ids: bool = False


#: Hermes 2 and 3, Qwen 2.5 and 3: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``.
HERMES = Form("hermes", "<tool_call>", closers=("</tool_call>",), control=("<tool_call>", "</tool_call>"))
#: Llama 3.1 to 3.3: an object alone, ``{"name": …, "parameters": {…}}``, possibly after ``<|python_tag|>``.
LLAMA = Form(
    "llama",
    "<|python_tag|>",
    at_start=True,
    arguments="parameters",
    separators=";,",
    control=("<|python_tag|>",),
    one_call=True,
)
#: Mistral's 7B v0.3, Nemo, Large: ``[TOOL_CALLS][{"name": …, "arguments": {…}}, …]``.
MISTRAL = Form(
    "mistral",
    "[TOOL_CALLS]",
    opening=("[",),
    separators=",",
    closers=("]",),
    control=("[TOOL_CALLS]",),
    short_ids=True,
)
#: Mistral's newer ones: ``[TOOL_CALLS]name[ARGS]{…}``, one after the other; some with ``[CALL_ID]…`` after the name.
MISTRAL_NAMED = Form(
    "mistral-named",
    "[TOOL_CALLS]",
    named=True,
    control=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    short_ids=True,
)
#: Ours, for templates that know no tools, or write calls as none of the above.
GENERIC = Form(
    "generic",
    at_start=True,
    opening=("{", '"tool_calls"', ":", "["),
    separators=",",
    closers=("]", "}", "```"),
    native=False,
)

# Other models put <tool_call> around XML of their own.
_OTHER_CONTENTS = ("<function=", "<arg_key>")


@functools.lru_cache(maxsize=8)
def detect(template: str | None) -> Form:
    """Return the form of a chat template (Jinja source), by the markers that it writes; ``GENERIC`` for others."""
    if template is None or "tools" not in template:
        return GENERIC
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        return GENERIC if any(other in template for other in _OTHER_CONTENTS) else HERMES
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters": ' in template):
        return LLAMA
    return GENERIC
