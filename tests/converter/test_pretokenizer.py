"""The pre-tokenizer is recognized from what tokenizer.json says, and llama.cpp splits by that name as the file does."""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import _gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from helpers.corpus import HARD_TEXTS, MARKED_TEXTS
from ziggurat.converter import pretokenizer_table as table
from ziggurat.converter.errors import TokenizerError
from ziggurat.converter.pretokenizer import read_tokenizer_json, recognize

Node = dict[str, Any]
ENTRIES = [(splits, merges, name) for splits, names in table.BYTE_LEVEL.items() for merges, name in names.items()]
NAMES = [name for *_, name in ENTRIES]
BYTE_LEVEL: Node = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
NFC: Node = {"type": "NFC"}


def split(pattern: str, behavior: str = "Isolated", *, invert: bool = False) -> Node:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def isolated(pattern: str) -> Node:
    """A stage of the table as most files spell it."""
    if pattern in (table.PUNCTUATION, table.PUNCTUATION_RUN):
        behavior = "Isolated" if pattern == table.PUNCTUATION else "Contiguous"
        return {"type": "Punctuation", "behavior": behavior}
    if pattern in (table.DIGIT, table.DIGITS):
        return {"type": "Digits", "individual_digits": pattern == table.DIGIT}
    return split(pattern)


def tokenizer(*stages: Node, normalizer: Node | None = None, ignore_merges: bool = False, **model: Any) -> Node:
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*stages, BYTE_LEVEL]},
        "model": {"type": "BPE", "ignore_merges": ignore_merges, "vocab": {}, "merges": [], **model},
    }


def name_of(content: Node) -> str:
    return recognize(content, Path("model.hf"))


def refused(content: Node, *words: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        name_of(content)
    for word in ("model.hf", "--pre", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(("splits", "merges", "name"), ENTRIES, ids=NAMES)
def test_every_entry_of_the_table(splits: tuple[str, ...], merges: bool, name: str) -> None:
    stages = [isolated(pattern) for pattern in splits]
    assert name_of(tokenizer(*stages, ignore_merges=merges)) == name
    assert name_of(tokenizer(*stages, normalizer=NFC, ignore_merges=merges)) == name
    sequence = {"type": "Sequence", "normalizers": [NFC]}
    assert name_of(tokenizer(*stages, normalizer=sequence, ignore_merges=merges)) == name


@pytest.mark.parametrize(("splits", "merges", "name"), ENTRIES, ids=NAMES)
def test_literal_control_characters(splits: tuple[str, ...], merges: bool, name: str) -> None:
    def literal(pattern: str) -> str:
        return pattern.replace(r"\r", "\r").replace(r"\n", "\n").replace(r"\t", "\t")

    stages = [isolated(p) if p.startswith("<punct") else split(literal(p)) for p in splits]
    assert name_of(tokenizer(*stages, ignore_merges=merges)) == name


@pytest.mark.parametrize(("splits", "merges", "name"), ENTRIES, ids=NAMES)
def test_categories_without_braces(splits: tuple[str, ...], merges: bool, name: str) -> None:
    def bare(pattern: str) -> str:
        return functools.reduce(lambda text, c: text.replace(rf"\p{{{c}}}", rf"\p{c}"), "LNMPS", pattern)

    stages = [isolated(p) if p.startswith("<punct") else split(bare(p)) for p in splits]
    assert name_of(tokenizer(*stages, ignore_merges=merges)) == name


COVERING = [entry for entry in ENTRIES if len(entry[0]) == 1 and entry[0][0].endswith((r"\s+(?!\S)|\s+", r"|\s"))]


@pytest.mark.parametrize(("splits", "merges", "name"), COVERING, ids=[name for *_, name in COVERING])
def test_what_exports_from_tiktoken_write(splits: tuple[str, ...], merges: bool, name: str) -> None:
    """The pattern in a group, its matches kept by removing what lies between them, which is nothing."""
    for pattern in (splits[0], f"({splits[0]})", f"(?:{splits[0]})"):
        stage = split(pattern, "Removed", invert=True)
        assert name_of(tokenizer(stage, ignore_merges=merges)) == name
    without_last = splits[0].removesuffix(r"|\s+")  # what is left unmatched stays a piece
    assert name_of(tokenizer(split(without_last), ignore_merges=merges)) == name


CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (CL100K, "smaug-bpe"),
        (CL100K.replace(r"\p{N}{1,3}+", r"\p{N}"), "qwen2"),
        (CL100K.replace(r"\p{N}{1,3}+", r"\p{N}{1}"), "qwen2"),
        (table.LLAMA3.replace(table.CONTRACTION, r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"), "smaug-bpe"),
        (
            table.QWEN2.replace(
                table.CONTRACTION, r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
            ),
            "qwen2",
        ),
    ],
    ids=["cl100k", "cl100k-digit", "cl100k-digit-1", "contraction-nested", "contraction-spelled-out"],
)  # fmt: skip
def test_other_spellings_of_the_same_pattern(pattern: str, name: str) -> None:
    assert name_of(tokenizer(split(pattern))) == name


def test_gpt2s_pattern_may_be_that_of_byte_level() -> None:
    with_regex = {**BYTE_LEVEL, "use_regex": True}
    content = tokenizer()
    content["pre_tokenizer"] = with_regex
    assert name_of(content) == name_of(tokenizer(split(table.GPT2))) == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, with_regex]}
    assert name_of(content) == "smollm"


