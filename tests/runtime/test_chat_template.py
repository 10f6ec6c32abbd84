from __future__ import annotations

import time

import pytest

from helpers import tiny_models
from ziggurat.runtime.bindings import Model
from ziggurat.runtime.chat_template import ChatTemplate
from ziggurat.runtime.engine import GenerationRequest, Message
from ziggurat.runtime.engine.prompts import PromptEncoder
from ziggurat.runtime.errors import TemplateError

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
{{ message['content'] | trim }}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{% if add_generation_prompt %}
{{ '<start_of_turn>model\\n' }}
{% endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{% continue %}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN_TOOLS = """{%- macro turn(role, text) -%}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro -%}
{%- if tools %}{{ turn('system', tools | tojson(indent=2)) }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{% set ns.last = loop.revindex0 %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ turn('assistant', message.content.split('</think>')[-1].lstrip('\\n')) }}{% endgeneration %}
    {%- else %}
        {{- turn(message.role, message.content ~ (' *' if loop.index0 == ns.last else '')) }}
    {%- endif %}
{%- endfor %}
{%- for key, value in {'b': 1, 'a': [1, "<é>"]}.items() %}{{ key }}={{ value | tojson }};{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

REAL = {"llama-3": LLAMA3, "chatml": tiny_models.CHATML, "gemma": GEMMA, "mistral": MISTRAL, "qwen": QWEN_TOOLS}
CHATS = [
    [("user", "Hello!")],
    [
        ("system", "Be brief. "),
        ("user", " Who are you? "),
        ("assistant", "<think>hm</think>\nA model."),
        ("user", "日本語 <b>&\"'"),
    ],
]


def as_messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


@pytest.fixture(scope="module")
def render_like_transformers():  # type: ignore[no-untyped-def]
    """Their renderer: the very code behind ``apply_chat_template``."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")

    def render(source: str, messages: list[dict[str, str]], **names: object) -> str:
        return utils.render_jinja_template(
            [messages], chat_template=source, bos_token="<s>", eos_token="</s>", **names
        )[0][0]

    return render


@pytest.mark.parametrize("name", list(REAL))
@pytest.mark.parametrize("chat", CHATS, ids=["one turn", "system and turns"])
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_transformers_does(render_like_transformers, name, chat, prompt) -> None:  # type: ignore[no-untyped-def]
    template = ChatTemplate(REAL[name], bos="<s>", eos="</s>")
    tools = [{"name": "f", "arguments": {"é": [1, None, True]}}]
    ours = template.render(as_messages(chat), add_generation_prompt=prompt, tools=tools)
    assert ours == render_like_transformers(REAL[name], as_messages(chat), add_generation_prompt=prompt, tools=tools)
    assert ours


def test_chatml_without_transformers() -> None:
    text = ChatTemplate(tiny_models.CHATML).render(as_messages([("user", "Hi")]))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_templates_own_refusal_is_the_error() -> None:
    with pytest.raises(TemplateError, match="Conversation roles must alternate"):
        ChatTemplate(GEMMA).render(as_messages([("assistant", "I"), ("user", "You")]))


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n else '' }}{% endmacro %}{{ m(200) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * 10**10 }}",
        "{{ 9999 ** 99999999 }}",
        "{% set x = [0] * 100000 %}{% for i in x %}{% for j in x %}{{ 'y' * 1000 }}{% endfor %}{% endfor %}",
        "{{ messages[0].__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[9].content.x }}",
        "{{ undefined_thing() }}",
        "{{ 1 / 0 }}",
        "{{ cycler.__init__.__globals__ }}{{ 1/0 }}",
        "{% include 'x' %}",
    ],
)
def test_hostile_and_broken_templates_end_in_one_line(source: str) -> None:
    started = time.perf_counter()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render(as_messages(CHATS[0]))
        pytest.fail("rendered")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% for %}", "{% nonsense %}", "{{ " + "(" * 5000])
def test_templates_that_do_not_compile(source: str) -> None:
    with pytest.raises(TemplateError, match="does not compile|nested too deeply"):
        ChatTemplate(source)


def test_bos_is_there_exactly_once(spm_model: Model, bpe_model: Model) -> None:
    chat = GenerationRequest(messages=(Message("user", "a"),))
    with_bos = PromptEncoder(spm_model.vocab, "{{ bos_token }}{{ messages[0].content }}")
    without = PromptEncoder(spm_model.vocab, "{{ messages[0].content }}")
    for encoder in (with_bos, without):
        assert encoder.encode(chat).count(1) == 1
        assert encoder.encode(chat)[0] == 1
        assert encoder.encode(GenerationRequest(prompt="<s>a")).count(1) == 1
        assert encoder.encode(GenerationRequest(prompt="a"))[0] == 1
    assert spm_model.vocab.eos not in without.encode(chat)
    assert PromptEncoder(bpe_model.vocab, None).encode(GenerationRequest(prompt="a")) == [ord("a")]
    assert with_bos.encode(GenerationRequest(tokens=(5, 6))) == [5, 6]


def test_a_conversation_without_a_template_is_refused(spm_model: Model) -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        PromptEncoder(spm_model.vocab, None).encode(GenerationRequest(messages=(Message("user", "a"),)))
