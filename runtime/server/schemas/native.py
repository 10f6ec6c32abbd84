"""Endpoints of our own: state of the server, tokens, kept rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ziggurat.runtime.server.schemas.common import AnswerModel, RequestModel


class Health(AnswerModel):
    """The server takes requests; while it loads or closes there is an error with status 503 instead."""

    status: Literal["ok"]


class Props(AnswerModel):
    """What is served, sizes in bytes. ``n_ctx`` tokens belong to each of ``parallel`` requests at a time.

    ``kv_bytes`` is what the KV cache takes after prompts as long as the context; ``kv_unsupported`` says why a KV
    budget that was asked for is not used.
    """

    version: str
    system_fingerprint: str
    models: list[str]
    file: str
    description: str
    n_params: int
    size: int
    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    parallel: int
    kv_bytes: int
    kv_unsupported: str | None
    generates_text: bool
    embedding_size: int | None
    chat_template: str | None


class Slot(AnswerModel):
    """One sequence of the context: ``tokens`` it has seen, ``rows`` it holds over the layers, per KV head.

    ``kv_bytes`` is the size of those rows.
    """

    id: int
    state: Literal["idle", "reading", "decoding"]
    tokens: int
    rows: int
    kv_bytes: int
    conversation: str | None
    prompt_progress: float | None


class KVUse(AnswerModel):
    """Sizes of the KV cache: after prompts, with what reading them takes, and as planned.

    ``bytes_held`` and ``rows`` are those of the rows that slots hold now.
    """

    bytes: int
    bytes_allocated: int
    bytes_planned: int
    bytes_held: int
    rows: int
    evicted_rows: int


class Slots(AnswerModel):
    """What the engine does now; rates are of the last seconds in which there was something to do."""

    running: int
    queued: int
    queue_limit: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    kv: KVUse
    slots: list[Slot]


class TokenizeRequest(RequestModel):
    """A text, with BOS and EOS as the model wants them (``add_special``) and special tokens recognized or not."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = Field(False, description="Answer objects of id and text instead of ids.")


class Piece(AnswerModel):
    """A token and its text; bytes that are no character by themselves are replaced."""

    id: int
    piece: str


class Tokens(AnswerModel):
    """The tokens of a text."""

    tokens: list[int] | list[Piece]


class DetokenizeRequest(RequestModel):
    """Tokens whose text is wanted."""

    tokens: list[int]


class Text(AnswerModel):
    """The text of tokens, special ones as they are written."""

    content: str


class KeptLayer(AnswerModel):
    """The positions that a layer has rows of, for each KV head: runs of first position and length, ascending."""

    layer: int
    heads: list[list[tuple[int, int]]]


class Kept(AnswerModel):
    """What a conversation's rows are of.

    Of ``n_tokens`` that it has seen, each layer keeps as many as ``budgets`` says after a prompt, and what was
    generated since; 0 is for layers with a sliding window, which have no budget and keep the latest rows. Without a KV
    budget every row is kept, and ``budgets`` and ``layers`` are empty. ``tokens`` are there when they were asked for.
    """

    object: Literal["kv"]
    conversation: str
    n_tokens: int
    budgets: list[int]
    layers: list[KeptLayer]
    tokens: list[int] | None = None


class KeptState(AnswerModel):
    """A conversation of so many tokens was kept, or taken up."""

    object: Literal["kv.state"]
    conversation: str
    n_tokens: int
