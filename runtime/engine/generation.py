"""The state of one answer: how far its prompt is read, what was generated, and its figures.

Nothing here computes or knows of threads: the scheduler does the steps and tells what came of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ziggurat.runtime.bindings import Context
from ziggurat.runtime.device_sampling import unsupported
from ziggurat.runtime.engine.admission import Job
from ziggurat.runtime.engine.prefill import PromptReader
from ziggurat.runtime.engine.protocol import FinishReason, GenerationStats, TokenEvent
from ziggurat.runtime.engine.slots import Slot
from ziggurat.runtime.engine.text import TextAssembler
from ziggurat.runtime.logprobs import token_logprobs

# tokens for which moving the samplers to the device, which plans its memory anew, does not pay
_FEW = 64


@dataclass(frozen=True)
class KVFigures:
    """What one sequence takes of a context's KV cache: bytes as ``GenerationStats`` has them, and rows per layer.

    ``endless``: layers that are full select again, so that a generation is not bounded by the context.
    """

    bytes: int
    peak: int
    full: int
    rows_per_layer: tuple[int, ...]
    endless: bool = False


class Generation:
    """One request on one sequence, from its first prompt token to its last generated one.

    ``slot.tokens`` are those whose rows are there; ``pending`` was chosen and has none yet. ``parts`` are the prompt's
    tokens that are still to be read, ``reader`` reads the first of them; the prompt ``takes_lane`` unless it is read in
    one piece. ``reason`` is set when it is done.
    """

    def __init__(
        self, job: Job, slot: Slot, reused: int, *, context: Context, kv: KVFigures, clock: Callable[[], float]
    ) -> None:
        self.job, self.slot = job, slot
        self.seen = list(job.tokens)  # and what was generated
        self.reason: FinishReason | None = None
        self.pending: int | None = None
        self.parts: list[list[int]] = []
        self.takes_lane = True
        self.reader: PromptReader | None = None
        self.read_seconds = 0.0  # of the piece of the prompt that is being read
        self.n_generated = self.decode_steps = self.drafted = self.accepted = 0
        self._reused = reused
        self._context, self._vocab, self._kv = context, context.model.vocab, kv
        self._text = TextAssembler(job.request.stop)
        self._clock = clock
        self._started = self._prompt_done = self._last = clock()
        self._prompt_rows: tuple[int, ...] = ()
        self._read = False
        self._shown = {token for text in job.request.shown for token in self._single(text)}
        job.sampler.prime(job.tokens)

    def _single(self, text: str) -> list[int]:
        """Return the token that a text is written for, if it is one."""
        tokens = self._vocab.tokenize(text, add_special=False, parse_special=True)
        return tokens if len(tokens) == 1 else []

    @property
    def reading(self) -> bool:
        """Whether its prompt is not read to the end."""
        return self.pending is None

    @property
    def n_unread(self) -> int:
        """Tokens of its prompt that were not there when it began."""
        return len(self.job.tokens) - self._reused

    @property
    def started(self) -> float:
        """When it got its sequence."""
        return self._started

    @property
    def prompt_progress(self) -> float:
        """The part of the prompt's computation that is done, 0.0 to 1.0, by tokens between the pieces."""
        parts, reader = list(self.parts), self.reader  # asked from other threads as well
        left = sum(map(len, parts))
        done = reader.progress * len(parts[0]) if parts and reader is not None else 0.0
        return 1.0 - (left - done) / max(1, self.n_unread)

    def prompt_read(self, rows: tuple[int, ...]) -> None:
        """The prompt is read, and these rows are in use in each layer."""
        self._prompt_done = self._last = self._clock()
        self._prompt_rows, self._read = rows, True

    def prompt_copied(self, read: Generation) -> None:
        """The prompt is the same as another one's, which was read, and so was its sequence."""
        self.prompt_read(read._prompt_rows)

    def choose(self, index: int) -> TokenEvent | None:
        """Choose the next token from the logits at ``index`` of the context's last batch; it is then pending.

        None when it ends instead. Raises what ``Sampler.sample`` raises.
        """
        token = self.job.sampler.sample(self._context, index)
        self._last = self._clock()
        if token is None or self._vocab.is_eog(token):
            self.reason = "stop"
            return None
        self.n_generated += 1
        self.pending = token
        self.seen.append(token)
        text = self._text.feed(self._vocab.piece(token, special=token in self._shown))
        if self._text.stopped:
            self.reason = "stop"
        elif self._is_full():
            self.reason = "length"
        wanted = self.job.request.logprobs
        if wanted is None:
            return TokenEvent(token, text)
        return TokenEvent(token, text, token_logprobs(self._context.logits(index), token, wanted, self._vocab))

    def sample_on_device(self) -> None:
        """Have the next tokens chosen where the logits are, if the samplers are the same there and it is worth it."""
        request = self.job.request
        few = request.max_tokens is not None and request.max_tokens < _FEW
        if (
            not few
            and unsupported(request.sampling, self._vocab.n_tokens, logprobs=request.logprobs is not None) is None
        ):
            self.job.sampler.attach(self._context, self.slot.index)

    def _is_full(self) -> bool:
        limit = self.job.request.max_tokens
        if self.n_generated == limit or self._kv.endless:
            return self.n_generated == limit
        # the pending token needs a row of its own before another can be chosen
        return len(self.job.tokens) + self.n_generated > self._context.settings.n_ctx

    @property
    def room(self) -> int:
        """Tokens of one step that do not change how it goes on, the pending one included; 1 at least.

        No more than it may still generate and than have rows; and with a budget no more than go in before its layers
        are full, so that they select when they would have anyway.
        """
        limit = self.job.request.max_tokens
        left = [] if limit is None else [limit - self.n_generated]
        if not self._kv.endless:
            left.append(self._context.settings.n_ctx - len(self.job.tokens) - self.n_generated + 1)
        asked = self._context.settings.kv
        if self._context.kv_active and asked is not None:
            used = self._context.kv_rows(self.slot.index)
            rows = zip(asked.of_bounded(self._kv.rows_per_layer), asked.of_bounded(used), strict=True)
            free = min(most - held for most, held in rows)
            if free:  # else they select before this step
                left.append(free)
        return max(1, min(left, default=2**31))

    def finish(self) -> str:
        """Return the text still held back, and free the sampler."""
        self.job.sampler.close()
        return self._text.finish()

    def stats(self) -> GenerationStats:
        """Return the figures so far."""
        params = self.job.sampler.params
        read_until = self._prompt_done if self._read else self._clock()
        return GenerationStats(
            prompt_tokens=len(self.job.tokens),
            generated_tokens=self.n_generated,
            prompt_seconds=read_until - self._started,
            decode_seconds=self._last - self._prompt_done if self._read else 0.0,
            decode_steps=self.decode_steps,
            time_to_first_token_s=self._prompt_done - self.job.submitted if self._read else 0.0,
            kv_bytes=self._kv.bytes,
            kv_bytes_peak=self._kv.peak,
            kv_bytes_full=self._kv.full,
            kv_rows_per_layer=self._prompt_rows,
            evicted_rows=self.slot.evicted,
            n_ctx=self._context.settings.n_ctx,
            seed=params.seed if params.random else None,
            reused_tokens=self._reused,
            queue_seconds=self._started - self.job.submitted,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )


def not_begun(job: Job, n_ctx: int, now: float) -> GenerationStats:
    """Return the figures of a request that ended before it had a sequence."""
    return GenerationStats(
        prompt_tokens=len(job.tokens),
        generated_tokens=0,
        prompt_seconds=0.0,
        decode_seconds=0.0,
        decode_steps=0,
        time_to_first_token_s=0.0,
        kv_bytes=0,
        kv_bytes_peak=0,
        kv_bytes_full=0,
        kv_rows_per_layer=(),
        evicted_rows=0,
        n_ctx=n_ctx,
        seed=None,
        queue_seconds=now - job.submitted,
    )
