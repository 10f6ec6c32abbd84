"""The rates as a picture: against depth for each setting, and against streams. Needs matplotlib when it is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from ziggurat.runtime.bench.axes import Place, Setting
from ziggurat.runtime.bench.roof import RoofLine
from ziggurat.runtime.bench.runner import GENERATION, Result
from ziggurat.runtime.evaluate.plot import check_available

FORMATS = ("png", "svg")


def draw(title: str, results: Sequence[Result], line: RoofLine | None, kind: str) -> bytes:
    """Return a PNG or SVG of the decode rates, medians with quartiles; roofs are dashed.

    Prompts are drawn if nothing was generated. Raises UnsupportedError when matplotlib is missing.
    """
    check_available()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    test = GENERATION if any(result.test == GENERATION for result in results) or not results else results[0].test
    results = [result for result in results if result.test == test]
    if test != GENERATION:
        line = None  # those are of decoding
    places = [result.place for result in results] or [point.place for point in (line.points if line else ())]
    streams = sorted({place.streams for place in places})
    depths = sorted({place.depth for place in places})
    panels = [(f"{streams[0]} stream{'s' if streams[0] > 1 else ''}", "tokens before", _depth, streams[0], _streams)]
    if len(streams) > 1:
        panels.append((f"behind {depths[-1]:,} tokens", "streams", _streams, depths[-1], _depth))
    figure = Figure(figsize=(6.4 * len(panels), 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for index, (name, label, along, fixed, other) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _panel(axes, [result for result in results if other(result.place) == fixed], line, along, (other, fixed))
        what = "decode" if test == GENERATION else "prompt"
        axes.set(xlabel=label, ylabel="tokens/s", title=f"{what} rate, {name}")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _depth(place: Place) -> int:
    return place.depth


def _streams(place: Place) -> int:
    return place.streams


def _panel(
    axes: Any,
    results: Sequence[Result],
    line: RoofLine | None,
    along: Callable[[Place], int],
    at: tuple[Callable[[Place], int], int],
) -> None:
    colours: dict[Setting, str] = {}
    points = [point for point in line.points if at[0](point.place) == at[1]] if line is not None else []
    for setting in dict.fromkeys([*(result.setting for result in results), *(point.setting for point in points)]):
        colours[setting] = f"C{len(colours)}"
    for setting, threads in dict.fromkeys((result.setting, result.threads) for result in results):
        mine = [result for result in results if (result.setting, result.threads) == (setting, threads)]
        rates = [result.rate for result in mine]
        spread = [[r.median - r.q1 for r in rates], [r.q3 - r.median for r in rates]]
        several = len({result.threads for result in results}) > 1
        label = f"{setting.label}, {threads} threads" if several else setting.label
        faint = threads / max(result.threads for result in results)
        style = {"marker": "o", "capsize": 3, "color": colours[setting], "alpha": faint}
        axes.errorbar([along(r.place) for r in mine], [r.median for r in rates], spread, label=label, **style)
    for setting, colour in colours.items():
        over = [point for point in points if point.setting == setting]
        if over:
            label = f"roof: {setting.label}"
            rates_of = [point.roof.tokens_per_second for point in over]
            axes.plot([along(point.place) for point in over], rates_of, "--", color=colour, label=label, linewidth=1)
