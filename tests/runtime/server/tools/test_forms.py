from __future__ import annotations

import pytest

from helpers import templates, tool_templates
from ziggurat.runtime.server.tools import forms

XML = "{% if tools %}<tool_call>\n<function=name>\n<parameter=a>{% endif %}"


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (tool_templates.HERMES, forms.HERMES),
        (tool_templates.LLAMA, forms.LLAMA),
        ("{% if tools %}{% endif %}<|python_tag|>", forms.LLAMA),
        (tool_templates.MISTRAL, forms.MISTRAL),
        (tool_templates.MISTRAL_NAMED, forms.MISTRAL_NAMED),
        (XML, forms.GENERIC),
        ("{% if tools %}{{ '<|tool_calls_section_begin|>' }}{% endif %}", forms.GENERIC),
        (templates.CHATML, forms.GENERIC),
        (templates.GEMMA, forms.GENERIC),
        ("a template that says <tool_call> and knows none", forms.GENERIC),
        (None, forms.GENERIC),
    ],
)  # fmt: skip
def test_the_template_tells_the_form(template: str | None, form: forms.Form) -> None:
    assert forms.detect(template) is form
