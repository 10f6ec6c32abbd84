"""A draft model: a small model of the same vocabulary proposes what the large one may say.

A conversion of the target with some blocks removed is a natural one. Its context mirrors the target's: what a sequence
has there, the slot of the same number holds here, as far as it was needed yet.

Source: llama.cpp's ``common/speculative.cpp`` (reusing the rows that agree, ending where the draft is unsure).
Deviations: all sequences are drafted for in one batch a token, and vocabularies are compared to the last token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from ziggurat.runtime.bindings import Context, Model
from ziggurat.runtime.engine.reuse import common_prefix
from ziggurat.runtime.engine.speculation import Reader, Wanted
from ziggurat.runtime.errors import DecodeAborted, ZigguratError

_logger = logging.getLogger(__name__)

#: A token that the draft model gives less probability ends the draft.
THRESHOLD = 0.4
# tokens that a call of draft reads before it drafts; where more are missing there is a reader
_INLINE = 8
# failed computations in a row after which it is left alone
_FAILURES = 3


@dataclass
class _Slot:
    """What a sequence of the draft's context holds, and how far that is known to agree with which tokens."""

    held: list[int] = field(default_factory=list)
    tokens: Sequence[int] = ()
    agreed: int = 0
    reader: _PromptReader | None = None


@dataclass
class _Draft:
    """One sequence in a call of ``draft``: tokens to decode, then those that were drafted."""

    slot: int
    todo: list[int]
    limit: int
    found: list[int]


