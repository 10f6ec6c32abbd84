"""From a request to the tokens the model reads."""

from __future__ import annotations

from dataclasses import asdict

from ziggurat.runtime.bindings import Vocab
from ziggurat.runtime.chat_template import ChatTemplate
from ziggurat.runtime.engine.protocol import GenerationRequest
from ziggurat.runtime.errors import TemplateError


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

    def render(self, request: GenerationRequest) -> str:
        """Return the text of a conversation as the model's template writes it, ready for the assistant's turn."""
        if self._source is None:
            raise TemplateError("the model has no chat template: give the prompt as it is (--raw)")
        if self._template is None:
            vocab = self._vocab
            self._template = ChatTemplate(self._source, bos=vocab.text_of(vocab.bos), eos=vocab.text_of(vocab.eos))
        return self._template.render([asdict(message) for message in request.messages or ()])

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a prompt. A BOS the text begins with (templates write their own) is not doubled; no EOS is added."""
        vocab = self._vocab
        tokens = vocab.tokenize(text, add_special=False, parse_special=True)
        if vocab.adds_bos and vocab.bos is not None and tokens[:1] != [vocab.bos]:
            tokens.insert(0, vocab.bos)
        return tokens
