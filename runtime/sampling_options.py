"""The command line's sampling options, under llama.cpp's names, and the settings they make."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.options import option_group

if TYPE_CHECKING:
    from ziggurat.runtime.sampling import SamplingParams

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
_MAX_FILE = 1024 * 1024  # more than any grammar that is read


def _number(name: str, kind: type, default: float, text: str) -> Any:
    return click.option(name, type=kind, default=default, show_default=True, metavar="N", help=text)


def _file(name: str, text: str) -> Any:
    return click.option(name, type=click.Path(path_type=Path), metavar="FILE", help=text)


_common = option_group(
    click.option(
        "--temp", type=float, default=0.8, show_default=True, help="Temperature; 0 takes the likeliest token."
    ),
    click.option(
        "--top-k", type=int, default=40, show_default=True, help="Sample from the K likeliest tokens; 0: all."
    ),
    click.option(
        "--top-p",
        type=float,
        default=0.95,
        show_default=True,
        help="Sample from tokens that sum to this probability; 1: all.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.05,
        show_default=True,
        help="Drop tokens less likely than this part of the likeliest; 0: none.",
    ),
    click.option("--seed", type=int, help="Repeat a sampled generation; default: random."),
    title="Sampling",
)

_penalties = option_group(
    _number("--repeat-penalty", float, 1.0, "Make tokens less likely that came already; 1: off."),
    _number("--repeat-last-n", int, 64, "How many tokens back penalties look; -1: the context."),
    _number("--presence-penalty", float, 0.0, "Subtracted from the logit of tokens that came already."),
    _number("--frequency-penalty", float, 0.0, "The same for every time they came."),
    _number("--dry-multiplier", float, 0.0, "Penalize what prolongs a repetition (DRY); 0: off."),
    _number("--dry-base", float, 1.75, "By multiplier * base^(its length - allowed length)."),
    _number("--dry-allowed-length", int, 2, "Repetitions that DRY lets pass, in tokens."),
    _number("--dry-penalty-last-n", int, -1, "How many tokens back DRY looks; -1: the context."),
    click.option(
        "--dry-sequence-breaker",
        multiple=True,
        metavar="TEXT",
        help="What no repetition reaches over, in place of line break, colon, quote and asterisk; may be repeated;"
        " none: nothing.",
    ),
    title="Repetition",
)

_further = option_group(
    _number("--typical", float, 1.0, "Keep tokens of typical surprise up to this probability; 1: all."),
    _number("--top-nsigma", float, -1.0, "Keep logits within N standard deviations of the best; -1: all."),
    _number("--xtc-probability", float, 0.0, "How often the likeliest tokens are left out (XTC)."),
    _number("--xtc-threshold", float, 0.1, "All but the last of those at least this likely."),
    _number("--dynatemp-range", float, 0.0, "Let the temperature vary so much by the entropy."),
    _number("--dynatemp-exp", float, 1.0, "Exponent of the entropy."),
    _number("--mirostat", int, 0, "Hold the surprise instead of top-k, top-p and the like: 1 or 2."),
    _number("--mirostat-ent", float, 5.0, "At so many bits (tau)."),
    _number("--mirostat-lr", float, 0.1, "Learning rate (eta)."),
    _number("--min-keep", int, 0, "Tokens that typical, top-p, min-p and XTC leave at least."),
    title="Further samplers",
)

_constraints = option_group(
    click.option("--ignore-eos", is_flag=True, help="Go on where the model would end."),
    click.option(
        "--logit-bias",
        "-l",
        multiple=True,
        metavar="TOKEN(+|-)BIAS",
        help="Change a token's logit: 15043+1, 15043-2.5, 15043-inf (never); may be repeated.",
    ),
    click.option("--grammar", metavar="GBNF", help="Generate only texts of this grammar."),
    _file("--grammar-file", "The same from a file."),
    click.option("--json-schema", "-j", metavar="SCHEMA", help="Generate only JSON that is valid by this schema."),
    _file("--json-schema-file", "The same from a file."),
    title="Constraints",
)

sampling_options = option_group(_common, _penalties, _further, _constraints)


def sampling_of(options: dict[str, Any]) -> SamplingParams:
    """Return the settings of the command line. Raises InvalidRequestError naming what is wrong."""
    from ziggurat.runtime.sampling import SamplingParams

    return SamplingParams(
        temperature=options["temp"],
        typical_p=options["typical"],
        top_n_sigma=options["top_nsigma"],
        dynatemp_exponent=options["dynatemp_exp"],
        mirostat_tau=options["mirostat_ent"],
        mirostat_eta=options["mirostat_lr"],
        logit_bias=_biases(options["logit_bias"]),
        grammar=_text(options, "grammar"),
        json_schema=_text(options, "json_schema"),
        dry_sequence_breakers=_breakers(options["dry_sequence_breaker"]),
        **{
            name: options[name]
            for name in (
                "top_k top_p min_p seed min_keep dynatemp_range repeat_penalty repeat_last_n presence_penalty"
                " frequency_penalty dry_multiplier dry_base dry_allowed_length dry_penalty_last_n xtc_probability"
                " xtc_threshold mirostat ignore_eos"
            ).split()
        },
    )


def _breakers(given: tuple[str, ...]) -> tuple[str, ...]:
    from ziggurat.runtime.sampling import DRY_SEQUENCE_BREAKERS

    if not given:
        return DRY_SEQUENCE_BREAKERS
    return () if given == ("none",) else tuple(map(_unescaped, given))


def _unescaped(text: str) -> str:
    return re.sub(r"\\([nrt\\])", lambda match: _ESCAPES[match[1]], text)


def _biases(given: tuple[str, ...]) -> dict[int, float]:
    biases = {}
    for text in given:
        match = re.fullmatch(r"(\d{1,9})([+-])(\d+(?:\.\d*)?|inf)", text)
        if match is None or text.endswith("+inf"):
            raise InvalidRequestError(f"--logit-bias {text}: give a token's number and what to add, such as 15043-1.5")
        biases[int(match[1])] = math.copysign(float(match[3]), -1 if match[2] == "-" else 1)
    return biases


def _text(options: dict[str, Any], name: str) -> str | None:
    """Return what was given for an option or is in the file of its other form."""
    path: Path | None = options[f"{name}_file"]
    given: str | None = options[name]
    option = f"--{name.replace('_', '-')}"
    if path is None:
        return given
    if given is not None:
        raise InvalidRequestError(f"give {option} or {option}-file, not both")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise InvalidRequestError(f"{option}-file {path}: has more than {_MAX_FILE} bytes")
        return data.decode("utf-8")
    except OSError as error:
        raise InvalidRequestError(f"{option}-file {path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{option}-file {path}: is not UTF-8 at byte {error.start}") from None
