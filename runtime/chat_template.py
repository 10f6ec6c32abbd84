"""Renders a model's chat template: Jinja that came with a downloaded file, so untrusted.

The environment is the one Hugging Face's ``apply_chat_template`` makes (same options, filters, functions, names), so
that a template renders the same. Beyond its sandbox, what a template may do is bounded: loop passes, calls and the
size of repeated strings, so that no template can hang the runtime.
"""

from __future__ import annotations

import contextvars
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ziggurat.runtime.errors import TemplateError

_MAX_STEPS = 1_000_000
_MAX_REPEATED = 1_000_000
_MAX_OUTPUT = 64 * 2**20

_steps: contextvars.ContextVar[_Steps] = contextvars.ContextVar("steps")


class ChatTemplate:
    """A compiled chat template; immutable, may render in several threads at once.

    ``bos`` and ``eos`` are the texts of the special tokens, which templates write themselves. Raises TemplateError when
    the source does not compile.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols])
        try:
            tree = environment.parse(source)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "bounded", [], [], None, None, lineno=loop.lineno)
            code = environment.compile(tree)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the model's chat template does not compile (line {error.lineno}: {_one_line(error)}); use --raw"
            ) from None
        except RecursionError:
            raise TemplateError("the model's chat template is nested too deeply to compile; use --raw") from None
        self._template = environment.template_class.from_code(environment, code, environment.globals)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text of a conversation; ``variables`` are further names the template may read.

        Raises TemplateError with the template's own message when it refuses the conversation, and when it fails or
        exceeds its bounds.
        """
        names = {
            **self._tokens,
            "messages": [dict(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            **(variables or {}),
        }
        token = _steps.set(_Steps())
        try:
            pieces, size = [], 0
            for piece in self._template.generate(names):
                size += len(piece)
                if size > _MAX_OUTPUT:
                    raise TemplateError(
                        f"the model's chat template writes more than {_MAX_OUTPUT} characters; use --raw"
                    )
                pieces.append(piece)
            return "".join(pieces)
        except TemplateError:
            raise
        except Exception as error:  # a template can raise anything Python can
            raise TemplateError(
                f"the model's chat template failed: {_one_line(error)}; use --raw to do without"
            ) from None
        finally:
            _steps.reset(token)


class _Steps:
    """Counts what a rendering does."""

    def __init__(self) -> None:
        self.left = _MAX_STEPS

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise TemplateError(f"the model's chat template does not end within {_MAX_STEPS} steps; use --raw")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with counted loops and calls, bounded repetition, and Hugging Face's functions."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["tojson"] = _to_json
        self.filters["bounded"] = _bounded
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _steps.get().take()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for count, repeated in ((left, right), (right, left)):
                if isinstance(count, int) and hasattr(repeated, "__len__") and count * len(repeated) > _MAX_REPEATED:
                    raise OverflowError(f"repeats a text or list to more than {_MAX_REPEATED} elements")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 4096:
            raise OverflowError("computes a power beyond 4096 bits")
        return super().call_binop(context, operator, left, right)


class _GenerationBlocks(Extension):
    """``{% generation %}`` marks the assistant's words for training; here its body is rendered and nothing else."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context  # keeps the compiler from evaluating it on constants
def _bounded(_context: Context, iterable: Iterable[Any]) -> Iterator[Any]:
    steps = _steps.get()
    for item in iterable:
        steps.take()
        yield item


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML; a prompt must not be escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text or type(error).__name__
