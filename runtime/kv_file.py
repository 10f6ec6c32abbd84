"""A sequence in a file: read a long prompt once, and go on from there another day.

The file, little-endian: 8 bytes of magic, version (u32), sizes of the header (u32), of the tokens (u32, their number)
and of the state (u64); then the header, JSON in UTF-8 that says which model and settings the sequence is of; the
sequence's tokens (i32); its state, see ``bindings.kv_state``; and the SHA-256 of all that.

What goes on is the same to the last bit where the context computes alike: flash attention, ubatch and the number of
threads are not asked about.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ziggurat.runtime.bindings import Context, kv_state
from ziggurat.runtime.errors import InvalidRequestError, StateFileError, StateMismatchError
from ziggurat.runtime.files import write_atomic

VERSION = 1
_MAGIC = b"ZIGKV\r\n\x00"
_HEAD = struct.Struct("<8sIIIQ")
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_BUDGET = ("window", "sinks", "pool", "pool_type", "slack", "score", "seed")


def save_sequence(path: Path, context: Context, sequence: int, tokens: Sequence[int], model: str) -> None:
    """Write a sequence to a file, which is complete or not there at all.

    ``tokens`` are all that the sequence has seen, ``model`` is the ``model_hash`` of the context's model. Raises
    InvalidRequestError for another number of tokens, ContextError where ``kv_state.save`` does, and ZigguratError when
    the file cannot be written.
    """
    count = context.last_position(sequence) + 1
    state = kv_state.save(context, sequence)
    if count != len(tokens):
        raise InvalidRequestError(f"sequence {sequence} has seen {count} tokens and is to be saved with {len(tokens)}")
    header = json.dumps(_identity(context, model)).encode()
    head = _HEAD.pack(_MAGIC, VERSION, len(header), count, len(state))
    parts = [head, header, struct.pack(f"<{count}i", *tokens), state]
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part)
    write_atomic(path, b"".join((*parts, checksum.digest())), "save")


def load_sequence(path: Path, context: Context, sequence: int, model: str) -> list[int]:
    """Put a sequence into the state that a file holds, and return the tokens it has seen.

    What the sequence had before is forgotten; with any exception it stays as it was. Raises StateMismatchError, which
    names what differs, for a file of another model or other settings; StateFileError for one that is missing, damaged
    or of another version; and ContextError for a state that the library refuses, and where ``kv_state.restore`` does.
    """
    header, tokens, state = _read(path)
    _check_identity(path, header, _identity(context, model))
    before = kv_state.save(context, sequence)
    kv_state.restore(context, sequence, state)
    if context.last_position(sequence) + 1 != len(tokens):
        kv_state.restore(context, sequence, before)
        raise StateFileError(f"{path}: is damaged: it has {len(tokens)} tokens and the state of another number")
    return tokens


def _identity(context: Context, model: str) -> dict[str, Any]:
    """Return what has to be the same where the sequence goes on."""
    settings = context.settings
    kv = settings.kv if context.kv_active else None
    identity = {
        "model": model,
        # those of scale 0 change nothing, and neither does the order
        "set of LoRA adapters": sorted([lora.name, lora.scale] for lora in context.loras if lora.scale),
        "type of K": settings.type_k,
        "type of V": settings.type_v,
        # more rows than the context has mean all; None without a budget
        "rows": None if kv is None else [min(rows, context.n_ctx_allocated) for rows in kv.rows],
    }
    if kv is None:  # the stock library's states are of contexts with as many sequences
        return identity | {"number of sequences": settings.n_seq_max}
    return identity | {name: getattr(kv, name) for name in _BUDGET}


def _check_identity(path: Path, header: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        found = header.get(name)
        if found != value:
            raise StateMismatchError(f"{path}: was saved with another {name}: {found}, here it is {value}")


def _read(path: Path) -> tuple[Mapping[str, Any], list[int], memoryview]:
    """Return header, tokens and state of a file whose checksum is right."""
    try:
        content = memoryview(path.read_bytes())  # the state may be large: its slices are not copies
    except OSError as error:
        raise StateFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    if content[: len(_MAGIC)] != _MAGIC[: len(content)] or not content:
        raise StateFileError(f"{path}: is not a saved sequence")
    if len(content) < _HEAD.size:
        raise StateFileError(f"{path}: is damaged: it ends after {len(content)} bytes")
    _, version, header_size, n_tokens, state_size = _HEAD.unpack_from(content)
    if version != VERSION:
        raise StateFileError(f"{path}: has version {version}, this build reads {VERSION}")
    expected = _HEAD.size + header_size + 4 * n_tokens + state_size + _CHECKSUM_BYTES
    if len(content) != expected:
        raise StateFileError(f"{path}: is damaged: it has {len(content)} bytes and should have {expected}")
    if hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest() != content[-_CHECKSUM_BYTES:]:
        raise StateFileError(f"{path}: is damaged: its checksum is another one")
    tokens_at = _HEAD.size + header_size
    state_at = tokens_at + 4 * n_tokens
    try:
        header = json.loads(bytes(content[_HEAD.size : tokens_at]))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise StateFileError(f"{path}: is damaged: its header cannot be read")
    tokens = struct.unpack_from(f"<{n_tokens}i", content, tokens_at)
    return header, list(tokens), content[state_at : state_at + state_size]
