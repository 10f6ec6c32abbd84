"""How prompts are read: in pieces, so that other sequences can go on in between."""

from __future__ import annotations

from collections.abc import Sequence

from ziggurat.runtime.bindings import Batch, Context


class StepReader:
    """With a KV budget: a step is a ubatch in one layer, and the sequence is as it was until the last one is done.

    Its methods raise what those of ``Context`` do. ``output`` is where the logits after the last token are.
    """

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
    """Tokens that are written in place, in chunks: a ubatch at most, and beside those of other sequences in a batch.

    Without a budget. And with one, where nothing of them is evicted: they are the first ones of a sequence then, and
    all of them one chunk.
    """

    def __init__(self, context: Context, sequence: int, tokens: Sequence[int], start: int) -> None:
        self._context, self._sequence = context, sequence
        self._tokens, self._start = tokens, start
        self.n_read = 0
        self.output = -1

    @property
    def n_left(self) -> int:
        """Tokens that are not read yet."""
        return len(self._tokens) - self.n_read

    @property
    def progress(self) -> float:
        """The part of the tokens that is read."""
        return self.n_read / len(self._tokens)

    def add(self, batch: Batch, n_tokens: int) -> None:
        """Put the next tokens into a batch, which is to be computed; ``output`` is where the logits of the last are."""
        chunk = self._tokens[self.n_read : self.n_read + n_tokens]
        last = n_tokens == self.n_left
        self.output = batch.add(chunk, self._start + self.n_read, self._sequence, output_last=last)

    def computed(self, n_tokens: int) -> bool:
        """Take note that they are read; True when these were the last."""
        self.n_read += n_tokens
        return not self.n_left

    def restore(self) -> bool:
        """Remove what was written of a batch that failed; False when the model cannot go back."""
        return self._context.remove(self._sequence, self._start + self.n_read)

    def cancel(self) -> None:
        """Nothing to undo but the rows."""


PromptReader = StepReader | ChunkReader
