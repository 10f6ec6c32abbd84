"""Saved sequences: what is restored, and every file that is not."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from helpers import tiny_models
from ziggurat.runtime import kv_file
from ziggurat.runtime.bindings import Context, ContextSettings, KVSettings, Model, kv_state
from ziggurat.runtime.errors import (
    ContextError,
    InvalidRequestError,
    ModelFileError,
    StateFileError,
    StateMismatchError,
    ZigguratError,
)
from ziggurat.runtime.kv_file import load_sequence, save_sequence
from ziggurat.runtime.model_hash import model_hash

TOKENS = [3 + (7 * n) % 250 for n in range(300)]
BUDGET = KVSettings((60, 40), window=16)
SETTINGS = ContextSettings(n_ctx=512, n_threads=1, n_ubatch=128, n_seq_max=2, kv=BUDGET)
HASH = "0" * 64


@pytest.fixture
def context(budgets: None, spm_model: Model) -> Iterator[Context]:
    with Context(spm_model, SETTINGS) as context:
        yield context


@pytest.fixture(scope="module")
def saved(budgets: None, spm_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "sequence.kv"
    with Context(spm_model, SETTINGS) as context:
        read(context, TOKENS)
        save_sequence(path, context, 0, TOKENS, HASH)
    return path


def read(context: Context, tokens: list[int], sequence: int = 0) -> Any:
    batch = context.new_batch()
    batch.add(tokens, context.last_position(sequence) + 1, sequence, output_last=True)
    context.decode(batch)
    return context.logits(len(tokens) - 1)


def with_checksum(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def refused(path: Path, context: Context, kind: type[ZigguratError] = StateFileError) -> str:
    """Why a file is refused; sequence 0 stays as it was."""
    before = kv_state.save(context, 0)
    with pytest.raises(kind) as caught:
        load_sequence(path, context, 0, HASH)
    assert kv_state.save(context, 0) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_sequence_goes_on_from_a_file(context: Context, saved: Path, spm_model: Model) -> None:
    read(context, TOKENS)
    wanted = [read(context, [5]), read(context, TOKENS[:30])]
    with Context(spm_model, SETTINGS) as other:
        read(other, TOKENS[:50], 1)  # is forgotten
        assert load_sequence(saved, other, 1, HASH) == TOKENS
        assert other.kv_rows(1) == BUDGET.rows
        assert np.array_equal([read(other, [5], 1), read(other, TOKENS[:30], 1)], wanted)
        assert other.last_position(0) == -1


def test_an_empty_sequence(context: Context, tmp_path: Path) -> None:
    save_sequence(tmp_path / "empty.kv", context, 0, [], HASH)
    read(context, TOKENS)
    assert load_sequence(tmp_path / "empty.kv", context, 0, HASH) == []
    assert context.last_position(0) == -1


def test_a_file_is_written_at_once(context: Context, tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    path.write_text("old")
    with pytest.raises(InvalidRequestError, match="has seen 0 tokens and is to be saved with 3"):
        save_sequence(path, context, 0, [1, 2, 3], HASH)
    assert path.read_text() == "old"
    with pytest.raises(ZigguratError, match="cannot be written"):
        save_sequence(tmp_path / "none" / "s.kv", context, 0, [], HASH)
    save_sequence(path, context, 0, [], HASH)
    assert [file.name for file in tmp_path.iterdir()] == ["s.kv"]


def test_a_context_without_a_budget(spm_model: Model, saved: Path, tmp_path: Path) -> None:
    stock, path = replace(SETTINGS, kv=None), tmp_path / "s.kv"
    with Context(spm_model, stock) as context:
        refused(saved, context, StateMismatchError)
        read(context, TOKENS)
        save_sequence(path, context, 0, TOKENS, HASH)
        save_sequence(tmp_path / "empty.kv", context, 1, [], HASH)
        wanted = read(context, TOKENS[:30])
    with Context(spm_model, stock) as other:
        read(other, TOKENS[:50], 1)  # is forgotten
        assert load_sequence(path, other, 1, HASH) == TOKENS
        assert np.array_equal(read(other, TOKENS[:30], 1), wanted)
        assert load_sequence(tmp_path / "empty.kv", other, 1, HASH) == []
        assert other.last_position(1) == -1
        wanted = read(other, TOKENS[:200])
        content = kv_state.save(other, 0)
        with pytest.raises(ContextError, match="cannot be restored"):
            kv_state.restore(other, 0, content[:-100])
        assert kv_state.save(other, 0) == content
    with Context(spm_model, replace(stock, n_seq_max=3)) as context:
        assert "another number of sequences: 2, here it is 3" in refused(path, context, StateMismatchError)
    with Context(spm_model, SETTINGS) as context:
        assert "another rows: None, here it is [60, 40]" in refused(path, context, StateMismatchError)
    with Context(spm_model, replace(stock, n_ctx=256)) as context:
        assert "cannot be restored" in refused(path, context, ContextError)


def test_a_copy_is_saved_when_it_is_there(spm_model: Model) -> None:
    """The stock library copies rows with the next batch; until then a state is of whatever is in their place."""
    with Context(spm_model, replace(SETTINGS, kv=None)) as context:
        read(context, TOKENS)
        context.copy(0, 1)
        for act in (lambda: kv_state.save(context, 1), lambda: kv_state.restore(context, 0, b"")):
            with pytest.raises(ContextError, match="not there yet"):
                act()
        wanted = read(context, [5], 1)
        state = kv_state.save(context, 1)
        kv_state.restore(context, 0, state)
        assert np.array_equal(read(context, [6]), read(context, [6], 1))
        assert wanted.any()


OTHERS: dict[str, Callable[[ContextSettings], ContextSettings]] = {
    "type of K: f16, here it is f32": lambda s: replace(s, type_k="f32"),
    "type of V: f16, here it is bf16": lambda s: replace(s, type_v="bf16"),
    "rows: [60, 40], here it is [61, 40]": lambda s: replace(s, kv=replace(BUDGET, rows=(61, 40))),
    "window: 16, here it is 17": lambda s: replace(s, kv=replace(BUDGET, window=17)),
    "sinks: 4, here it is 3": lambda s: replace(s, kv=replace(BUDGET, sinks=3)),
    "pool: 13, here it is 3": lambda s: replace(s, kv=replace(BUDGET, pool=3)),
    "pool_type: max, here it is avg": lambda s: replace(s, kv=replace(BUDGET, pool_type="avg")),
    "slack: 64, here it is 65": lambda s: replace(s, kv=replace(BUDGET, slack=65)),
    "score: snapkv, here it is recent": lambda s: replace(s, kv=replace(BUDGET, score="recent")),
    "seed: 0, here it is 1": lambda s: replace(s, kv=replace(BUDGET, seed=1)),
}


@pytest.mark.parametrize("difference", OTHERS)
def test_other_settings_are_named(spm_model: Model, saved: Path, difference: str) -> None:
    with Context(spm_model, OTHERS[difference](SETTINGS)) as context:
        assert refused(saved, context, StateMismatchError) == f"{saved}: was saved with another {difference}"


def test_what_may_differ(spm_model: Model, saved: Path) -> None:
    for settings in (
        replace(SETTINGS, n_ctx=1024, n_seq_max=3, n_ubatch=64),
        replace(SETTINGS, kv=replace(BUDGET, prefill="lane", n_reading=2)),
    ):
        with Context(spm_model, settings) as context:
            assert load_sequence(saved, context, 0, HASH) == TOKENS
            read(context, [5])


def test_another_model_is_named(context: Context, saved: Path) -> None:
    with pytest.raises(StateMismatchError, match=f"another model: {HASH}, here it is 11"):
        load_sequence(saved, context, 0, "11")


# --- damaged files


def test_every_flipped_byte_is_noticed(context: Context, saved: Path, tmp_path: Path) -> None:
    whole, path = saved.read_bytes(), tmp_path / "damaged.kv"
    read(context, TOKENS[:40])
    for at in (*range(600), *range(600, len(whole) - 40, 311), *range(len(whole) - 40, len(whole))):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        assert any(word in refused(path, context) for word in ("damaged", "version", "is not a saved sequence"))


def test_every_truncation_is_noticed(context: Context, saved: Path, tmp_path: Path) -> None:
    whole, path = saved.read_bytes(), tmp_path / "damaged.kv"
    read(context, TOKENS[:40])
    for length in (*range(1, 300), *range(300, len(whole), 997), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is damaged" in refused(path, context)
    path.write_bytes(whole + b"x")
    assert "is damaged" in refused(path, context)


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(100), bytes(100)], ids=["empty", "a model", "zeros"])
def test_other_files(context: Context, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)
    assert refused(path, context) == f"{path}: is not a saved sequence"


def test_files_that_cannot_be_read(context: Context, tmp_path: Path) -> None:
    assert "cannot be read (No such file" in refused(tmp_path / "none", context)
    assert "cannot be read (Is a directory" in refused(tmp_path, context)


def test_another_version(context: Context, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "f"
    content = bytearray(saved.read_bytes()[:-32])
    struct.pack_into("<I", content, 8, kv_file.VERSION + 1)
    path.write_bytes(with_checksum(bytes(content)))
    assert refused(path, context) == f"{path}: has version 2, this build reads 1"


@pytest.mark.parametrize("header", [b"{", b"[]", b"\xff", b"[" * 100_000, b"null"], ids=lambda text: str(text[:4]))
def test_a_header_that_is_none(context: Context, tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "f"
    head = struct.pack("<8sIIIQ", b"ZIGKV\r\n\0", kv_file.VERSION, len(header), 0, 0)
    path.write_bytes(with_checksum(head + header))
    assert "its header cannot be read" in refused(path, context)


def repacked(saved: Path, change: Callable[[dict[str, Any], list[int], bytes], tuple[Any, Any, Any]]) -> bytes:
    """A file whose checksum is right and whose parts are not those that were saved."""
    header, tokens, state = kv_file._read(saved)
    header, tokens, state = change(dict(header), tokens, bytes(state))
    text = json.dumps(header).encode()
    head = struct.pack("<8sIIIQ", b"ZIGKV\r\n\0", kv_file.VERSION, len(text), len(tokens), len(state))
    return with_checksum(head + text + struct.pack(f"<{len(tokens)}i", *tokens) + state)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda h, t, s: ({}, t, s), StateMismatchError, "another model: None"),
        (lambda h, t, s: ({**h, "rows": {"a": 1}}, t, s), StateMismatchError, "another rows"),
        (lambda h, t, s: (h, t[:-1], s), StateFileError, "it has 299 tokens and the state of another number"),
        (lambda h, t, s: (h, t, s[:-1]), ContextError, "cannot be restored: unexpectedly reached end of buffer"),
        (lambda h, t, s: (h, t, b""), ContextError, "cannot be restored"),
        (lambda h, t, s: (h, t, s[:8] + bytes(4) + s[12:]), ContextError, "no state of a sequence with a KV budget"),
    ],
)
def test_a_right_checksum_is_not_trusted(
    context: Context, saved: Path, tmp_path: Path, change: Any, kind: type[ZigguratError], message: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(repacked(saved, change))
    read(context, TOKENS[:40])
    assert message in refused(path, context, kind)


# --- the hash of a model


def test_the_hash_tells_models_apart(spm_path: Path, chat_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(spm_path.read_bytes())
    assert model_hash(copy) == model_hash(spm_path) != model_hash(chat_path)
    assert len(model_hash(copy)) == 64


def test_the_hash_sees_metadata_and_every_tensor(spm_path: Path, tmp_path: Path) -> None:
    whole, path = spm_path.read_bytes(), tmp_path / "changed.gguf"
    offsets = [int(t.data_offset) for t in gguf.GGUFReader(spm_path).tensors]
    hashes = {model_hash(spm_path)}
    for at in (*offsets, whole.index(b"llama")):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        hashes.add(model_hash(path))
    path.write_bytes(whole + b"x")
    hashes.add(model_hash(path))
    assert len(hashes) == len(offsets) + 3


def test_the_hash_of_a_split_model_is_of_all_its_parts(tmp_path: Path) -> None:
    paths = tiny_models.write_split_model(tmp_path)
    before = model_hash(paths[0])
    changed = bytearray(paths[1].read_bytes())
    changed[-1] ^= 1
    paths[1].write_bytes(changed)
    assert model_hash(paths[0]) != before


def test_no_hash_of_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        model_hash(tmp_path / "none.gguf")
