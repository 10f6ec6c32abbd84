"""A KV budget that says what it would keep and keeps everything: any library then shows how it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ziggurat.runtime.bindings import Batch, KVLayout, KVSettings, Progress, kv, library
from ziggurat.runtime.errors import ContextError, DecodeAborted

STEP = 32  # tokens
LAYOUT = KVLayout(1000, 200, 30, 0, 60, 400, 50, stage_rows=256, layer_major=True)


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

    def removable_from(self, sequence: int) -> int:
        return 0

    def set_step(self, n_tokens: int) -> None:
        pass

    def rows(self, sequence: int) -> tuple[int, ...]:
        memory = library.api().llama_get_memory(self._handle)
        seen = library.api().llama_memory_seq_pos_max(memory, sequence) + 1
        return tuple(min(seen, rows) for rows in self._budgets.get(sequence, self._settings.rows))

    def prompt_begin(self, sequence: int, tokens: Sequence[int]) -> None:
        self._prompt = list(tokens)

    def prompt_step(self, sequence: int, max_steps: int) -> Progress:
        """Decode the next tokens as a batch."""
        assert max_steps == 1
        memory = library.api().llama_get_memory(self._handle)
        read = library.api().llama_memory_seq_pos_max(memory, sequence) + 1
        batch = Batch(STEP, sequence + 1)
        part = self._prompt[read : read + STEP]
        last = read + len(part) == len(self._prompt)
        batch.add(part, read, sequence, output_last=last)
        status = library.api().llama_decode(self._handle, batch.native(library.api()))
        if status:
            raise DecodeAborted("aborted", status) if status == 2 else ContextError(self.refusal())
        return Progress(-(-(read + len(part)) // STEP), -(-len(self._prompt) // STEP), len(self._prompt), last)

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
    monkeypatch.setattr(kv, "windows", lambda model: (0,) * model.n_layer)
    return made
