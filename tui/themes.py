"""Themes of our own; Textual's are there as well."""

from __future__ import annotations

from textual.theme import Theme

THEMES = (
    Theme(
        name="ziggurat-dusk",
        primary="#7fa6c9",
        secondary="#5c7a94",
        accent="#e0a458",
        foreground="#e6e1d6",
        background="#16181d",
        surface="#1d2026",
        panel="#262a32",
        success="#8fb573",
        warning="#e0a458",
        error="#d9705f",
        dark=True,
    ),
    Theme(
        name="ziggurat-noon",
        primary="#2f5d86",
        secondary="#58738a",
        accent="#a4600f",
        foreground="#2a2622",
        background="#f6f1e7",
        surface="#efe8da",
        panel="#e4dbc9",
        success="#47702c",
        warning="#a4600f",
        error="#a8382a",
        dark=False,
    ),
)
