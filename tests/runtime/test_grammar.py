from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.grammars import accepts, random_text
from ziggurat.runtime.bindings import GrammarSampler, Model
from ziggurat.runtime.engine import FinishEvent, GenerationRequest
from ziggurat.runtime.engine.llama_engine import LlamaEngine
from ziggurat.runtime.errors import InvalidRequestError, TokenError, UnsupportedError
from ziggurat.runtime.grammar import read_grammar
from ziggurat.runtime.sampler import Sampler
from ziggurat.runtime.sampling import SamplingParams

ARITHMETIC = r"""
root ::= (expr "=" ws term "\n")+   # sums
expr ::= term ([-+*/] term)*
term ::= number | "(" ws expr ")" ws
number ::= [0-9]{1,3} ws
ws ::= [ \t]{0,2}
"""
HOSTILE = {
    "nothing": ("", "no rule with the name root"),
    "no root": ('start ::= "a"', "no rule with the name root"),
    "NUL": ('root ::= "a\0b"', "NUL"),
    "surrogate": ('root ::= "\ud800"', "Unicode"),
    "quotes": ('root ::= "a', "ends within quotes"),
    "escape": (r'root ::= "\q"', "escape"),
    "undefined": ("root ::= other", "does not define"),
    "twice": ('root ::= "a"\nroot ::= "b"', "line 2, column 5: .* defined twice"),
    "empty set": ('root ::= "a" []', "empty"),
    "range": ("root ::= [z-a]", "ends before it begins"),
    "upside down": ('root ::= "a"{5,2}', "fewer"),
    "many": ('root ::= "a"{99999}', "more than 2000"),
    "endless number": ('root ::= "a"{' + "9" * 99 + "}", "more than 2000"),
    "many of many": ('root ::= (("a" "b"){0,50}){0,50}', "more than 2000"),
    "nothing to repeat": ('root ::= ""*', "nothing to repeat"),
    "large": ('root ::= "' + "x" * 3000 + '"{2000}', "more than 200000"),
    "larger": ("root ::= " + '"' + "x" * 600_000 + '"', "bytes"),
    "deep": ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
    "open": ('root ::= ("a"', r"'\)' is missing"),
    "rest": ('root ::= "a")', "not expected"),
    "left": ('root ::= root "a" | "b"', "begin with itself"),
    "hidden left": ('root ::= a root "y" | "x"\na ::= b\nb ::= ""', "begin with itself"),
    "empty loop": ('root ::= ("a"?)*', "begin with itself"),
    "endless": ('root ::= "a" root', "never ends"),
    "ambiguous": ('root ::= "a" | "a" root "b" | "a" root "c"', "too ambiguous"),
    "ambiguous loop": ('root ::= (" " | " ")* "x"', "too ambiguous"),
    "ways": (
        "".join(f'r{n} ::= r{n + 1} "a" | r{n + 1} "b"\n' for n in range(40)) + 'r40 ::= "x"\nroot ::= r0',
        "too many ways",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_library_would_not_survive_is_refused(name: str) -> None:
    text, message = HOSTILE[name]
    with pytest.raises(InvalidRequestError, match=message) as caught:
        SamplingParams(grammar=text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_long_chain_of_rules_is_refused_before_the_stack_overflows(bpe_model: Model) -> None:
    def chain(length: int) -> str:
        return "".join(f"r{n} ::= r{n + 1}\n" for n in range(length)) + f'r{length} ::= "x"\nroot ::= r0'

    with pytest.raises(InvalidRequestError, match="too many ways"):
        read_grammar(chain(5000))
    assert accepts(bpe_model.vocab, chain(1500), "x")


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        (ARITHMETIC, ["1+1=2\n", "(1*2) = 3\n", "1=1\n2=2\n"], ["", "1+=2\n", "1=1", "1234=1\n"]),
        ('root ::= "a" | "b" "c"?', ["a", "b", "bc"], ["c", "ac", "bcc"]),
        ("root ::= [^a-cé]+ .", ["dd", "日本x", "zé"], ["a", "éx", "d"]),
        (r'root ::= "\x41\u00e9\U0001F600\"\\\n"', ['Aé😀"\\\n'], ["A"]),
        ('root ::= ("ab"{2} | "c"{1,} | "d"{0,2}) "."', ["abab.", "ccc.", ".", "dd."], ["ab.", "ddd.", "ababab."]),
        ('root ::= # nothing\n  "a" ( # but\n "b"\n | "c" )\n', ["ab", "ac"], ["a"]),
        ('root ::= ""', [""], ["a"]),
        ('root ::= [-a] [a-] [\\]x]', ["-a]", "a-x"], ["bax"]),
    ],
)  # fmt: skip
def test_texts_of_a_grammar(bpe_model: Model, grammar: str, yes: list[str], no: list[str]) -> None:
    vocab = bpe_model.vocab
    assert [text for text in yes if not accepts(vocab, grammar, text)] == []
    assert [text for text in no if accepts(vocab, grammar, text)] == []


_PIECES = [
    '"a"', "[a-c]", "x", "y", "root", '("b" | x)', '("c")?', "y*", "[^a]+", '"é"{1,3}', "|", '(y "q")', '""', "x{0,2}",
    '(x "d")+', ".", "!<[3]>", "<[4]>", "[é-ü]", "{2}", "*", "(", ")", "\n",
]  # fmt: skip
_BODY = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=5).map(" ".join)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_BODY, _BODY, _BODY)
def test_what_is_not_refused_here_is_safe_in_the_library(bpe_model: Model, root: str, x: str, y: str) -> None:
    grammar = f"root ::= {root}\nx ::= {x}\ny ::= {y}\n"
    try:
        read_grammar(grammar)
    except InvalidRequestError:
        return
    random_text(bpe_model.vocab, grammar, 1, limit=20)


