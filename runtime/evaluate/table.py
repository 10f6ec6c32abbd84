"""Results as tables for a terminal. Builds rich tables; the command prints them."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

_TEXT_ROWS = (
    ("perplexity", "perplexity", "{:.4f}"),
    ("reference_perplexity", "perplexity of the reference", "{:.4f}"),
    ("log_probability_difference", "log-probability, model less reference", "{:+.5f}"),
    ("kl_divergence", "KL divergence, mean (nats)", "{:.6f}"),
    ("kl_median", "KL divergence, median", "{:.6f}"),
    ("kl_p99", "KL divergence, 99 %", "{:.6f}"),
    ("kl_max", "KL divergence, largest", "{:.6f}"),
    ("top1_agreement", "same likeliest token", "{:.3%}"),
)


def text_table(figures: dict[str, Any], title: str) -> Group:
    """Return the figures of a text with their standard errors."""
    head = f"{title}: {figures['chunks']} chunks of {figures['n_ctx']}, {figures['tokens']:,} tokens scored"
    table = Table()
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("± standard error", justify="right")
    for key, label, form in _TEXT_ROWS:
        if key in figures:
            error = figures.get(f"{key}_se")
            shown = "" if error is None else form.replace("+", "").format(error)
            table.add_row(label, form.format(figures[key]), shown)
    return _titled(head, table)


def choices_table(figures: dict[str, Any], title: str) -> Group:
    """Return the accuracies of a multiple-choice file."""
    head = f"{title}: {figures['items']:,} questions, {figures['chance']:.1%} by chance"
    table = Table()
    table.add_column("answer taken by")
    table.add_column("accuracy", justify="right")
    table.add_column("± standard error", justify="right")
    for key, label in (
        ("accuracy", "log-likelihood"),
        ("accuracy_per_token", "log-likelihood per token"),
        ("accuracy_per_byte", "log-likelihood per byte"),
    ):
        table.add_row(label, f"{figures[key]:.2%}", f"{figures[key + '_se']:.2%}")
    return _titled(head, table)


def needle_tables(figures: dict[str, Any]) -> list[Group]:
    """Return one table of length by depth for each number of facts."""
    tables = []
    for grid in figures["grids"]:
        facts = "1 fact" if grid["facts"] == 1 else f"{grid['facts']} facts, one asked"
        head = f"retrieval, {facts}: {grid['accuracy']:.1%} of {grid['trials']} right"
        table = Table()
        table.add_column("tokens", justify="right")
        for depth in grid["depths"]:
            table.add_column(f"{depth:.0%}", justify="right")
        table.add_column("all", justify="right", style="bold")
        for length, row, share in zip(grid["lengths"], grid["by_cell"], grid["by_length"], strict=True):
            table.add_row(f"{length:,}", *(f"{cell:.0%}" for cell in row), f"{share:.0%}")
        tables.append(_titled(head, table))
    return tables


def _titled(title: str, table: Table) -> Group:
    return Group(Text(title, style="bold"), table)
