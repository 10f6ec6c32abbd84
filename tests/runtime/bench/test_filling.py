from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny_models
from ziggurat.runtime.bench.filling import multiplied
from ziggurat.runtime.bindings import Context, ContextSettings, Model, kv_state

SETTINGS = ContextSettings(n_ctx=512, n_threads=1, flash_attention="on")
TEXT = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture
def context(spm_model: Model) -> Iterator[Context]:
    with Context(spm_model, SETTINGS) as context:
        yield context


def read(context: Context, tokens: list[int], position: int = 0, sequence: int = 0) -> Any:
    batch = context.new_batch()
    batch.add(tokens, position, sequence, output_last=True)
    context.decode(batch)
    return context.output_logits()[0].copy()


def state_of(context: Context, tokens: list[int]) -> bytes:
    read(context, tokens)
    return kv_state.save(context, 0)


def test_as_many_tokens_are_the_same_state(context: Context) -> None:
    state = state_of(context, TEXT)
    assert multiplied(state, len(TEXT), context.model.n_layer, 1) == state


def test_fewer_tokens_are_the_text_s_beginning(context: Context) -> None:
    state = multiplied(state_of(context, TEXT), 4, context.model.n_layer, 1)
    assert state is not None
    kv_state.restore(context, 0, state)
    assert context.last_position(0) == 3
    after = read(context, [12], 4)
    context.clear()
    read(context, TEXT[:4])
    assert np.allclose(after, read(context, [12], 4), atol=1e-5)


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0"), ("f16", "q8_0")])
def test_more_tokens_are_the_same_rows_again(bpe_model: Model, types: tuple[str, str]) -> None:
    settings = replace(SETTINGS, type_k=types[0], type_v=types[1])
    with Context(bpe_model, settings) as context:
        state = state_of(context, TEXT)
        long = multiplied(state, 20, bpe_model.n_layer, 1)
        assert long is not None
        kv_state.restore(context, 0, long)
        assert context.last_position(0) == 19
        assert kv_state.save(context, 0) == long
        assert np.isfinite(read(context, [12], 20)).all()
        # its first seven rows are the text's
        context.remove(0, 7)
        assert kv_state.save(context, 0) == state


def test_for_several_sequences(spm_model: Model, context: Context) -> None:
    long = multiplied(state_of(context, TEXT), 30, spm_model.n_layer, 3)
    assert long is not None
    with Context(spm_model, replace(SETTINGS, n_seq_max=3)) as several:
        for sequence in range(3):
            kv_state.restore(several, sequence, long)
        assert [several.last_position(sequence) for sequence in range(3)] == [29, 29, 29]
        logits = [read(several, [12], 30, sequence) for sequence in range(3)]
        again = multiplied(state_of_first(several), 30, spm_model.n_layer, 1)
    alone = multiplied(long, 30, spm_model.n_layer, 1)
    assert alone is not None
    kv_state.restore(context, 0, alone)
    wanted = read(context, [12], 30)
    for found in logits:
        assert np.allclose(found, wanted, atol=1e-5)
    assert again == alone


def state_of_first(context: Context) -> bytes:
    context.remove(0, 30)
    return kv_state.save(context, 0)


def test_what_is_no_plain_state_is_refused(spm_model: Model, context: Context, tmp_path: Path) -> None:
    state = state_of(context, TEXT)
    for data in (b"", state[:20], state[:-1], state + b"x", state[:16] + b"\1" + state[17:]):
        assert multiplied(data, 30, spm_model.n_layer, 1) is None
    assert multiplied(state, 30, spm_model.n_layer + 1, 1) is None
    context.remove(0)
    assert multiplied(kv_state.save(context, 0), 30, spm_model.n_layer, 1) is None
    with Context(spm_model, replace(SETTINGS, flash_attention="off")) as transposed:
        assert multiplied(state_of(transposed, TEXT), 30, spm_model.n_layer, 1) is None
    path = tiny_models.write_model(tmp_path / "m.gguf", tiny_models.Shape(arch="gemma2", sliding_window=64))
    with Model(path) as model, Context(model, replace(SETTINGS, flash_attention="auto")) as windowed:
        assert multiplied(state_of(windowed, TEXT), 30, model.n_layer, 1) is None
