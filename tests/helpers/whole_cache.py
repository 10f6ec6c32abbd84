"""A KV budget that says what it would keep and keeps everything: any library then shows how it is used."""

from __future__ import annotations

from typing import Any

import pytest

from ziggurat.runtime.bindings import KVLayout, KVSettings, kv, library

LAYOUT = KVLayout(1000, 200, 30, 60, 400, 50, stage_rows=256, layer_major=True)


class WholeCache:
    """Stands in for ``kv.Cache``."""

    settings: KVSettings

    def __init__(self, handle: Any, n_layer: int) -> None:
        self._handle, self._n_layer = handle, n_layer
        self._budgets: dict[int, tuple[int, ...]] = {}
        self._settings = WholeCache.settings
        assert len(self._settings.rows) == n_layer
        self.active = True

    def refusal(self) -> str:
        return "the stand-in refuses"

    def layout(self) -> KVLayout:
        return LAYOUT

    def capacity(self) -> tuple[int, ...]:
        return (1024,) * self._n_layer

    def rows(self, sequence: int) -> tuple[int, ...]:
        memory = library.api().llama_get_memory(self._handle)
        seen = library.api().llama_memory_seq_pos_max(memory, sequence) + 1
        return tuple(min(seen, rows) for rows in self._budgets.get(sequence, self._settings.rows))

    def set_budget(self, sequence: int, rows: tuple[int, ...] | None) -> None:
        assert rows is not None
        assert all(mine <= most for mine, most in zip(rows, self._settings.rows, strict=True))
        self._budgets[sequence] = rows


def install(monkeypatch: pytest.MonkeyPatch) -> list[KVSettings]:
    """Put it in the bindings' place, and return the budgets of the contexts made from now on."""
    made: list[KVSettings] = []

    def fill(_params: object, settings: KVSettings) -> None:
        WholeCache.settings = settings
        made.append(settings)

    monkeypatch.setattr(kv, "fill", fill)
    monkeypatch.setattr(kv, "Cache", WholeCache)
    monkeypatch.setattr(kv, "require", lambda: None)
    monkeypatch.setattr(kv, "unsupported", lambda _model: None)
    return made
