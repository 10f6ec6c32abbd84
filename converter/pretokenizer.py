"""Recognizes llama.cpp's pre-tokenizer name from the content of a tokenizer.json: normalizer and split patterns.

Upstream's converter knows tokenizers only by a hash over one text encoded with the original vocabulary, so that every
fine-tune with a vocabulary of its own is refused; what has to be known is how the text is split, and the file says it.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from ziggurat.converter.errors import TokenizerError
from ziggurat.converter.pretokenizer_table import (
    ALTERNATIVES,
    BYTE_LEVEL,
    DIGIT,
    DIGITS,
    GPT2,
    PUNCTUATION,
    PUNCTUATION_RUN,
)

logger = logging.getLogger(__name__)

BYTES = "<bytes>"  # the stage where text becomes bytes

# Gemma's BPE over characters: the normalizer replaces spaces, nothing splits, unknown characters become bytes.
SPACE_TO_BLOCK = ("Replace ' ' '\u2581'",)


class _Unknown(Exception):
    """A component for which llama.cpp has no counterpart; the text names it."""


def recognize(tokenizer: dict[str, Any], where: Path) -> str:
    """The value for `tokenizer.ggml.pre`.

    Args:
        tokenizer: the content of tokenizer.json.
        where: the checkpoint, for the message.

    Raises:
        TokenizerError: llama.cpp has no pre-tokenizer that splits like this one.
    """
    try:
        return _recognize(tokenizer)
    except _Unknown as e:
        reason = str(e)
    except (KeyError, TypeError) as e:
        reason = f"a damaged entry ({e})"
    raise TokenizerError(
        f"{where}: the pre-tokenizer is not known to llama.cpp: {reason}; if you know one that splits alike, name it "
        "with --pre (for example llama-bpe, qwen2, gpt-2)"
    )


def read_tokenizer_json(folder: Path) -> dict[str, Any] | None:
    """The folder's tokenizer.json, or None.

    The file itself counts, not the tokenizer that transformers makes of it: for some classes it replaces normalizer
    and splits by those of the class.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise TokenizerError(f"{path} cannot be read as JSON ({e}): copy the file again") from e
    if not isinstance(content, dict) or "model" not in content:
        raise TokenizerError(f"{path} is not a tokenizer of the tokenizers library: copy the file again")
    return content


def _recognize(tokenizer: dict[str, Any]) -> str:
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise _Unknown(f"a {model['type']} model has none")
    normalizer = _normalizers(tokenizer.get("normalizer"))
    stages = _stages(tokenizer.get("pre_tokenizer"))
    if BYTES not in stages:
        if normalizer == SPACE_TO_BLOCK and not stages and model.get("byte_fallback"):
            return "gemma4"
        raise _Unknown("a BPE over characters that is not of the Gemma kind")
    # llama.cpp normalizes nothing before BPE. Only text that is not in NFC already differs; anything else changes ids.
    if normalizer not in ((), ("NFC",)):
        raise _Unknown(f"normalizer {' + '.join(normalizer)}")
    splits = tuple(stage for stage in stages if stage != BYTES)
    names = _TABLE.get(splits)
    if names is None:
        raise _Unknown("split pattern " + " then ".join(splits))
    ignore_merges = bool(model.get("ignore_merges"))
    if ignore_merges not in names:
        logger.warning(
            "llama.cpp splits like this tokenizer only with ignore_merges %s: ids may differ for vocabulary entries "
            "that merges do not reach", "off" if ignore_merges else "on",
        )  # fmt: skip
        return next(iter(names.values()))
    return names[ignore_merges]


def _normalizers(node: dict[str, Any] | None) -> tuple[str, ...]:
    if node is None:
        return ()
    kind = node["type"]
    if kind == "Sequence":
        return tuple(name for child in node["normalizers"] for name in _normalizers(child))
    if kind == "Replace":
        pattern = node["pattern"]
        return (f"Replace {pattern.get('String', pattern.get('Regex'))!r} {node['content']!r}",)
    if kind == "Prepend":
        return (f"Prepend {node['prepend']!r}",)
    return (str(kind),)