class DraftModel:
    """A Drafter with a model and a context of its own, which ``close`` frees. Made by ``draft_loader``.

    Tokens from ``n_shared`` on are never drafted, the target has not got them.

    What goes wrong while drafting is logged, and there are no drafts then; after three failures in a row there are none
    any more. Nor are there for a sequence that the context has no room for. ``abort`` of ``context`` ends a computation
    that another thread does not want to wait for.
    """

    def __init__(self, model: Model, context: Context, n_shared: int, threshold: float = THRESHOLD) -> None:
        self.model = model
        self.context = context
        self._n_shared = n_shared
        self._threshold = threshold
        self._batch = context.new_batch()
        self._slots = [_Slot() for _ in range(context.settings.n_seq_max)]
        self._ends = frozenset(model.vocab.eog_tokens())
        layout = context.kv_layout()
        self._endless = layout is not None and layout.stage_rows > 0
        self._capacity = context.kv_capacity()
        context.set_step(_INLINE)
        self._failures = 0

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """Return the likeliest continuations, each until a token is unlikely or ends the text."""
        drafts: list[list[int]] = [[] for _ in wanted]
        if self._failures >= _FAILURES:
            return drafts
        try:
            ready = []
            for each, found in zip(wanted, drafts, strict=True):
                todo = self._missing(each)
                if todo:
                    limit = min(each.limit, self._room(len(each.tokens)))
                    self._make_room(each.slot, len(todo) + limit)
                    ready.append(_Draft(each.slot, todo, limit, found))
            while any(each.todo for each in ready):
                self._step(ready)
            if ready:
                self._failures = 0
            return drafts
        except ZigguratError as error:
            self._fail([each.slot for each in wanted], error)
            return [[] for _ in wanted]

    def _missing(self, wanted: Wanted) -> list[int]:
        """Return the tokens to decode before drafting; none when there is too much to read, or no room."""
        slot, tokens = self._slots[wanted.slot], wanted.tokens
        if slot.reader is not None:
            return []
        held = self._align(wanted.slot, tokens)
        missing = tokens[held : held + _INLINE + 1]
        if len(missing) > _INLINE or self._room(len(tokens)) < 1 or max(missing) >= self.model.vocab.n_tokens:
            return []
        slot.agreed = len(tokens)
        return list(missing)

    def _align(self, index: int, tokens: Sequence[int]) -> int:
        """Remove what a slot holds beyond these tokens without their last one; return how many it holds then."""
        slot = self._slots[index]
        known = min(slot.agreed, len(slot.held)) if slot.tokens is tokens else 0
        keep = min(common_prefix(slot.held, tokens, min(known, len(tokens))), len(tokens) - 1)
        if keep < len(slot.held):
            if not self.context.remove(index, keep):
                self.context.remove(index)  # rows of that prefix were evicted for what came after
                keep = 0
            del slot.held[keep:]
        slot.tokens, slot.agreed = tokens, keep
        return keep

    def _room(self, n_tokens: int) -> int:
        """Return how many tokens can be drafted after so many: the last one is never decoded."""
        return n_tokens if self._endless else self.context.n_ctx_allocated - n_tokens + 1

    def _make_room(self, slot: int, n_tokens: int) -> None:
        """With a KV budget, select rows before a draft that would need it: behind it, nothing could be taken back."""
        asked = self.context.settings.kv
        if not self.context.kv_active or asked is None:
            return
        rows = zip(asked.of_bounded(self.context.kv_rows(slot)), asked.of_bounded(self._capacity), strict=True)
        if any(used + n_tokens > most for used, most in rows):
            self.context.kv_select(slot)

    def _step(self, drafts: Sequence[_Draft]) -> None:
        """Decode what is to be decoded, as much as one batch takes, and choose for those that have nothing left."""
        batch = self._batch
        batch.clear()
        parts = []
        chosen = []
        for each in drafts:
            held = self._slots[each.slot].held
            part = each.todo[: batch.capacity - len(batch)]
            if not part:
                continue
            del each.todo[: len(part)]
            batch.add(part, len(held), each.slot, output_last=not each.todo)
            parts.append((held, part))
            if not each.todo:
                chosen.append(each)
        self.context.decode(batch)
        for held, part in parts:
            held.extend(part)
        if chosen:
            self._choose(chosen)

    def _choose(self, drafts: Sequence[_Draft]) -> None:
        import numpy as np

        logits = self.context.output_logits()[:, : self._n_shared]
        tokens = logits.argmax(axis=1)
        best = np.take_along_axis(logits, tokens[:, None], axis=1)
        probabilities = 1 / np.exp(logits - best).sum(axis=1)
        for each, token, probability in zip(drafts, tokens.tolist(), probabilities.tolist(), strict=True):
            # an end needs no draft: the model chooses it after the last accepted one
            if probability >= self._threshold and token not in self._ends:
                each.found.append(token)
                each.todo = [token] if len(each.found) < each.limit else []

    def reader(self, slot: int, tokens: Sequence[int]) -> Reader | None:
        """Return the reading of what a slot does not hold of these tokens, None when that is little or impossible."""
        if self._failures >= _FAILURES or not tokens:
            return None
        state = self._slots[slot]
        if state.reader is not None:
            if state.reader.reads(tokens):
                return state.reader
            state.reader.cancel()
        try:
            if len(tokens) - self._align(slot, tokens) > _INLINE:
                state.reader = self._begin(slot, tokens)
        except ZigguratError as error:
            self._fail([slot], error)
        return self._slots[slot].reader

    def _begin(self, index: int, tokens: Sequence[int]) -> _PromptReader | None:
        """Begin to read after what a slot holds; None when the tokens do not fit, or as many are read as may."""
        context = self.context
        if len(tokens) > context.n_ctx_allocated or max(tokens) >= self.model.vocab.n_tokens:
            return None
        if context.kv_active:
            assert context.settings.kv is not None
            if sum(slot.reader is not None for slot in self._slots) >= context.settings.kv.n_reading:
                return None
            context.prompt_begin(index, tokens[len(self._slots[index].held) :])
        return _PromptReader(self, index, tokens)

    def read(self, reader: _PromptReader) -> bool:
        """Do one piece of a prompt: a ubatch, with a KV budget as much. True when it is read or given up."""
        slot = self._slots[reader.slot]
        if slot.reader is not reader:
            return True
        try:
            if self.context.kv_active:
                # fewer layers at a time would take longer than the sequence takes to have new tokens
                progress = self.context.prompt_step(reader.slot, self.model.n_layer)
                reader.progress = progress.fraction
                if progress.finished:
                    slot.held[:] = reader.tokens
            else:
                held = len(slot.held)
                self._batch.clear()
                part = reader.tokens[held : held + min(self.context.n_ubatch, self._batch.capacity)]
                self._batch.add(part, held, reader.slot, output_last=False)
                self.context.decode(self._batch)
                slot.held.extend(part)
                reader.progress = len(slot.held) / len(reader.tokens)
        except ZigguratError as error:
            self._fail([reader.slot], error)
            return True
        if len(slot.held) < len(reader.tokens):
            return False
        slot.reader = None
        slot.agreed = len(reader.tokens)
        return True

    def give_up(self, reader: _PromptReader) -> None:
        """End the reading of a prompt; without a KV budget what was read stays."""
        slot = self._slots[reader.slot]
        if slot.reader is reader:
            slot.reader = None
            if self.context.kv_active:
                self.context.prompt_cancel(reader.slot)

    def forget(self, slot: int) -> None:
        """Remove the rows of a slot."""
        self._slots[slot] = _Slot()
        self.context.remove(slot)  # cancels the prompt that is read

    def _fail(self, slots: Sequence[int], error: ZigguratError) -> None:
        if not isinstance(error, DecodeAborted):
            self._failures += 1
            last = ", there will be none any more" if self._failures >= _FAILURES else ""
            _logger.warning("no drafts%s: %s", last, error)
        for slot in slots:
            try:
                self.forget(slot)
            except ZigguratError:
                self._failures = _FAILURES  # closed

    def close(self) -> None:
        """Free the context and the weights. Idempotent."""
        self.model.close()


class _PromptReader:
    """The reading of a prompt into a slot of the draft model."""

    def __init__(self, owner: DraftModel, slot: int, tokens: Sequence[int]) -> None:
        self.slot = slot
        self.tokens = list(tokens)
        self.progress = 0.0
        self._owner = owner

    def reads(self, tokens: Sequence[int]) -> bool:
        """Whether it reads the beginning of these tokens."""
        return common_prefix(self.tokens, tokens) == len(self.tokens)

    def step(self) -> bool:
        return self._owner.read(self)

    def cancel(self) -> None:
        self._owner.give_up(self)
