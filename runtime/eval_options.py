"""The command line options of ``ziggurat eval``, by what they measure."""

from __future__ import annotations

from pathlib import Path

import click

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.options import cache_options, option_group

FILE = click.Path(path_type=Path)
DEFAULT_CTX = 512


text_options = option_group(
    click.option("--text", type=FILE, metavar="FILE", help="Measure perplexity on this UTF-8 text."),
    click.option(
        "--against",
        type=FILE,
        metavar="REFERENCE",
        help="Compare with another GGUF, a Hugging Face folder, or a file of --save-logits.",
    ),
    click.option("--save-logits", type=FILE, metavar="FILE", help="Keep the log-probabilities, to be a REFERENCE."),
    click.option("--chunks", type=click.IntRange(1), metavar="N", help="Use only the text's first N chunks."),
)

choices_options = option_group(
    click.option("--choices", type=FILE, metavar="FILE", help="Answer multiple-choice questions (JSON or JSONL)."),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Use only the first N questions."),
    click.option(
        "--choices-prompt",
        metavar="TEXT",
        help="What stands before a choice, with {question} in it; default: 'Question: {question}\\nAnswer:'.",
    ),
    click.option("--choices-items", is_flag=True, help="Write every question's scores into the JSON."),
)

needle_options = option_group(
    click.option("--needle", is_flag=True, help="Hide facts in long documents and ask for one."),
    click.option("--generate-needle", type=FILE, metavar="FILE", help="Write those documents as JSONL; ask nothing."),
    click.option("--needle-lengths", metavar="LIST", help="Tokens, as 512,2k; default: 512 to the trained context."),
    click.option(
        "--needle-depths", metavar="LIST", default="0,0.25,0.5,0.75,1", show_default=True, help="0: start, 1: end."
    ),
    click.option(
        "--needle-facts", metavar="LIST", default="6", show_default=True, help="Facts per document, as 1,6; one asked."
    ),
    click.option(
        "--needle-trials", type=click.IntRange(1), default=4, show_default=True, metavar="N", help="Documents per cell."
    ),
    click.option(
        "--needle-form",
        type=click.Choice(["text", "tokens"]),
        default="text",
        show_default=True,
        help="Sentences, or random tokens for models without a language.",
    ),
    click.option("--needle-text", type=FILE, metavar="FILE", help="Text to hide facts in; default: a built-in one."),
    click.option("--needle-fact", metavar="TEXT", help="A fact; default: 'The code of {key} is {value}.'."),
    click.option("--needle-question", metavar="TEXT", help="Its question; default: 'What is the code of {key}?'."),
    click.option(
        "--needle-digits", type=click.IntRange(1, 18), default=4, show_default=True, metavar="N", help="Code digits."
    ),
    click.option(
        "--answer-tokens", type=click.IntRange(1), default=24, show_default=True, metavar="N", help="Answer room."
    ),
    click.option("--raw", is_flag=True, help="No chat template: the fact's beginning ends the prompt."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Repeats the same documents."),
)

compute_options = option_group(
    click.option(
        "--ctx",
        type=click.IntRange(4),
        metavar="N",
        help=f"Tokens per chunk of --text; default: {DEFAULT_CTX}. With --needle: the longest document.",
    ),
    click.option(
        "--batch", type=click.IntRange(1), default=2048, show_default=True, metavar="N", help="Tokens per batch."
    ),
    click.option(
        "--ubatch", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Tokens computed at once."
    ),
    cache_options,
)


def parse_depths(text: str) -> list[float]:
    """Return ascending depths from 0 to 1; "25%" is read as 0.25. Raises InvalidRequestError."""
    depths = set()
    for part in text.split(","):
        try:
            value = float(part.strip().removesuffix("%")) / (100 if part.strip().endswith("%") else 1)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise InvalidRequestError(f"--needle-depths {text}: give depths from 0 to 1, such as 0,0.5,1")
        depths.add(value)
    return sorted(depths)
