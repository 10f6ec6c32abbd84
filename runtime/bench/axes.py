"""What a benchmark compares: the settings of a context, the places (depth and streams) they are compared at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ziggurat.runtime.bindings.context_settings import CACHE_TYPES, ContextSettings
from ziggurat.runtime.budget import PRESETS
from ziggurat.runtime.engine.settings import MAX_SEQUENCES
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.hardware import default_threads
from ziggurat.runtime.kv_policy import DEFAULT_PRESET, NO_BUDGET, KVPolicy, policy_of

_SPARE = 16  # rows beyond what a measurement writes: the warming up


@dataclass(frozen=True)
class Setting:
    """How a context is made. ``preset`` is the name of the policy, None without a budget."""

    policy: KVPolicy | None = None
    preset: str | None = None
    type_k: str = "f16"
    type_v: str = "f16"

    @property
    def budget(self) -> str:
        """The budget as it is given on the command line."""
        return NO_BUDGET if self.policy is None else str(self.policy.budget).removesuffix(" rows")

    @property
    def kept(self) -> str:
        """The budget and its policy as a table has them."""
        return self.budget if self.policy is None else f"{self.budget} {self.preset}"

    @property
    def label(self) -> str:
        """What it is called in a plot."""
        kept = "every row" if self.policy is None else self.kept
        types = self.type_k if self.type_k == self.type_v else f"{self.type_k}/{self.type_v}"
        return f"{kept}, {types}"

    def rows(self, layers: int | Sequence[int], place: Place, work: Work) -> tuple[int, ...] | None:
        """Rows that each layer keeps of a prompt as long as the depth (of one that is measured where it is 0).

        ``layers``: how many there are, or the sliding window of each, as ``KVPolicy.rows`` takes them.
        """
        if self.policy is None:
            return None
        return self.policy.rows(layers, work.n_ctx(place), place.depth or max(work.n_prompt, 1))

    def context(self, layers: int | Sequence[int], place: Place, work: Work) -> ContextSettings:
        """Return what its context is made with. Raises InvalidRequestError for what no context can have."""
        kv, rows = None, self.rows(layers, place, work)
        if self.policy is not None and rows is not None:
            # an empty sequence is read into in place; one that has rows is copied first
            copies = None if place.depth and work.n_prompt else 0
            kv = replace(self.policy, copies=copies).settings(rows)
        return ContextSettings(
            n_ctx=work.n_ctx(place),
            n_batch=work.n_batch,
            n_ubatch=work.n_ubatch,
            n_seq_max=place.streams,
            type_k=self.type_k,
            type_v=self.type_v,
            n_threads=max(work.threads),
            kv=kv,
        )


@dataclass(frozen=True)
class Place:
    """Tokens that are there before, of each of ``streams`` sequences."""

    depth: int
    streams: int


@dataclass(frozen=True)
class Work:
    """What is done at every place: llama-bench's defaults. 0 tokens leave a test out.

    ``n_prompt`` tokens are read and ``n_gen`` generated, for each stream, ``repetitions`` times by each of ``threads``.
    """

    n_prompt: int = 512
    n_gen: int = 128
    repetitions: int = 5
    n_batch: int = 2048
    n_ubatch: int = 512
    threads: tuple[int, ...] = (1,)
    read_depth: bool = False

    def n_ctx(self, place: Place) -> int:
        """Rows of a context at a place."""
        return place.depth + max(self.n_prompt, self.n_gen) + _SPARE


@dataclass(frozen=True)
class Axes:
    """The settings, the first of which the others are compared with, and the places."""

    settings: tuple[Setting, ...]
    places: tuple[Place, ...]

    @property
    def budgeted(self) -> bool:
        """Whether there is a KV budget among them."""
        return any(setting.policy is not None for setting in self.settings)


def axes_of(options: Mapping[str, Any]) -> tuple[Axes, Work]:
    """Read the command line. Raises InvalidRequestError and UnsupportedError."""
    depths = numbers(options["depth"], "--depth", least=0)
    streams = numbers(options["streams"], "--streams", most=MAX_SEQUENCES)
    cores = str(default_threads()) if options["threads"] is None else options["threads"]
    threads = numbers(cores, "--threads", most=1024)
    types = [
        (k, v)
        for k in _named(options["cache_type_k"], "--cache-type-k")
        for v in _named(options["cache_type_v"], "--cache-type-v")
    ]
    settings = [
        Setting(policy, preset, type_k, type_v) for type_k, type_v in types for policy, preset in _policies(options)
    ]
    work = Work(
        n_prompt=options["n_prompt"],
        n_gen=options["n_gen"],
        repetitions=options["repetitions"],
        n_batch=max(options["batch"], options["ubatch"]),
        n_ubatch=options["ubatch"],
        threads=tuple(threads),
        read_depth=options["read_depth"],
    )
    if not work.n_prompt and not work.n_gen:
        raise InvalidRequestError("-p 0 and -n 0: there is nothing to measure")
    places = tuple(Place(depth, count) for depth in depths for count in streams)
    return Axes(tuple(settings), places), work


def _policies(options: Mapping[str, Any]) -> list[tuple[KVPolicy | None, str | None]]:
    """Every budget with every policy; ``none`` once, where it stands."""
    amounts = _list(options["kv_budget"], "--kv-budget") if options["kv_budget"] is not None else [NO_BUDGET]
    presets = _list(options["kv_policy"], "--kv-policy") if options["kv_policy"] is not None else [DEFAULT_PRESET]
    if all(amount == NO_BUDGET for amount in amounts):
        for name in ("kv_policy", "kv_prefill"):
            if options[name] is not None:
                flag = "--" + name.replace("_", "-")
                raise InvalidRequestError(f"{flag}: says how to keep a budget, and there is none; add --kv-budget ROWS")
    found: list[tuple[KVPolicy | None, str | None]] = []
    for amount in amounts:
        if amount == NO_BUDGET:
            found.append((None, None))
            continue
        for preset in presets:
            if preset not in PRESETS:
                raise InvalidRequestError(f"--kv-policy {preset}: there is none; take {', '.join(PRESETS)}")
            given = {"kv_budget": amount, "kv_policy": preset, "kv_prefill": options["kv_prefill"]}
            found.append((policy_of(given), preset))
    return list(dict.fromkeys(found))


def _named(text: str, option: str) -> list[str]:
    for name in (found := _list(text, option)):
        if name not in CACHE_TYPES or name == "f32":
            known = ", ".join(kind for kind in CACHE_TYPES if kind != "f32")
            raise InvalidRequestError(f"{option} {name}: there is no such type; take {known}")
    return found


def _list(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InvalidRequestError(f"{option} {text!r}: give values with commas between")
    return list(dict.fromkeys(parts))


def numbers(text: str, option: str, *, least: int = 1, most: int = 2**31 - 1) -> Sequence[int]:
    """Return the different numbers of a list such as "0,512,4k", ascending. Raises InvalidRequestError."""
    found = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})([kK]?)\s*", part)
        value = -1 if match is None else int(match[1]) * (1024 if match[2] else 1)
        if not least <= value <= most:
            raise InvalidRequestError(
                f"{option} {text}: give numbers from {least} to {most} with commas between, such as 512,4k"
            )
        found.add(value)
    return sorted(found)
