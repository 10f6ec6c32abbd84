"""What was measured as a table in Markdown, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ziggurat.runtime.bench.axes import Work
from ziggurat.runtime.bench.bandwidth import Bandwidth
from ziggurat.runtime.bench.roof import RoofLine, RoofPoint, kept_rows
from ziggurat.runtime.bench.runner import GENERATION, Result, Spread
from ziggurat.runtime.plan.roofline import LLAMA_CPP_SHARE, Demand
from ziggurat.runtime.sizes import human_bytes


@dataclass(frozen=True)
class About:
    """What a table says in every line: the model, and what it runs on."""

    path: str
    description: str
    n_bytes: int
    n_params: int
    backend: str


@dataclass(frozen=True)
class Report:
    """Everything that was measured. ``bandwidth`` None: the model is not in the memory that was measured."""

    about: About
    demand: Demand
    work: Work
    results: tuple[Result, ...]
    bandwidth: Bandwidth | None
    machine: Mapping[str, str | None]

    def bytes_per_second(self, result: Result) -> float | None:
        """Weights and rows that decoding reads, in the median; None for prompts, which are bound by computing."""
        if result.test != GENERATION:
            return None
        # on average half of the tokens that a turn generates have been added, where they stay
        rows = kept_rows(self.demand, result.setting, result.place, self.work)
        if result.setting.policy is None:
            rows = tuple(count + result.n_tokens // 2 for count in rows)
        streams = result.place.streams
        read = self.demand.weights_read(streams) + streams * self.demand.row_bytes(
            rows, result.setting.type_k, result.setting.type_v
        )
        return read * result.rate.median / streams

    def share(self, result: Result) -> float | None:
        """The part of the measured bandwidth that decoding reaches."""
        found = self.bytes_per_second(result)
        return None if found is None or self.bandwidth is None else found / self.bandwidth.bytes_per_second

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` writes; sizes in bytes."""
        return {
            "model": self.about.path,
            "description": self.about.description,
            "model_bytes": self.about.n_bytes,
            "model_params": self.about.n_params,
            "backend": self.about.backend,
            **self.machine,
            "bandwidth": None if self.bandwidth is None else self.bandwidth.as_json(),
            "ubatch": self.work.n_ubatch,
            "batch": self.work.n_batch,
            "repetitions": self.work.repetitions,
            "results": [self._row(result) for result in self.results],
        }

    def _row(self, result: Result) -> dict[str, Any]:
        ratio = result.ratio
        return {
            "test": result.test,
            "tokens": result.n_tokens,
            "depth": result.place.depth,
            "streams": result.place.streams,
            "threads": result.threads,
            "kv_budget": result.setting.budget,
            "kv_policy": result.setting.preset,
            "cache_type_k": result.setting.type_k,
            "cache_type_v": result.setting.type_v,
            "tokens_per_second": result.rate.median,
            "tokens_per_second_q1": result.rate.q1,
            "tokens_per_second_q3": result.rate.q3,
            "ratio": None if ratio is None else ratio.median,
            "ratio_q1": None if ratio is None else ratio.q1,
            "ratio_q3": None if ratio is None else ratio.q3,
            "kv_bytes": result.allocated.kv_bytes,
            "kv_bytes_reading": result.allocated.kv_bytes_reading,
            "kv_rows": None if result.rows is None else list(result.rows),
            "kv_rows_allocated": list(result.allocated.rows_per_layer),
            "depth_filled": result.filled,
            "bytes_per_second": self.bytes_per_second(result),
            "bandwidth_share": self.share(result),
            "peak_bytes": result.peak_bytes,
            "samples": list(result.rates),
        }

    def csv(self) -> str:
        """Return what ``--csv`` writes: a line for each test, lists with blanks between."""
        rows = [self._row(result) for result in self.results]
        about = {"model": self.about.path, "description": self.about.description, "backend": self.about.backend}
        target = io.StringIO()
        writer = csv.DictWriter(target, [*about, *rows[0]], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            flat = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}
            writer.writerow({**about, **flat})
        return target.getvalue()

    def markdown(self) -> str:
        """Return a table as llama-bench writes it, with what is compared beside it."""
        results = self.results
        several = {
            "type_k": any(result.setting.type_k != "f16" for result in results),
            "type_v": any(result.setting.type_v != "f16" for result in results),
            "budget": any(result.setting.policy is not None for result in results),
            "streams": any(result.place.streams != 1 for result in results),
            "ratio": any(result.ratios is not None for result in results),
            "share": self.bandwidth is not None and any(result.test == GENERATION for result in results),
        }
        rows = [self._cells(result) for result in results]
        shown = [name for name in rows[0] if several.get(name, True)]
        left = {"model", "backend", "type_k", "type_v", "budget"}
        return table(shown, ([row[name] for name in shown] for row in rows), left)

    def _cells(self, result: Result) -> dict[str, str]:
        share, ratio = self.share(result), result.ratio
        setting = result.setting
        return {
            "model": self.about.description,
            "size": human_bytes(self.about.n_bytes),
            "params": f"{self.about.n_params / 1e9:.2f} B",
            "backend": self.about.backend,
            "threads": str(result.threads),
            "type_k": setting.type_k,
            "type_v": setting.type_v,
            "budget": setting.kept,
            "streams": str(result.place.streams),
            "test": result.name,
            "t/s": spread(result.rate),
            "ratio": "1" if ratio is None else spread(ratio),
            "KV": human_bytes(result.allocated.kv_bytes),
            "share": "" if share is None else f"{share:.0%}",
        }


