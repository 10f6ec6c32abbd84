"""The roofs of a benchmark's settings and places, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ziggurat.runtime.bench.axes import Axes, Place, Setting, Work
from ziggurat.runtime.bench.runner import GENERATION, Result
from ziggurat.runtime.plan.roofline import (
    LLAMA_CPP_SHARE,
    Demand,
    Device,
    Roof,
    decode_roof,
    most_streams,
    prompt_flops,
    prompt_seconds,
    stage_bytes,
)


@dataclass(frozen=True)
class RoofPoint:
    """The roof of one setting at one place; ``fits`` streams of this depth fit the device (None: any number).

    ``prompt_flops`` and ``prompt_s`` (None where the device's peak is not known) are of reading the whole depth, for
    one stream.
    ``measured`` are tokens per second by number of threads.
    """

    setting: Setting
    place: Place
    roof: Roof
    fits: int | None
    prompt_flops: float
    prompt_s: float | None
    measured: dict[int, float]

    def as_json(self) -> dict[str, Any]:
        """Return it as reports have it."""
        return {
            "kv_budget": self.setting.budget,
            "kv_policy": self.setting.preset,
            "cache_type_k": self.setting.type_k,
            "cache_type_v": self.setting.type_v,
            "depth": self.place.depth,
            "streams": self.place.streams,
            "streams_that_fit": self.fits,
            "weights_bytes_per_step": self.roof.weights,
            "kv_bytes_per_step": self.roof.kv,
            "flops_per_step": self.roof.flops,
            "bound": self.roof.bound,
            "tokens_per_second": self.roof.tokens_per_second,
            "tokens_per_second_at_llama_cpp_share": LLAMA_CPP_SHARE * self.roof.tokens_per_second,
            "prompt_flops": self.prompt_flops,
            "prompt_seconds": self.prompt_s,
            "measured": [
                {"threads": threads, "tokens_per_second": rate, "share": rate / self.roof.tokens_per_second}
                for threads, rate in self.measured.items()
            ],
        }


@dataclass(frozen=True)
class RoofLine:
    """All points for one model and device."""

    demand: Demand
    device: Device
    points: tuple[RoofPoint, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as reports have it."""
        return {
            "model": self.demand.name,
            "weights_bytes": self.demand.resident,
            "device": asdict(self.device),
            "llama_cpp_share": LLAMA_CPP_SHARE,
            "points": [point.as_json() for point in self.points],
        }


def roofline(demand: Demand, device: Device, axes: Axes, work: Work, results: Sequence[Result] = ()) -> RoofLine:
    """Return the roofs of decoding. Raises what budgets raise that do not fit."""
    points = [
        _point(demand, device, setting, place, work, results) for setting in axes.settings for place in axes.places
    ]
    return RoofLine(demand, device, tuple(points))


def kept_rows(demand: Demand, setting: Setting, place: Place, work: Work) -> tuple[int, ...]:
    """Rows that a layer attends to at a place; slack for generated tokens is not counted."""
    if demand.kv is None:
        return ()
    return demand.rows(place.depth, setting.rows(demand.kv.window, place, work))


def _point(
    demand: Demand, device: Device, setting: Setting, place: Place, work: Work, results: Sequence[Result]
) -> RoofPoint:
    rows = kept_rows(demand, setting, place, work)
    types = setting.type_k, setting.type_v
    staged = stage_bytes(demand, place.depth, *types) if setting.policy is not None else 0
    return RoofPoint(
        setting,
        place,
        decode_roof(demand, device, rows, place.streams, *types),
        most_streams(demand, device, rows, *types, staged=staged),
        prompt_flops(demand, place.depth) if place.depth else 0.0,
        prompt_seconds(demand, device, place.depth, n_ubatch=work.n_ubatch) if device.flops else None,
        {
            result.threads: result.rate.median
            for result in results
            if (result.test, result.setting, result.place) == (GENERATION, setting, place)
        },
    )
