"""The binding of KV budgets: its settings, and what a library without budgets says."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers import tiny_models
from helpers.stock import nmse
from helpers.unfit_models import write_mamba
from ziggurat.runtime.bindings import Context, ContextSettings, KVSettings, Model, kv, kv_state, library
from ziggurat.runtime.errors import (
    ContextError,
    DecodeAborted,
    DecodeError,
    InvalidRequestError,
    LibraryError,
    TokenError,
)

ROWS = (100, 90)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": ()}, "at least 36 rows in every layer"),
        ({"rows": (100, 35)}, "has 35 in one"),
        ({"rows": (100, 2**32)}, "at least 36 rows"),
        ({"window": 0}, "window is 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"slack": 0}, "slack is 0"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"pool": 257}, "pool is 257; it must be from 1 to 255"),
        ({"slack": 2**20 + 1}, "slack is"),
        ({"pool": 4}, "pool is 4; it must be odd"),
        ({"pool_type": "median"}, "no pool_type 'median': avg, max"),
        ({"score": "psychic"}, "no score 'psychic': snapkv, recent, random, tova, keydiff, h2o"),
        ({"prefill": "lazy"}, "no prefill 'lazy': exact, bounded, chunked, lane"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        KVSettings(**{"rows": ROWS, **values})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_has_to_fit_a_batch() -> None:
    def n_batch(prefill: str) -> int:
        budget = KVSettings(ROWS, prefill=prefill)
        return ContextSettings(n_ctx=4000, n_batch=512, kv=budget).n_batch

    assert (n_batch("exact"), n_batch("bounded"), n_batch("chunked")) == (4000, 4000, 512)
    assert ContextSettings(n_ctx=100, n_batch=512, kv=KVSettings(ROWS)).n_batch == 512
    assert ContextSettings(n_ctx=4000, n_batch=512).n_batch == 512


def test_the_struct_is_what_was_asked() -> None:
    if not kv.available():
        pytest.skip("a library without KV budgets")
    params = SimpleNamespace()
    budget = KVSettings(ROWS, 16, 5, 7, "max", 99, "random", "chunked", 8, 3, 2)
    alive = kv.fill(params, budget)
    native = ctypes.cast(params.kv_budget, ctypes.POINTER(kv._Params)).contents
    values = {name: getattr(native, name) for name, *_ in kv._Params._fields_ if name != "rows"}
    assert values == {
        "n_layer": 2,
        "window": 16,
        "sinks": 5,
        "pool": 7,
        "pool_type": 1,
        "slack": 99,
        "score": 2,
        "prefill": 2,
        "seed": 8,
        "n_reading": 3,
        "n_copies": 2,
    }
    assert native.rows[:2] == list(ROWS)
    assert alive is not None


def test_a_stock_library_names_the_remedy(spm_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    kv._functions.cache_clear()
    monkeypatch.setattr(kv, "_has_budgets", lambda _lib: False)
    try:
        assert not kv.available()
        for call in (
            lambda: kv.unsupported(spm_model),
            lambda: Context(spm_model, ContextSettings(n_ctx=256, n_threads=1, kv=KVSettings(ROWS))),
        ):
            with pytest.raises(LibraryError, match=r"keeps every KV row: .*install the patched library: pip install"):
                call()
    finally:
        kv._functions.cache_clear()


def test_a_missing_library_has_no_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise LibraryError("gone")

    monkeypatch.setattr(library, "api", missing)
    assert not kv.available()


def test_a_context_without_a_budget_says_so(spm_model: Model) -> None:
    with Context(spm_model, ContextSettings(n_ctx=256, n_threads=1)) as context:
        assert not context.kv_active
        assert context.kv_layout() is None
        assert context.kv_capacity() == context.kv_rows(0) == ()
        for call in (
            lambda: context.kv_positions(0, 0),
            lambda: context.set_kv_budget(0, ROWS),
            lambda: context.kv_select(0),
            lambda: context.prompt_begin(0, [5]),
            lambda: context.prompt_step(0, 1),
            lambda: context.prompt_cancel(0),
        ):
            with pytest.raises(InvalidRequestError, match="no KV budget"):
                call()


def test_an_end_can_be_removed_without_a_budget(spm_model: Model) -> None:
    with Context(spm_model, ContextSettings(n_ctx=256, n_seq_max=2, n_threads=1)) as context:
        context.set_step(16)
        read(context, TOKENS[:100])
        assert context.removable_from(0) == context.removable_from(1) == 0
        with pytest.raises(InvalidRequestError, match="sequence 2 is not one of 2"):
            context.removable_from(2)


@pytest.mark.parametrize("swa_full", [False, True])
def test_a_sliding_window_has_to_stay_whole(tmp_path: Path, swa_full: bool) -> None:
    """64 tokens; rows that have left it are overwritten by and by."""
    path = tiny_models.write_model(tmp_path / "m.gguf", tiny_models.Shape("gemma3", n_layer=6, sliding_window=64))
    settings = ContextSettings(512, n_ubatch=32, n_threads=1, type_k="f32", type_v="f32", swa_full=swa_full)
    with Model(path) as model, Context(model, settings) as context, Context(model, settings) as fresh:
        read(context, TOKENS[:60])
        assert context.removable_from(0) == 0
        read(context, TOKENS[60:400], 60)
        first = context.removable_from(0)
        assert first == 0 if swa_full else 64 < first < 400
        position = first or 200
        assert context.remove(0, position)
        read(fresh, TOKENS[:position])
        for each in (context, fresh):
            read(each, [5], position)
        assert nmse(context.logits(0), fresh.logits(0)) < 1e-6


def test_no_end_of_a_recurrent_state_can_be_removed(tmp_path: Path) -> None:
    with Model(write_mamba(tmp_path / "m.gguf")) as model:
        with Context(model, ContextSettings(n_ctx=256, n_threads=1)) as context:
            assert context.removable_from(0) == 0
            read(context, TOKENS[:20])
            assert context.removable_from(0) == 20


def test_a_copy_without_a_budget_may_leave_out_the_end(spm_model: Model) -> None:
    with Context(spm_model, ContextSettings(n_ctx=256, n_seq_max=2, n_threads=1)) as context:
        read(context, TOKENS[:20])
        context.copy(0, 1, 15)
        assert (context.last_position(0), context.last_position(1)) == (19, 14)
        read(context, TOKENS[15:20], 15, 1)
        context.copy(1, 0)
        assert context.last_position(0) == 19


# --- with a library that has budgets

TOKENS = [3 + (7 * n) % 250 for n in range(600)]


def budget(**values: Any) -> ContextSettings:
    kept = KVSettings(**{"rows": (100, 60), "window": 16, **values.pop("kv", {})})
    return ContextSettings(**{"n_ctx": 600, "n_threads": 1, "n_ubatch": 128, "kv": kept, **values})


def read(context: Context, tokens: list[int], position: int = 0, sequence: int = 0) -> None:
    batch = context.new_batch()
    batch.add(tokens, position, sequence, output_last=True)
    context.decode(batch)


@pytest.mark.usefixtures("budgets")
def test_rows_and_positions_after_a_prompt(spm_model: Model) -> None:
    assert kv.unsupported(spm_model) is None
    with Context(spm_model, budget(n_seq_max=2)) as context:
        assert context.kv_active
        assert context.kv_capacity() == (256, 256)
        assert context.kv_rows(0) == (0, 0)
        read(context, TOKENS[:500], sequence=1)
        assert (context.kv_rows(0), context.kv_rows(1)) == ((0, 0), (100, 60))
        assert context.last_position(1) == 499
        for layer, count in enumerate((100, 60)):
            positions = context.kv_positions(1, layer)
            assert (positions.shape, positions.dtype) == ((2, count), np.int32)
            assert (np.diff(positions, axis=1) > 0).all()
            assert (positions[:, :4] == np.arange(4)).all()  # the sinks
            assert (positions[:, -16:] == np.arange(484, 500)).all()  # the window
        assert context.kv_positions(0, 0).size == 0
        read(context, TOKENS[500:501], 500, 1)
        assert context.kv_rows(1) == (101, 61)
        assert (context.kv_positions(1, 0)[:, -1] == 500).all()
        assert context.kv_select(1) == 2
        assert context.kv_rows(1) == (100, 60)
        assert context.kv_select(1) == 0
        assert context.remove(1)
        assert context.kv_rows(1) == (0, 0)


@pytest.mark.usefixtures("budgets")
def test_a_prompt_in_steps(spm_model: Model) -> None:
    with Context(spm_model, budget(n_seq_max=3, kv={"n_reading": 2})) as context:
        read(context, TOKENS[:500])
        wanted = context.logits(499)
        assert context.kv_rows(0) == (100, 60)
        context.prompt_begin(1, TOKENS[:500])
        seen = []
        while not (progress := context.prompt_step(1, 3)).finished:
            seen.append(progress)
            read(context, [5], 500 + len(seen) - 1)  # another sequence
            with pytest.raises(InvalidRequestError, match="no logits"):
                context.logits(-1)
        # four ubatches in each of two layers
        assert [(each.steps_done, each.steps, each.tokens, each.fraction) for each in seen] == [
            (3, 8, 500, 3 / 8),
            (6, 8, 500, 6 / 8),
        ]
        assert np.array_equal(context.logits(-1), wanted)
        assert (context.kv_rows(1), context.last_position(1)) == ((100, 60), 499)


@pytest.mark.usefixtures("budgets")
def test_a_prompt_in_steps_that_ends_early(spm_model: Model) -> None:
    with Context(spm_model, budget(n_seq_max=3, kv={"n_reading": 2})) as context:
        read(context, TOKENS[:50])
        for sequence in (0, 1):
            context.prompt_begin(sequence, TOKENS)
            context.prompt_step(sequence, 5)
        with pytest.raises(ContextError, match="2 prompts are being read"):
            context.prompt_begin(2, TOKENS)
        with pytest.raises(ContextError, match="being read for sequence 0"):
            read(context, [5], 50)
        assert context.prompt_cancel(1)
        assert not context.prompt_cancel(1)
        context.abort.set()
        with pytest.raises(DecodeAborted):
            context.prompt_step(0, 1)
        context.abort.clear()
        with pytest.raises(ContextError, match="no prompt is being read for sequence 0"):
            context.prompt_step(0, 1)
        assert context.kv_rows(0) == (50, 50)
        for tokens, error in (([], ContextError), ([3, 10**6], TokenError), ([3] * 1000, ContextError)):
            with pytest.raises(error):
                context.prompt_begin(0, tokens)
        with pytest.raises(InvalidRequestError, match="sequence 3 is not one of 3"):
            context.prompt_begin(3, TOKENS)


@pytest.mark.usefixtures("budgets")
def test_a_generation_has_no_end(spm_model: Model) -> None:
    with Context(spm_model, budget()) as context:
        read(context, TOKENS)
        for step in range(700):  # beyond the context's 768 rows
            read(context, [5], 600 + step)
        assert context.last_position(0) == 1299
        assert all(low <= rows <= 256 for low, rows in zip((100, 60), context.kv_rows(0), strict=True))


@pytest.mark.usefixtures("budgets")
def test_a_step_with_drafts(spm_model: Model) -> None:
    """It takes no place to read a prompt in, and its end can be removed; more tokens are a prompt."""
    with Context(spm_model, budget(kv={"n_copies": 0})) as context:
        assert context.removable_from(0) == 0
        read(context, TOKENS[:500])
        assert context.removable_from(0) == 500
        with pytest.raises(ContextError, match="no room for a copy"):
            read(context, TOKENS[:4], 500)
        context.set_step(4)
        read(context, TOKENS[:4], 500)
        assert context.kv_rows(0) == (104, 64)
        assert context.removable_from(0) == 500
        assert context.remove(0, 501)
        assert context.kv_rows(0) == (101, 61)
        with pytest.raises(ContextError, match="no room for a copy"):
            read(context, TOKENS[:5], 501)
        for n in (0, 17):
            with pytest.raises(InvalidRequestError, match=f"1 to 16 tokens, not {n}"):
                context.set_step(n)


@pytest.mark.usefixtures("budgets")
def test_a_step_has_to_fit_beside_the_budget(spm_model: Model) -> None:
    with Context(spm_model, budget(kv={"rows": (252, 60), "slack": 4})) as context:
        context.set_step(4)
        with pytest.raises(InvalidRequestError, match="a step of 5 tokens; in this context it has 1 to 4"):
            context.set_step(5)


@pytest.mark.usefixtures("budgets")
def test_a_budget_of_ones_own(spm_model: Model) -> None:
    with Context(spm_model, budget(n_seq_max=2)) as context:
        context.set_kv_budget(1, (50, 40))
        for sequence in (0, 1):
            read(context, TOKENS[:300], sequence=sequence)
        assert (context.kv_rows(0), context.kv_rows(1)) == ((100, 60), (50, 40))
        context.set_kv_budget(1, None)
        context.remove(1)
        read(context, TOKENS[:300], sequence=1)
        assert context.kv_rows(1) == (100, 60)
        for rows in ((101, 60), (50,), (50, 19), (50, 40, 40)):
            with pytest.raises(InvalidRequestError) as caught:
                context.set_kv_budget(1, rows)
            assert "\n" not in str(caught.value)
        with pytest.raises(InvalidRequestError, match="sequence 2 is not one of 2"):
            context.set_kv_budget(2, (50, 40))
        with pytest.raises(InvalidRequestError, match="layer 2"):
            context.kv_positions(0, 2)


def logits_of(context: Context, token: int, sequence: int) -> Any:
    read(context, [token], context.last_position(sequence) + 1, sequence)
    return context.logits(0)


@pytest.mark.usefixtures("budgets")
def test_branches_and_restored_sequences_go_on_alike(spm_model: Model) -> None:
    with Context(spm_model, budget(n_seq_max=3)) as context:
        read(context, TOKENS[:300])
        for position in (300, 301):
            read(context, [5], position)
        context.copy(0, 1)
        context.copy(0, 2, 301)
        state = kv_state.save(context, 0)
        wanted = logits_of(context, 5, 0)
        assert np.array_equal(logits_of(context, 5, 1), wanted)
        assert context.last_position(2) == 300
    with Context(spm_model, budget(n_seq_max=3)) as context:
        kv_state.restore(context, 2, state)
        assert np.array_equal(logits_of(context, 5, 2), wanted)


@pytest.mark.usefixtures("budgets")
def test_states_that_cannot_be_are_refused_with_a_reason(spm_model: Model) -> None:
    with Context(spm_model, budget()) as context:
        read(context, TOKENS[:300])
        state = kv_state.save(context, 0)
        with pytest.raises(ContextError, match=r"sequence 0 cannot be restored: unexpectedly reached end of buffer$"):
            kv_state.restore(context, 0, state[:-1])
        with pytest.raises(InvalidRequestError, match="sequence 1 is not one of 1"):
            kv_state.save(context, 1)
        assert kv_state.save(context, 0) == state
    with Context(spm_model, budget(kv={"sinks": 5})) as context:
        with pytest.raises(ContextError, match="another sinks: 4, this context has 5"):
            kv_state.restore(context, 0, state)
    with Context(spm_model, ContextSettings(n_ctx=256, n_threads=1)) as context:
        before = kv_state.save(context, 0)
        with pytest.raises(ContextError, match="cannot be restored"):
            kv_state.restore(context, 0, state)
        assert kv_state.save(context, 0) == before


@pytest.mark.usefixtures("budgets")
def test_a_context_without_memory_has_no_states(spm_path: Path, spm_model: Model) -> None:
    with Context(spm_model, budget()) as context:
        read(context, TOKENS[:300])
        state = kv_state.save(context, 0)
    with Model(spm_path, gpu_layers=0, simulated=True) as simulated, Context(simulated, budget()) as context:
        for call in (lambda: kv_state.save(context, 0), lambda: kv_state.restore(context, 0, state)):
            with pytest.raises(ContextError, match="made to be measured"):
                call()


@pytest.mark.usefixtures("budgets")
def test_what_cannot_be_is_refused_with_a_reason(spm_model: Model) -> None:
    with Context(spm_model, budget(n_seq_max=2, n_batch=1000)) as context:
        read(context, TOKENS[:300])
        with pytest.raises(DecodeError, match="position"):  # upstream looks at that first
            read(context, TOKENS[:5], 400)
        assert context.kv_rows(0) == (100, 60)
        with pytest.raises(ContextError, match="before its last selection"):
            context.copy(0, 1, 200)
        assert context.kv_rows(1) == (0, 0)
        assert not context.remove(0, 100, 200)
        with pytest.raises(ContextError, match="700 tokens on 100 rows .* exceeds the context of 768"):
            read(context, (TOKENS * 2)[:700], 300)
        read(context, TOKENS[:5], 300)


@pytest.mark.usefixtures("budgets")
def test_rows_for_another_number_of_layers_are_refused(spm_model: Model) -> None:
    with pytest.raises(ContextError, match="layer"):
        Context(spm_model, budget(kv={"rows": (100, 60, 50)}))


@pytest.mark.usefixtures("budgets")
def test_a_model_that_cannot_runs_with_every_row(tmp_path: Path) -> None:
    shape = tiny_models.Shape(arch="gemma3", n_layer=3, sliding_window=64)
    with Model(tiny_models.write_model(tmp_path / "m.gguf", shape)) as model:
        reason = kv.unsupported(model)
        assert reason
        assert "\n" not in reason
        with Context(model, budget(kv={"rows": (100,) * 3})) as context:
            assert not context.kv_active
            read(context, TOKENS[:400])
            assert context.kv_rows(0) == ()
