"""How the next token is chosen: settings under llama.cpp's names, and their ranges."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.grammar import Grammar, read_grammar
from ziggurat.runtime.json_schema import schema_grammar

#: What a repetition does not reach over in DRY.
DRY_SEQUENCE_BREAKERS = ("\n", ":", '"', "*")

_MAX_SEED = 2**32 - 2  # the library reads 2^32 - 1 as "take a random one"
_MAX_COUNT = 2**20  # the library allocates as many tokens at once
_MAX_BREAKERS, _MAX_BREAKER_BYTES = 64, 40  # it cuts longer ones
_COLDEST = 1e-4  # below it logits would overflow, and nothing but the likeliest token has a chance

# name: (lowest, highest, the name in a message and what turns it off); ends included but for lowest ones of _ABOVE
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 1e30, "temperature is {}; it must be 0 (greedy) or more"),
    "top_k": (0, 2**31 - 1, "top-k is {}; it must be 0 (off) or more"),
    "top_p": (0, 1, "top-p is {}; it must be above 0 and at most 1 (off)"),
    "min_p": (0, 1, "min-p is {}; it must be from 0 (off) to 1"),
    "seed": (0, _MAX_SEED, f"the seed is {{}}; it must be from 0 to {_MAX_SEED}"),
    "typical_p": (0, 1, "typical-p is {}; it must be above 0 and at most 1 (off)"),
    "top_n_sigma": (-1, 1e6, "top-n-sigma is {}; it must be 0 or -1 (off) or more"),
    "min_keep": (0, _MAX_COUNT, f"min-keep is {{}}; it must be from 0 to {_MAX_COUNT}"),
    "dynatemp_range": (0, 1e6, "the dynamic temperature's range is {}; it must be 0 (off) or more"),
    "dynatemp_exponent": (0, 100, "the dynamic temperature's exponent is {}; it must be above 0 and at most 100"),
    "repeat_penalty": (0, 1000, "repeat-penalty is {}; it must be above 0 and at most 1000; 1 is off"),
    "repeat_last_n": (-1, _MAX_COUNT, f"repeat-last-n is {{}}; it must be -1 (context), 0 (off) or up to {_MAX_COUNT}"),
    "frequency_penalty": (-1000, 1000, "frequency-penalty is {}; it must be from -1000 to 1000; 0 is off"),
    "presence_penalty": (-1000, 1000, "presence-penalty is {}; it must be from -1000 to 1000; 0 is off"),
    "dry_multiplier": (0, 1000, "dry-multiplier is {}; it must be from 0 (off) to 1000"),
    "dry_base": (1, 1000, "dry-base is {}; it must be from 1 to 1000"),
    "dry_allowed_length": (1, _MAX_COUNT, f"dry-allowed-length is {{}}; it must be from 1 to {_MAX_COUNT}"),
    "dry_penalty_last_n": (
        -1, _MAX_COUNT, f"dry-penalty-last-n is {{}}; it must be -1 (context), 0 (off) or up to {_MAX_COUNT}",
    ),
    "xtc_probability": (0, 1, "xtc-probability is {}; it must be from 0 (off) to 1"),
    "xtc_threshold": (0, 1, "xtc-threshold is {}; it must be from 0 to 1; above 0.5 is off"),
    "mirostat": (0, 2, "mirostat is {}; it must be 0 (off), 1 or 2"),
    "mirostat_tau": (0, 1000, "mirostat's tau is {}; it must be above 0 and at most 1000"),
    "mirostat_eta": (0, 100, "mirostat's eta is {}; it must be above 0 and at most 100"),
}  # fmt: skip
_ABOVE = {"top_p", "typical_p", "repeat_penalty", "dynatemp_exponent", "mirostat_tau", "mirostat_eta"}
_MAX_BIAS = 1e6


@dataclass(frozen=True)
class SamplingParams:
    """llama.cpp's samplers, with its names, defaults and order.

    First ``logit_bias`` (added to the logits of token ids; ``-inf`` forbids) and ``ignore_eos`` (forbids tokens that
    end), then penalties, DRY, top-n-sigma, top-k, typical-p, top-p, min-p, XTC and temperature, then a draw. What each
    does is told at ``SamplerChain``; as they stand here, only top-k, top-p, min-p and temperature do anything.
    ``temperature`` 0 takes the likeliest token of what the others leave.

    Penalties look at the last ``repeat_last_n`` tokens, the prompt's included, DRY at ``dry_penalty_last_n``; -1 means
    as many as the context has. A temperature with ``dynatemp_range`` moves within it by the entropy. ``mirostat`` 1 or
    2 takes the place of everything between penalties and draw but the temperature; unlike llama.cpp, which then drops
    them, penalties and DRY stay. ``min_keep`` tokens are left at least by typical-p, top-p, min-p and XTC.

    ``grammar`` (GBNF, beginning with ``root``) or ``json_schema`` (its text; see ``json_schema.py`` for what is
    supported) bound what is generated, and end it; together they are refused. Tokens are drawn from the samplers first
    and only when the grammar refuses one from what it allows, as llama.cpp does, which is several times faster.

    ``seed`` None takes a random one; ``seeded`` fixes it, so that it can be reported and repeated.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    min_keep: int = 0
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = DRY_SEQUENCE_BREAKERS
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    grammar: str | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        for name, (low, high, message) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            if not low <= value <= high or (name in _ABOVE and value == low):
                raise InvalidRequestError(message.format(value))
        self._check_breakers()
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for token, bias in self.logit_bias.items():
            if token < 0 or not (bias == -math.inf or abs(bias) <= _MAX_BIAS):
                raise InvalidRequestError(
                    f"the logit bias of token {token} is {bias}; it must be within {_MAX_BIAS:g} or -inf (never)"
                )
        if self.grammar is not None and self.json_schema is not None:
            raise InvalidRequestError("give a grammar or a JSON schema, not both")
        self.read_grammar()

    def _check_breakers(self) -> None:
        if len(self.dry_sequence_breakers) > _MAX_BREAKERS:
            raise InvalidRequestError(f"there must be at most {_MAX_BREAKERS} DRY sequence breakers")
        for text in self.dry_sequence_breakers:
            size = len(text.encode("utf-8", errors="surrogatepass"))
            if not 0 < size <= _MAX_BREAKER_BYTES or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
                raise InvalidRequestError(
                    f"the DRY sequence breaker {text!r} must be text of 1 to {_MAX_BREAKER_BYTES} bytes"
                )

    def read_grammar(self) -> Grammar | None:
        """Return the grammar, that of the schema where one was given; None without. Cheap when repeated."""
        if self.json_schema is not None:
            return read_grammar(schema_grammar(self.json_schema))
        return None if self.grammar is None else read_grammar(self.grammar)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that nothing is random but XTC."""
        return self.temperature + self.dynatemp_range < _COLDEST

    @property
    def random(self) -> bool:
        """Whether the seed matters."""
        return not self.greedy or (self.xtc_probability > 0 and not self.mirostat)

    def seeded(self) -> SamplingParams:
        """Return these settings with a seed, drawn now if there was none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(_MAX_SEED + 1))