def test_only_whole_characters_in_utf_8_pass(bpe_model: Model) -> None:
    vocab = bpe_model.vocab

    def byte(value: int) -> int:
        return next(token for token in range(256) if vocab.piece(token) == bytes([value]))

    sampler = GrammarSampler(vocab, read_grammar("root ::= .*").text)
    eos = vocab.eos
    assert eos is not None
    assert not any(sampler.allows(byte(value)) for value in (0x00, 0x80, 0xC0, 0xF5, 0xFF))
    assert sampler.allows(eos)
    sampler.accept(byte(0xED))
    assert not sampler.allows(eos)  # within a character
    assert not sampler.allows(byte(0xA0))  # would be half of a surrogate pair
    assert not sampler.allows(byte(ord("a")))
    with pytest.raises(TokenError, match="does not continue"):
        sampler.accept(byte(0xC3))
    for value in (0x9F, 0xBF):
        sampler.accept(byte(value))
    assert sampler.allows(eos)


def control(model: Model, text: str) -> int:
    (token,) = model.vocab.tokenize(text, add_special=False, parse_special=True)
    return token


def test_control_tokens_pass_only_by_name(bpe_model: Model) -> None:
    vocab = bpe_model.vocab
    start = control(bpe_model, "<|im_start|>")
    # its letters are in the grammar, but it would show nothing
    assert not GrammarSampler(vocab, read_grammar("root ::= [a-z<>|_]+").text).allows(start)
    for grammar in ('root ::= <|im_start|> "a"', f'root ::= <[{start}]> "a"'):
        sampler = Sampler(SamplingParams(grammar=grammar), vocab, 256)
        assert sampler._grammar is not None
        assert sampler._grammar.allows(start)
    for grammar in ("root ::= <nothing>", f"root ::= <[{vocab.n_tokens}]>", "root ::= <|im_end|>"):
        with pytest.raises(InvalidRequestError, match="the grammar names"):
            Sampler(SamplingParams(grammar=grammar), vocab, 256)


def generate(engine: LlamaEngine, params: SamplingParams, n: int = 80) -> tuple[str, FinishEvent]:
    *tokens, last = engine.stream(GenerationRequest(prompt="the man", max_tokens=n, sampling=params))
    assert isinstance(last, FinishEvent)
    return "".join(event.text for event in [*tokens, last]), last


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"typical_p": 0.5, "temperature": 2.0},
        {"mirostat": 1, "temperature": 2.0},
        {"mirostat": 2, "temperature": 2.0},
        {"xtc_probability": 1.0, "temperature": 2.0, "repeat_penalty": 1.3, "dry_multiplier": 1.0},
    ],
)
def test_generations_are_of_the_grammar_and_end_with_it(engine: LlamaEngine, values: dict[str, float]) -> None:
    grammar = 'root ::= "[" [a-e]{3,12} ("é" | "日本")+ "]"'
    eos = 2
    for seed in range(4):
        # the model would never end by itself; a bias lets it where it may
        params = SamplingParams(seed=seed, grammar=grammar, logit_bias={eos: 8.0}, **values)  # type: ignore[arg-type]
        text, done = generate(engine, params)
        if done.reason == "stop":
            assert text[0] == "[" and text[-1] == "]"
            assert 3 <= sum(character in "abcde" for character in text) <= 12
            assert set(text[1:-1]) <= set("abcdeé日本")
        else:
            assert done.reason == "length"
            assert "\ufffd" not in text[:-1]


def test_a_grammar_ends_the_text_though_ends_are_forbidden(engine: LlamaEngine) -> None:
    text, done = generate(engine, SamplingParams(grammar='root ::= "yes" | "no"', ignore_eos=True))
    assert (text in ("yes", "no"), done.reason) == (True, "stop")


def test_seeds_repeat_under_a_grammar(engine: LlamaEngine) -> None:
    params = SamplingParams(2.0, seed=5, grammar="root ::= [a-z]{10,20}")
    assert generate(engine, params)[0] == generate(engine, params)[0]
    assert generate(engine, params)[0] != generate(engine, replace(params, seed=6))[0]


def test_a_grammar_that_this_vocabulary_cannot_go_on_with_is_an_error(engine: LlamaEngine) -> None:
    everything = {token: -np.inf for token in range(3, 500) if token < engine.load().n_vocab}
    with pytest.raises(UnsupportedError, match="no token"):
        generate(engine, SamplingParams(grammar='root ::= "a"', logit_bias=everything))
    assert generate(engine, SamplingParams(temperature=0), 3)[1].reason == "length"  # and the engine serves on


def test_what_is_wrong_with_a_grammar_is_raised_at_once(engine: LlamaEngine) -> None:
    with pytest.raises(InvalidRequestError, match="the grammar names"):
        engine.stream(GenerationRequest(prompt="a", sampling=SamplingParams(grammar="root ::= <nothing>")))
    with pytest.raises(InvalidRequestError, match="not both"):
        SamplingParams(grammar='root ::= "a"', json_schema="{}")


def test_json_of_a_schema_is_generated(engine: LlamaEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
    }
    for seed in range(3):
        params = SamplingParams(1.5, seed=seed, json_schema=json.dumps(schema))
        text, done = generate(engine, params)
        assert done.reason == "stop"
        found = json.loads(text)
        assert set(found) == {"name", "age"}
        assert len(found["name"]) <= 8 and found["age"] <= 99
