"""How prompts are read: in pieces, so that other sequences can go on in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ziggurat.runtime.bindings import Batch, Context
from ziggurat.runtime.engine.speculation import Reader
from ziggurat.runtime.errors import DecodeAborted, EngineError


class PromptReader(Reader, Protocol):
    """Reads tokens into a sequence. What it raises is what ``Context.decode`` does."""

    @property
    def output(self) -> int:
        """Where the logits after the last token are, once it is read."""
        ...


class StepReader:
    """With a KV budget: a step is a ubatch in one layer, and the sequence is as it was until the last one is done."""

    output = -1

    def __init__(self, context: Context, sequence: int, tokens: Sequence[int]) -> None:
        self._context, self._sequence, self._tokens = context, sequence, tokens
        self._begun = False
        self._fraction = 0.0

    @property
    def progress(self) -> float:
        """The part of the steps that is done."""
        return self._fraction

    def step(self) -> bool:
        """Compute a step; the first one after an abort begins again."""
        if not self._begun:
            self._context.prompt_begin(self._sequence, self._tokens)
            self._begun, self._fraction = True, 0.0
        try:
            progress = self._context.prompt_step(self._sequence, 1)
        except BaseException:
            self._begun = False  # the library has cancelled the prompt
            raise
        self._fraction, self._begun = progress.fraction, not progress.finished
        return progress.finished

    def cancel(self) -> None:
        """Leave the sequence as it was."""
        if self._begun:
            self._begun = False
            self._context.prompt_cancel(self._sequence)


class ChunkReader:
    """Without a budget: a step is a chunk of as many tokens as ``size`` says, a ubatch at most.

    ``batch`` may be used by others between the steps.
    """

    def __init__(
        self,
        context: Context,
        batch: Batch,
        sequence: int,
        tokens: Sequence[int],
        start: int,
        size: Callable[[], int] | None = None,
    ) -> None:
        self._context, self._batch, self._sequence = context, batch, sequence
        self._tokens, self._start = tokens, start
        self._most = min(context.n_ubatch, batch.capacity)
        self._size = size or (lambda: self._most)
        self.n_read = 0
        self.output = -1

    @property
    def progress(self) -> float:
        """The part of the tokens that is read."""
        return self.n_read / len(self._tokens)

    def step(self) -> bool:
        """Compute a chunk; after an abort the next one is the same again."""
        chunk = self._tokens[self.n_read : self.n_read + min(self._most, self._size())]
        last = self.n_read + len(chunk) == len(self._tokens)
        position = self._start + self.n_read
        self._batch.clear()
        index = self._batch.add(chunk, position, self._sequence, output_last=last)
        try:
            self._context.decode(self._batch)
        except BaseException as error:
            exact = self._context.remove(self._sequence, position)  # a part of it may have been computed
            if isinstance(error, DecodeAborted) and not exact:
                raise EngineError("the reading of a prompt was interrupted, and this model cannot go back") from error
            raise
        self.n_read += len(chunk)
        self.output = index
        return last

    def cancel(self) -> None:
        """Nothing to undo but the rows."""