def spread(value: Spread) -> str:
    """Return median and quartiles in one cell."""
    if value.q1 == value.q3:
        return f"{value.median:.2f}"
    return f"{value.median:.2f} ({value.q1:.2f}–{value.q3:.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[str] = ()) -> str:
    """Return a table in Markdown whose columns line up; those not in ``left`` are right-aligned."""
    rows = [list(row) for row in rows]
    widths = [max(len(name), *(len(row[index]) for row in rows)) for index, name in enumerate(head)]
    aside = [name in set(left) for name in head]
    rule = ["-" * (width + 1) + ("-" if first else ":") for width, first in zip(widths, aside, strict=True)]
    lines = [_line(cells, widths, aside) for cells in [head, *rows]]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int], aside: Sequence[bool]) -> str:
    padded = (
        cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(cells, widths, aside, strict=True)
    )
    return f"| {' | '.join(padded)} |"


def roof_markdown(line: RoofLine) -> str:
    """Return the roofs as a table, with what was measured on them."""
    points, share = line.points, f"{LLAMA_CPP_SHARE:.0%} of it"
    measured = any(point.measured for point in points)
    head = ["budget", "KV", "depth", "streams", "fit", "weights/step", "KV/step", "bound", "roof t/s", share, "prompt"]
    if measured:
        head += ["threads", "measured t/s", "of the roof"]
    rows = []
    for point in points:
        setting, roof = point.setting, point.roof
        row = [
            setting.kept,
            f"{setting.type_k}/{setting.type_v}",
            str(point.place.depth),
            str(point.place.streams),
            "any" if point.fits is None else str(point.fits),
            human_bytes(roof.weights),
            human_bytes(roof.kv),
            roof.bound,
            f"{roof.tokens_per_second:.1f}",
            f"{LLAMA_CPP_SHARE * roof.tokens_per_second:.1f}",
            _prompt(point) if point.place.depth else "",
        ]
        beside: list[list[str]] = [["", "", ""]] if measured else [[]]
        if point.measured:
            beside = [
                [str(threads), f"{rate:.1f}", f"{rate / roof.tokens_per_second:.0%}"]
                for threads, rate in point.measured.items()
            ]
        rows += [row + more for more in beside]
    return table(head, rows, {"budget", "KV", "bound"})


def _prompt(point: RoofPoint) -> str:
    work = f"{point.prompt_flops / 1e12:.1f} TFLOP"
    return work if point.prompt_s is None else f"{work}, {point.prompt_s:.2f} s"
