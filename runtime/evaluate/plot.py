"""Results as a PNG. The only module that needs matplotlib, imported when a picture is drawn and not before."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from ziggurat.runtime.errors import UnsupportedError

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9822b", "#8a8a8a"


def check_available() -> None:
    """Raise UnsupportedError when matplotlib is missing, before the work for a picture begins."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedError("--plot needs matplotlib: pip install 'ziggurat[plot]'") from None


def draw(figures: dict[str, Any]) -> bytes:
    """Return a PNG of what an evaluation found: retrieval grids, perplexity and divergence by chunk, accuracies.

    ``figures`` is what ``eval --json`` writes. Raises UnsupportedError when matplotlib is missing.
    """
    check_available()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[Any, dict[str, Any]]] = []
    if "perplexity" in figures:
        panels.append((_perplexity, figures))
    if "kl_divergence" in figures:
        panels.append((_divergence, figures))
    if "choices" in figures:
        panels.append((_choices, figures["choices"]))
    panels += [(_heat_map, grid) for grid in figures.get("needle", {}).get("grids", ())]
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.4 * columns, 4.2 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_shortened(Path(figures.get("model", "")).name, 60 * columns), fontsize=11)
    for index, (panel, data) in enumerate(panels):
        panel(figure, figure.add_subplot(rows, columns, index + 1), data)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _perplexity(_figure: Any, axes: Any, figures: dict[str, Any]) -> None:
    chunks = range(1, figures["chunks"] + 1)
    axes.plot(chunks, [math.exp(min(nll, 700)) for nll in figures["nll_by_chunk"]], ".", color=_GREY, label="one chunk")
    running, total = [], 0.0
    for count, nll in enumerate(figures["nll_by_chunk"], 1):
        total += nll
        running.append(math.exp(min(total / count, 700)))
    label = f"up to it: {figures['perplexity']:.3f} ± {figures['perplexity_se']:.3f}"
    axes.plot(chunks, running, "-", color=_BLUE, label=label)
    if "reference_perplexity" in figures:
        value = figures["reference_perplexity"]
        axes.axhline(value, color=_ORANGE, linestyle="--", label=f"reference: {value:.3f}")
    axes.set(title=f"Perplexity, chunks of {figures['n_ctx']} tokens", xlabel="chunk", ylabel="perplexity")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(fontsize=8)
    _finish(axes)


def _divergence(_figure: Any, axes: Any, figures: dict[str, Any]) -> None:
    chunks = range(1, figures["chunks"] + 1)
    axes.plot(chunks, figures["kl_by_chunk"], ".-", color=_BLUE, linewidth=0.8, label="mean of a chunk")
    label = f"mean: {figures['kl_divergence']:.4g} ± {figures['kl_divergence_se']:.2g}"
    axes.axhline(figures["kl_divergence"], color=_ORANGE, linestyle="--", label=label)
    axes.set_ylim(bottom=0)
    title = f"KL divergence from the reference, same likeliest token {figures['top1_agreement']:.1%}"
    axes.set(xlabel="chunk", ylabel="nats")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    _finish(axes)


def _choices(_figure: Any, axes: Any, figures: dict[str, Any]) -> None:
    names = ("accuracy", "accuracy_per_token", "accuracy_per_byte")
    values = [figures[name] for name in names]
    # the figures stand below the axis: in a bar the error's line would strike them through
    labels = [f"{by}\n{value:.1%}" for by, value in zip(("sum", "per token", "per byte"), values, strict=True)]
    axes.bar(labels, values, yerr=[figures[f"{name}_se"] for name in names], color=_BLUE, capsize=4)
    axes.axhline(figures["chance"], color=_ORANGE, linestyle="--", label=f"by chance: {figures['chance']:.1%}")
    axes.set_ylim(0, 1)
    axes.set(title=f"Multiple choice, {figures['items']:,} questions", ylabel="right", xlabel="log-likelihood")
    axes.legend(fontsize=8)
    _finish(axes)


def _heat_map(figure: Any, axes: Any, grid: dict[str, Any]) -> None:
    cells = grid["by_cell"]
    size = min(9.0, 100 / len(grid["depths"]))  # narrow cells get small figures
    axes.tick_params(axis="x", labelsize=size)
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="upper")
    axes.set_xticks(range(len(grid["depths"])), [f"{depth:.0%}" for depth in grid["depths"]])
    axes.set_yticks(range(len(grid["lengths"])), [f"{length:,}" for length in grid["lengths"]])
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            colour = "black" if value > 0.5 else "white"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=size, color=colour)
    facts = "1 fact" if grid["facts"] == 1 else f"{grid['facts']} facts, one asked"
    axes.set(xlabel="depth of the fact", ylabel="tokens")
    axes.set_title(f"Retrieval, {facts}: {grid['accuracy']:.1%} of {grid['trials']} right", fontsize=10)
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}", label="right to the last digit")


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 :]}"


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