def gemma(**changes: Any) -> Node:
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "model": {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []},
        **changes,
    }  # fmt: skip


def test_characters_with_byte_fallback() -> None:
    assert name_of(gemma()) == "gemma4"
    assert name_of(gemma(pre_tokenizer=None)) == "gemma4"
    refused(gemma(normalizer=None), "not of the Gemma kind")
    refused(gemma(model={"type": "BPE", "byte_fallback": False}), "not of the Gemma kind")


@pytest.mark.parametrize(
    ("normalizer", "word"),
    [
        ({"type": "Lowercase"}, "Lowercase"),
        ({"type": "NFKC"}, "NFKC"),
        ({"type": "Sequence", "normalizers": [NFC, {"type": "StripAccents"}]}, "NFC + StripAccents"),
        ({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}, "Replace ' +' ' '"),
        ({"type": "Prepend", "prepend": "\u2581"}, "Prepend '\u2581'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_normalizers_that_llama_cpp_does_not_have(normalizer: Node, word: str) -> None:
    refused(tokenizer(split(table.QWEN2), normalizer=normalizer), f"normalizer {word}")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (split(r"\w+|\s+"), [r"split pattern \w+"]),
        (split(table.LLAMA3 + "|x"), ["split pattern", "|x"]),
        (split(table.LLAMA3, "MergedWithNext"), ["Split MergedWithNext"]),
        (split(table.LLAMA3, "Removed"), ["Split Removed"]),
        (split(r"\p{L}+", "Removed", invert=True), ["Split Removed with a pattern that may drop text"]),
        ({"type": "Whitespace"}, ["Whitespace"]),
        ({"type": "Metaspace", "replacement": "\u2581"}, ["Metaspace"]),
        ({"type": "Punctuation", "behavior": "Removed"}, ["Punctuation Removed"]),
        ({**BYTE_LEVEL, "add_prefix_space": True}, ["add_prefix_space"]),
        ({"type": "ByteLevel"}, ["add_prefix_space"]),
        ({"type": "Split", "behavior": "Isolated"}, ["damaged entry", "pattern"]),
        ({"type": "Digits"}, ["damaged entry", "individual_digits"]),
    ],
    ids=lambda value: "",
)
def test_pieces_that_llama_cpp_does_not_have(stage: Node, words: list[str]) -> None:
    refused(tokenizer(stage), *words)


def test_stages_in_another_order() -> None:
    stages = [isolated(pattern) for pattern in (table.DIGIT, table.GPT2)]
    assert name_of(tokenizer(*stages)) == "smollm"
    refused(tokenizer(*reversed(stages)), "split pattern")


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_models_without_merges(kind: str) -> None:
    refused(tokenizer(type=kind), f"a {kind} model has none")


@pytest.mark.parametrize(("pattern", "merges", "name"), [(table.QWEN2, True, "qwen2"), (table.TEKKEN, False, "tekken")])
def test_ignore_merges_that_no_name_has(
    caplog: pytest.LogCaptureFixture, pattern: str, merges: bool, name: str
) -> None:
    with caplog.at_level(logging.WARNING, "ziggurat"):
        assert name_of(tokenizer(split(pattern), ignore_merges=not merges)) == name
        assert caplog.messages == []
        assert name_of(tokenizer(split(pattern), ignore_merges=merges)) == name
    (message,) = caplog.messages
    assert f"ignore_merges {'off' if merges else 'on'}" in message


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer_json(tmp_path) is None
    for content in ("{", "[]", "{}"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(TokenizerError, match="tokenizer.json"):
            read_tokenizer_json(tmp_path)


# Against the library. Its regexes are its own code, so that only a comparison can tell whether a name splits alike.

LOADER = """
import ctypes, json, sys
from pathlib import Path
from helpers.stock import Gguf
result = {}
texts = json.loads(sys.stdin.read())
for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
    try:
        with Gguf(path, vocab_only=True) as model:
            result[path.stem] = [model.tokenize(text) for text in texts]
    except RuntimeError:
        result[path.stem] = None
print(json.dumps(result))
"""
TEXTS = {**HARD_TEXTS, **MARKED_TEXTS}

# What llama.cpp's regexes split otherwise than the file; no other name does better.
APART = {
    "tekken": set(MARKED_TEXTS),  # cuts before marks, where the file keeps them with their letters
    "gpt-4o": set(MARKED_TEXTS),
    "falcon, digits": {"emoji"},  # no cut between a space and a digit that is not ASCII
    "tiny_aya": {"chinese", "mixed"},  # groups digits from the right also where a letter follows them
}
# These cut less often than the files (runs of digits, case of letters beyond ASCII), which changes hardly any ids: a
# vocabulary trained with the file's cuts has few merges that cross them. Only such a vocabulary can be compared.
COARSER = ("falcon", "deepseek-llm", "youtu", "tiny_aya", "superbpe")


def original(splits: tuple[str, ...], merges: bool, model: Node) -> Tokenizer:
    content = tokenizer(*(isolated(pattern) for pattern in splits), ignore_merges=merges, **model)
    return Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], **content}))


