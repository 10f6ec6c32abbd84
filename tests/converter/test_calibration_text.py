"""Calibration text: the one that ships with the package, one's own, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from helpers import templates
from ziggurat.converter.calibration_text import (
    BUILT_IN,
    TextSettings,
    built_in_texts,
    excerpt,
    read_texts,
    read_tokens,
)
from ziggurat.converter.checkpoint import Checkpoint, open_checkpoint
from ziggurat.converter.errors import CalibrationError, TokenizerError

WORDS = "The river takes the long way round, and every spring its loops grow a little wider. "


def _tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(checkpoint("llama_tied"))


def with_template(checkpoint: Checkpoint, folder: Path, template: str) -> Checkpoint:
    shutil.copytree(checkpoint.folder, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return open_checkpoint(folder)


# The built-in text


def test_what_ships_with_the_package() -> None:
    texts = built_in_texts()
    whole = "\n".join(texts)
    assert 30_000 < len(whole.encode()) < 60_000
    scripts = {unicodedata.name(c).split()[0] for c in whole if c.isalpha()}
    assert {"LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "HANGUL", "ARABIC", "HEBREW", "DEVANAGARI"} <= scripts
    for trace in ("def ", "#include", "fn ", "SELECT ", "Assistant: ", "\\frac", "<p>"):
        assert trace in whole
    lines = [line for line in whole.splitlines() if len(line) > 60]
    assert len(lines) == len(set(lines))  # nothing twice


def test_tokens_of_the_built_in_text(llama: Checkpoint) -> None:
    tokens = read_tokens(llama, TextSettings(tokens=2048, sequence=128))
    tokenizer = _tokenizer(llama.folder)
    assert tokens.source == BUILT_IN
    assert tokens.ids.shape == (16, 128) and tokens.ids.dtype == np.int32
    assert (tokens.ids[:, 0] == tokenizer.bos_token_id).all()
    whole = "\n\n".join(built_in_texts(tokenizer))
    for sequence in tokens.ids:
        middle = tokenizer.decode(sequence[8:-8]).strip("\ufffd")  # a sequence may begin within a character
        assert middle in whole
    assert tokens.as_json() == {
        "source": BUILT_IN, "sequences": 16, "positions": 128, "sha256": tokens.sha256,
    }  # fmt: skip


def test_families_without_a_beginning_token(checkpoint: Callable[..., Path]) -> None:
    opened = open_checkpoint(checkpoint("qwen2"))
    tokens = read_tokens(opened, TextSettings(tokens=1 << 20, sequence=128))
    tokenizer = _tokenizer(opened.folder)
    ids = tokenizer("\n\n".join(built_in_texts(tokenizer)), add_special_tokens=False)["input_ids"]
    assert np.array_equal(tokens.ids.ravel(), ids[: tokens.ids.size])  # all of it, in order, cut without a gap
    assert len(ids) - tokens.ids.size < 128


def test_the_seed_decides(llama: Checkpoint) -> None:
    def ids(seed: int) -> list[list[int]]:
        return read_tokens(llama, TextSettings(tokens=1024, sequence=128, seed=seed)).ids.tolist()

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)
    assert len({tuple(sequence) for sequence in ids(0)}) == 8


@pytest.mark.parametrize(
    ("template", "begin", "end"),
    [
        ("CHATML", "<|im_start|>user\nWrite a Python", "<|im_end|>\n"),
        ("LLAMA3", "<|start_header_id|>user<|end_header_id|>\n\nWrite a Python", "<|eot_id|>"),
        ("GEMMA", "<start_of_turn>user\nWrite a Python", "<end_of_turn>\n"),
    ],
)
def test_dialogues_are_in_the_chat_template(
    llama: Checkpoint, tmp_path: Path, template: str, begin: str, end: str
) -> None:
    opened = with_template(llama, tmp_path / "model", getattr(templates, template))
    tokenizer = _tokenizer(opened.folder)
    dialogue = next(text for text in built_in_texts(tokenizer) if "palindrome" in text)
    assert begin in dialogue and dialogue.endswith(end)
    assert tokenizer.bos_token not in dialogue  # every sequence begins with it
    assert read_tokens(opened, TextSettings(tokens=1 << 20)).sha256 != read_tokens(llama).sha256


def test_control_tokens_of_the_template_are_tokens(llama: Checkpoint, tmp_path: Path) -> None:
    opened = with_template(llama, tmp_path / "model", templates.LLAMA3)
    tokens = read_tokens(opened, TextSettings(tokens=1 << 20))
    end = _tokenizer(opened.folder).convert_tokens_to_ids("<|eot_id|>")
    assert int((tokens.ids == end).sum()) > 40


def test_the_date_does_not_matter(llama: Checkpoint, tmp_path: Path) -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + templates.CHATML
    opened = with_template(llama, tmp_path / "model", dated)
    dialogue = built_in_texts(_tokenizer(opened.folder))[-1]
    assert dialogue.startswith("1 January 2025<|im_start|>")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}",
        "{{ raise_exception('never') }}",
        "{% for %}",
    ],
)
def test_templates_that_refuse(llama: Checkpoint, tmp_path: Path, template: str) -> None:
    """Without the system's words if the template does not know them; as plain text if it takes nothing at all."""
    opened = with_template(llama, tmp_path / "model", template)
    dialogue = next(text for text in built_in_texts(_tokenizer(opened.folder)) if "boil an egg" in text)
    if "system" in template:
        assert dialogue.startswith("[How long should I boil an egg")
    else:
        assert dialogue.startswith("System: You are") and "\n\nUser: How long" in dialogue


