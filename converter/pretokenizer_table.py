"""Split patterns of known pre-tokenizers, and llama.cpp's name for each combination.

Facts from the pinned llama.cpp (`llama-vocab.cpp`: name to regexes) and from the tokenizer.json files of the families:
every entry was split both by llama.cpp's own regex code and by the `tokenizers` library on the same texts. Where several
names split alike, one stands for all.
"""

from __future__ import annotations

# Spelled as the tokenizer.json files of the families spell them.
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
MINICPM5 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+" + _TAIL
QWEN35 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UFAKZEKA = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
SEED_CODER = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
EXAONE_MOE = (
    CONTRACTION
    + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]+|\s+(?!\S)|\s+"
)
JAIS2 = (
    CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(contraction: str, digits: str) -> str:
    word = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{word}{_UPPER}*{_LOWER}+{contraction}|{word}{_UPPER}+{_LOWER}*{contraction}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


TEKKEN = _cased("", r"\p{N}")
GPT4O = _cased(CONTRACTION + "?", r"\p{N}{1,3}")
YOUTU_MAIN = _cased(CONTRACTION + "?", r"\p{N}")
YOUTU_CJK = "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DS3_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DS3_MAIN = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
SPARK_MAIN = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"""
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
DSLLM_WORD = "\\s?[A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"  # noqa: E501
DSLLM_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
DS_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

DIGIT, DIGITS = r"\p{N}", r"\p{N}+"
PUNCTUATION, PUNCTUATION_RUN = "<punctuation>", "<punctuation>+"

# One alternative, spelled otherwise but meaning the same, to the spelling used above. A possessive quantifier is not
# always the same as a greedy one; in these it is, since the sets that follow are disjoint.
ALTERNATIVES = {
    r"'(?i:[sdmt]|ll|ve|re)": CONTRACTION,
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": CONTRACTION,
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])": CONTRACTION,
    r"[^\r\n\p{L}\p{N}]?+\p{L}+": r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}++": r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}{1}": r"\p{N}",
    r"\p{N}{1,3}+": r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*": r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+": r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]": r"\s*[\r\n]+",  # \s* is greedy and takes newlines: both end at the last newline of the run
    r"\s{1}": r"\s",
}

# Splits of a byte-level BPE, in order, to its name: {ignore_merges: name}.
BYTE_LEVEL: dict[tuple[str, ...], dict[bool, str]] = {
    (GPT2,): {False: "gpt-2"},
    (LLAMA3,): {True: "llama-bpe", False: "smaug-bpe"},
    (QWEN2,): {False: "qwen2"},
    (QWEN35,): {False: "qwen35"},
    (TEKKEN,): {True: "tekken"},
    (GPT4O,): {True: "granite-embed-multi-97m", False: "gpt-4o"},
    (DIGIT, GPT2): {False: "smollm"},
    (PUNCTUATION_RUN, GPT2, "[0-9][0-9][0-9]"): {False: "falcon"},
    (PUNCTUATION_RUN, GPT2, DIGITS, "[0-9][0-9][0-9]"): {False: "falcon"},
    ("[\r\n]", DSLLM_WORD, DSLLM_PUNCTUATION, r"\s+$", DS_CJK, DIGIT): {False: "deepseek-llm"},
    ("[\r\n]", DSLLM_WORD, DSLLM_PUNCTUATION, r"\s+$", DS_CJK, DIGITS): {False: "deepseek-llm"},
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DS_CJK, DIGIT): {False: "deepseek-coder"},
    (r"\p{N}{1,3}", DS3_CJK, DS3_MAIN): {False: "deepseek-v3"},
    (r"\p{N}{1,3}", DS3_CJK, SPARK_MAIN, DIGIT): {False: "spark2_5"},
    (YOUTU_CJK, YOUTU_MAIN): {True: "youtu"},
    (BLOOM,): {False: "bloom"},
    (r" ?[^(\s|[.,!?…。，、।۔،])]+",): {False: "bloom"},  # the spelling in the files; the C++ flattens the inner class
    (BLOOM, DIGIT): {False: "viking"},
    (r" ?[^(\s|[.,!?…。，、।۔،])]+", DIGIT): {False: "viking"},
    ("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGIT, PUNCTUATION, GPT2): {
        False: "chameleon"
    },
    (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O): {False: "tiny_aya"},
    (r"\p{N}+", r"(?=(\d{3})+(?!\d))"): {False: "superbpe"},
    # The possessive spelling of OpenAI's cl100k with \p{N} canonicalises to QWEN2: llama.cpp's `bailingmoe` splits alike.
    (SEED_CODER,): {False: "seed-coder"},
    (UFAKZEKA,): {False: "ufakzeka"},
    (EXAONE_MOE,): {False: "exaone-moe"},
    (JAIS2,): {False: "jais-2"},
    (r"\p{N}{1,3}", MINICPM5): {True: "minicpm5"},
    (r"[^\n]+|[\n]+", QWEN2): {False: "laguna"},
}