def train(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Node:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    trained.train_from_iterator(list(TEXTS.values()), trainer)
    model = json.loads(trained.to_str())["model"]
    return {"vocab": model["vocab"], "merges": model["merges"]}


def write(path: Path, pre: str, model: Node) -> None:
    """Write a GGUF of nothing but a vocabulary."""
    writer = _gguf.GGUFWriter(path=None, arch="llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(model["vocab"]))
    writer.add_token_types([_gguf.TokenType.NORMAL] * len(model["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


# Without a split in training merges reach across every border: then only the split keeps pieces apart.
CASES = [
    (f"{i}-{kind}", splits, merges, name)
    for i, (splits, merges, name) in enumerate(ENTRIES)
    for kind in ("own", "borderless")
    if kind == "own" or name not in COARSER
]


@pytest.fixture(scope="module")
def models_by_case() -> dict[str, Node]:
    borderless = train(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    empty: Node = {"vocab": {}, "merges": []}
    return {
        case: borderless if case.endswith("borderless") else train(original(splits, merges, empty).pre_tokenizer)
        for case, splits, merges, _ in CASES
    }


@pytest.fixture(scope="module")
def by_llama_cpp(
    models_by_case: dict[str, Node], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[int]] | None]:
    """Ids of all texts by case. One process for all: on some wrong inputs the library ends it."""
    folder = tmp_path_factory.mktemp("names")
    for case, _, _, name in CASES:
        write(folder / f"{case}.gguf", name, models_by_case[case])
    write(folder / "unknown.gguf", "no-such-name", models_by_case[CASES[0][0]])
    result = subprocess.run(
        [sys.executable, "-c", LOADER, str(folder)],
        input=json.dumps(list(TEXTS.values())),
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    ids: dict[str, list[list[int]] | None] = json.loads(result.stdout)
    return ids


def test_llama_cpp_knows_every_name(by_llama_cpp: dict[str, list[list[int]] | None]) -> None:
    assert {case for case, ids in by_llama_cpp.items() if ids is None} == {"unknown"}
    assert len(by_llama_cpp) == len(CASES) + 1


@pytest.mark.parametrize(
    ("case", "splits", "merges", "name"), CASES, ids=[f"{name}-{case}" for case, *_, name in CASES]
)  # fmt: skip
def test_llama_cpp_splits_as_the_file_says(
    by_llama_cpp: dict[str, list[list[int]]],
    models_by_case: dict[str, Node],
    case: str,
    splits: tuple[str, ...],
    merges: bool,
    name: str,
) -> None:
    reference = original(splits, merges, models_by_case[case])
    wrong = {
        key
        for (key, text), got in zip(TEXTS.items(), by_llama_cpp[case], strict=True)
        if got != reference.encode(text, add_special_tokens=False).ids
    }
    assert wrong == APART.get("falcon, digits" if name == "falcon" and table.DIGITS in splits else name, set())