def _stages(node: dict[str, Any] | None) -> tuple[str, ...]:
    """What the pre-tokenizer does: the patterns of its isolated splits in canonical spelling, and BYTES."""
    if node is None:
        return ()
    kind = node["type"]
    if kind == "Sequence":
        return tuple(stage for child in node["pretokenizers"] for stage in _stages(child))
    if kind == "ByteLevel":
        if node.get("add_prefix_space", True):  # the default of the tokenizers library
            raise _Unknown("ByteLevel with add_prefix_space")
        return ((_canonical(GPT2),) if node.get("use_regex", True) else ()) + (BYTES,)
    if kind == "Digits":
        return (DIGIT if node["individual_digits"] else DIGITS,)
    if kind == "Punctuation":
        behavior = node.get("behavior", "Isolated")
        if behavior not in ("Isolated", "Contiguous"):
            raise _Unknown(f"Punctuation {behavior}")
        return (PUNCTUATION if behavior == "Isolated" else PUNCTUATION_RUN,)
    if kind == "Split":
        return _split_stage(node)
    raise _Unknown(str(kind))


def _split_stage(node: dict[str, Any]) -> tuple[str, ...]:
    pattern, how = node["pattern"], (node["behavior"], node.get("invert", False))
    if how == ("MergedWithPrevious", False) and pattern == {"String": " "}:
        return ()  # Gemma: after its normalizer there is no space left to split at
    if how not in (("Isolated", False), ("Isolated", True), ("Removed", True)):
        raise _Unknown(f"Split {how[0]}")
    text = _canonical(pattern["Regex"]) if "Regex" in pattern else re.escape(pattern["String"])
    # Removed with invert keeps the matches only: the same where the pattern covers every text (exports from tiktoken).
    if how == ("Removed", True) and not text.endswith((r"\s+(?!\S)", r"|\s")):
        raise _Unknown("Split Removed with a pattern that may drop text")
    return (text,)


def _canonical(pattern: str) -> str:
    """One spelling for patterns that split alike."""
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t")
    pattern = re.sub(r"\\p([LMNPSZC])", r"\\p{\1}", pattern)  # \pL is \p{L}, \pN{1,3} is \p{N}{1,3}
    whole = re.fullmatch(r"\((?:\?:)?(?!\?)(.*)\)", pattern, re.S)
    if whole and len(_alternatives(pattern)) == 1 and _balanced(whole[1]):  # one group around everything
        pattern = whole[1]
    parts = [ALTERNATIVES.get(part, part) for part in _alternatives(pattern)]
    if len(parts) > 1 and parts[-1] == r"\s+":
        parts.pop()  # what a split leaves unmatched stays one piece, so behind \s+(?!\S) this changes nothing
    return "|".join(parts)


def _alternatives(pattern: str) -> list[str]:
    """Split a regex at its top-level bars."""
    parts, depth, in_class, start, i = [], 0, False, 0, 0
    while i < len(pattern):
        c = pattern[i]
        if c == "\\":
            i += 1
        elif in_class:
            in_class = c != "]"
        elif c == "[":
            in_class = True
            i += pattern[i + 1 : i + 2] == "^"
        elif c == "(":
            depth += 1
        elif c == ")":
            depth -= 1
        elif c == "|" and depth == 0:
            parts.append(pattern[start:i])
            start = i + 1
        i += 1
    return [*parts, pattern[start:]]


def _balanced(text: str) -> bool:
    """Whether no group closes that was not opened inside `text`."""
    depth = 0
    for c in re.sub(r"\\.|\[\^?\]?[^\]]*\]", "", text):
        depth += (c == "(") - (c == ")")
        if depth < 0:
            return False
    return depth == 0


_TABLE = {
    tuple(s if s in (PUNCTUATION, PUNCTUATION_RUN) else _canonical(s) for s in splits): names
    for splits, names in BYTE_LEVEL.items()
}
