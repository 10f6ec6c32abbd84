"""A converted vocabulary gives the token ids of the Hugging Face tokenizer, and the text back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sentencepiece
from gguf import GGUFReader
from tokenizers import Tokenizer

from helpers.corpus import HARD_TEXTS, MARKED_TEXTS
from helpers.stock import Gguf
from helpers.vocabularies import KINDS
from ziggurat.converter.errors import ConvertError
from ziggurat.converter.pipeline import ConvertSettings, convert

# tokenizer kind -> the family whose body carries it
BODIES = {
    "llama3": "llama_gqa",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
    "tekken": "mistral",
    "smollm": "llama_tied",
    "deepseek_v3": "llama_untied",
    "llama2": "llama_untied",
    "mistral": "mistral",
    "phi3": "phi3",
    "gemma": "gemma2",
    "gemma3": "gemma3",
    "t5": "t5",
    "unigram": "llama_untied",
}
# Unigram vocabularies have no tokens for what they never saw, and the tokenizers library has their control pieces among
# the ordinary ones.
WITH_BYTES = [kind for kind in BODIES if kind not in ("t5", "unigram")]
REFUSED = {"unigram_bytes": "llama_untied"}
PREFIXED = ("llama2", "mistral", "phi3", "unigram")  # SentencePiece puts a space before the text


class Pair:
    """The same vocabulary twice: the original and the converted one."""

    def __init__(self, kind: str, folder: Path, converted: Gguf) -> None:
        self.kind = kind
        self.original = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.converted = converted
        self._model = folder / "tokenizer.model"

    def original_ids(self, name: str, text: str) -> list[int]:
        """The ids without any special token; by SentencePiece itself where the tokenizers library departs from it."""
        if name in KINDS[self.kind].as_sentencepiece:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(self._model))
            return list(processor.encode(text))
        return self.original.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=list(BODIES))
def pair(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path], gguf: Callable[[Path, str], Path]
) -> Iterator[Pair]:
    folder = checkpoint(BODIES[request.param], tokenizer=request.param)
    path = gguf(folder, "f32")
    fields = GGUFReader(path).fields
    # checked before anything is tokenized: with the wrong model llama.cpp does not fail, it ends the process
    assert fields["tokenizer.ggml.model"].contents() == KINDS[request.param].model
    if KINDS[request.param].pre is not None:
        assert fields["tokenizer.ggml.pre"].contents() == KINDS[request.param].pre
    with Gguf(path, vocab_only=True) as converted:
        yield Pair(request.param, folder, converted)


def test_bodies_cover_every_kind() -> None:
    assert {*BODIES, *REFUSED} == set(KINDS)


def test_ids(pair: Pair) -> None:
    kind = KINDS[pair.kind]
    texts = HARD_TEXTS if kind.cuts_marks else {**HARD_TEXTS, **MARKED_TEXTS}
    wrong = {
        name: (got, wanted)
        for name, text in texts.items()
        if name not in kind.beyond_llama_cpp
        and (got := pair.converted.tokenize(text)) != (wanted := pair.original_ids(name, text))
    }
    assert not wrong


def test_ids_with_the_tokens_around_a_text(pair: Pair) -> None:
    text = HARD_TEXTS["english"]
    assert pair.converted.tokenize(text, add_special=True) == pair.original.encode(text).ids


@pytest.mark.parametrize("pair", WITH_BYTES, indirect=True)
def test_text_comes_back(pair: Pair) -> None:
    for name, text in {**HARD_TEXTS, **MARKED_TEXTS}.items():
        if name == "block" and KINDS[pair.kind].model == "llama":
            continue  # SentencePiece's own sign for a space cannot be told from a space
        back = b"".join(pair.converted.piece(token) for token in pair.converted.tokenize(text))
        assert back == (b" " if pair.kind in PREFIXED else b"") + text.encode(), name


def _special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def test_special_tokens_are_found_when_asked_for(pair: Pair) -> None:
    for token_id, content in _special_tokens(pair.original).items():
        assert pair.converted.tokenize(content, parse_special=True) == [token_id], content
        text = f"a{content}b" if pair.kind in PREFIXED else f"up{content}down {content}{content}\n"
        got = pair.converted.tokenize(text, parse_special=True)
        assert got.count(token_id) == text.count(content), content
        if pair.kind not in PREFIXED:
            assert got == pair.original.encode(text, add_special_tokens=False).ids, content


@pytest.mark.parametrize("pair", WITH_BYTES, indirect=True)
def test_special_tokens_are_text_otherwise(pair: Pair) -> None:
    pair.original.encode_special_tokens = True
    try:
        for token_id, content in _special_tokens(pair.original).items():
            text = f"up {content} down"
            got = pair.converted.tokenize(text)
            assert token_id not in got, content
            if pair.kind not in PREFIXED:
                assert got == pair.original.encode(text, add_special_tokens=False).ids, content
    finally:
        pair.original.encode_special_tokens = False


def test_added_tokens_that_are_not_special_are_always_found(pair: Pair) -> None:
    for token_id, token in pair.original.get_added_tokens_decoder().items():
        if not token.special:
            text = f"up{token.content}down".replace("▁", " ")
            assert token_id in pair.converted.tokenize(text), token.content


def test_every_id_has_a_token(pair: Pair) -> None:
    assert pair.converted.vocab_size >= pair.original.get_vocab_size(with_added_tokens=True)


@pytest.mark.parametrize(("kind", "body"), REFUSED.items())
def test_vocabularies_llama_cpp_cannot_have_are_refused(
    kind: str, body: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConvertError, match="unigram"):
        convert(checkpoint(body, tokenizer=kind), tmp_path / "out.gguf", ConvertSettings(type="f32"))
    assert not list(tmp_path.iterdir())