# A text of one's own


def test_a_file(llama: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbf" + (WORDS * 100).replace(". ", ".\r\n").encode())
    tokens = read_tokens(llama, TextSettings(source=path, tokens=64, sequence=32))
    assert tokens.source == str(path)
    assert tokens.ids.shape == (2, 32)
    assert _tokenizer(llama.folder).decode(tokens.ids[0][1:]).replace("\n", " ") in WORDS * 3


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in (("c.txt", "third"), ("a.md", "first"), ("b/x.py", "second"), (".git/x", "no"), (".x", "no")):
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").write_text(" \n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert sorted(read_texts(tmp_path)) == ["first", "second", "third"]


def test_long_texts_are_sampled() -> None:
    text = "\n".join(f"line {i}" for i in range(100_000))
    short = excerpt(text, 64_000)
    lines = [int(line.removeprefix("line ")) for line in short.splitlines()[1:-1] if line[5:].isdigit()]
    assert 50_000 < len(short) <= 65_000
    assert lines[0] < 10 and lines[-1] > 99_900 and 40_000 < lines[len(lines) // 2] < 60_000
    assert excerpt(text, len(text)) == text
    assert len(excerpt("x" * 10_000, 640)) > 500  # no line ends at all


# Refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"a few words", r"has \d+ tokens, at least two sequences of 512"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is no UTF-8 text"),
        (b"text" + bytes(100), "holds zero bytes"),
        ("Straße".encode("latin-1"), r"is no UTF-8 text \(byte 4\)"),
        ("text".encode("utf-16"), "is no UTF-8 text"),
    ],
)
def test_texts_that_will_not_do(llama: Checkpoint, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as refusal:
        read_tokens(llama, TextSettings(source=path))
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


def test_a_binary_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(CalibrationError, match=r"picture\.png is no UTF-8 text"):
        read_texts(tmp_path)


def test_places_without_a_text(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("folder", "holds no file"), ("none", "does not exist"), ("pipe", "is no regular file")):
        with pytest.raises(CalibrationError, match=f"{name} {message}"):
            read_texts(tmp_path / name)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_texts(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TextSettings(sequence=4), "take at least 8"),
        (TextSettings(tokens=1000), "less than two sequences of 512"),
        (TextSettings(tokens=-1, sequence=8), "less than two sequences"),
        (TextSettings(sequence=513, tokens=2048), r"takes 512 tokens at most \(max_position_embeddings\)"),
    ],
)
def test_settings_that_will_not_do(llama: Checkpoint, settings: TextSettings, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_tokens(llama, settings)


def test_a_damaged_tokenizer(llama: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(llama.folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be loaded by transformers"):
        read_tokens(open_checkpoint(tmp_path / "model"))
