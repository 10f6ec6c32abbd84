"""From a request to the tokens the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ziggurat.runtime.bindings import Vocab
from ziggurat.runtime.chat_template import ChatTemplate
from ziggurat.runtime.engine.protocol import GenerationRequest
from ziggurat.runtime.engine.reuse import common_prefix
from ziggurat.runtime.errors import TemplateError

_SYSTEM = ("system", "developer")


class PromptEncoder:
    """Renders and tokenizes requests for one model; safe from any thread.

    The template is compiled with the first conversation: a model with a broken one still serves raw prompts.
    """

    def __init__(self, vocab: Vocab, template_source: str | None) -> None:
        self._vocab = vocab
        self._source = template_source
        self._template: ChatTemplate | None = None

    def encode(self, request: GenerationRequest) -> list[int]:
        """Return the prompt's tokens, BOS in front exactly once if the model wants it.

        Raises TokenError for ids or text outside the vocabulary, TemplateError for conversations without a usable
        template.
        """
        if request.tokens is not None:
            self._vocab.check(request.tokens)
            return list(request.tokens)
        return self.tokenize(self.render(request) if request.messages is not None else request.prompt or "")

    def shared(self, request: GenerationRequest, tokens: Sequence[int]) -> int:
        """Return how many of a conversation's tokens are those of its system messages, which others may begin with.

        Found by rendering them before another question. 0 for prompts without such messages.
        """
        messages = request.messages or ()
        n_system = next((place for place, message in enumerate(messages) if message.role not in _SYSTEM), 0)
        if n_system == 0:
            return 0
        question = messages[n_system]
        other = replace(question, content="0" if question.content[:1] != "0" else "1")
        try:
            text = self.render(replace(request, messages=(*messages[:n_system], other)))
        except TemplateError:  # this template wants more of a conversation
            return 0
        return common_prefix(tokens, self.tokenize(text))

    def render(self, request: GenerationRequest) -> str:
        """Return the text of a conversation as the model's template writes it, ready for the assistant's turn."""
        if self._source is None:
            raise TemplateError("the model has no chat template: give the prompt as it is (--raw)")
        if self._template is None:
            vocab = self._vocab
            self._template = ChatTemplate(self._source, bos=vocab.text_of(vocab.bos), eos=vocab.text_of(vocab.eos))
        messages = [message.as_mapping() for message in request.messages or ()]
        return self._template.render(
            messages, tools=request.tools or None, variables=request.template_variables or None
        )

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a prompt. A BOS the text begins with (templates write their own) is not doubled; no EOS is added."""
        vocab = self._vocab
        tokens = vocab.tokenize(text, add_special=False, parse_special=True)
        if vocab.adds_bos and vocab.bos is not None and tokens[:1] != [vocab.bos]:
            tokens.insert(0, vocab.bos)
        return tokens
