"""Asks a GGUF in llama.cpp for needles: a greedy decoder with the cache's settings, and a grid as a command.

usage: python tests/models/needle_grid.py MODEL.gguf --lengths 4096,16384 --depths 0,0.5,1
       python tests/models/needle_grid.py MODEL.gguf --lengths 16384,65536 --budgets 64,256,1024
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

if not __package__:  # run as a file: only its own folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.kv_library import PREFILLS, SCORES, Budget
from helpers.stock import Gguf
from models.needles import needle

# llama_cpp does not name BF16, which is 30 in ggml.h
CACHE_TYPES = {
    "f32": llama_cpp.GGML_TYPE_F32,
    "f16": llama_cpp.GGML_TYPE_F16,
    "bf16": 30,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}


@dataclass(frozen=True)
class Cache:
    """How the context is made. Without flash attention llama.cpp takes no quantized values."""

    type: str = "f16"
    flash: bool = True
    ubatch: int = 512


class Copier(Gguf):
    """A loaded GGUF that continues prompts greedily."""

    def __enter__(self) -> Copier:
        return self

    def greedy(
        self,
        tokens: Sequence[int],
        n: int,
        cache: Cache,
        *,
        forget: range | None = None,
        budget: Budget | None = None,
        threads: int = 1,
    ) -> list[int]:
        """Return the `n` best next tokens, one after the other.

        `forget`: positions whose KV rows are removed after the prompt but its last token was read, as if they had
        been evicted. `budget`: the question is then part of the prompt, which is read in one call.
        """
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch = len(tokens) + n, len(tokens)
        parameters.n_ubatch = cache.ubatch
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = CACHE_TYPES[cache.type]
        enabled, disabled = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.flash_attn_type = enabled if cache.flash else disabled
        native = budget.native() if budget else None
        if native is not None:
            parameters.n_batch = parameters.n_ctx
            parameters.kv_budget = ctypes.addressof(native)
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {cache}")
        try:
            read = len(tokens) - 1 if budget is None else len(tokens)
            self._decode(context, tokens[:read], 0)
            if forget is not None:
                memory = llama_cpp.llama_get_memory(context)
                if not llama_cpp.llama_memory_seq_rm(memory, 0, forget.start, forget.stop):
                    raise RuntimeError(f"llama.cpp does not remove rows {forget}")
            answer: list[int] = []
            last, position = tokens[-1], len(tokens) - 1
            for step in range(n):
                if step or read < len(tokens):
                    self._decode(context, [last], position)
                logits = llama_cpp.llama_get_logits_ith(context, -1)
                last, position = max(range(self.vocab_size), key=logits.__getitem__), position + 1
                answer.append(last)
            return answer
        finally:
            llama_cpp.llama_free(context)

    def _decode(self, context: llama_cpp.llama_context_p, tokens: Sequence[int], position: int) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == len(tokens) - 1
            if llama_cpp.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode fails")
        finally:
            llama_cpp.llama_batch_free(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description="Needle grid: depth x length, exact answers, as a share found.")
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="an exact-copy model")
    parser.add_argument("--lengths", default="64,512,4096", help="prompt lengths in tokens (default: %(default)s)")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="0: the start, 1: the end (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=1, help="prompts for each cell (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=4, help="key-value pairs in the text (default: %(default)s)")
    parser.add_argument("--value-tokens", type=int, default=3, help="tokens of a value (default: %(default)s)")
    parser.add_argument("--cache-type", choices=CACHE_TYPES, default="f16", help="keys and values (default: f16)")
    parser.add_argument("--no-flash", action="store_true", help="no flash attention")
    parser.add_argument("--ubatch", type=int, default=512, help="tokens computed at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--forget", action="store_true", help="drop the asked pair's KV rows first: nothing is found")
    parser.add_argument("--budgets", default="", metavar="ROWS,…", help="KV rows per layer (default: all)")
    parser.add_argument("--score", choices=SCORES, default="snapkv", help="(default: %(default)s)")
    parser.add_argument("--prefill", choices=PREFILLS, default="exact", help="(default: %(default)s)")
    parser.add_argument("--window", type=int, default=32, help="(default: %(default)s)")
    a = parser.parse_args()
    cache = Cache(a.cache_type, not a.no_flash, a.ubatch)
    with Copier(a.model) as copier:
        budgets = [
            Budget((int(rows),) * copier.n_layer, a.window, sinks=4, slack=64, score=a.score, prefill=a.prefill)
            for rows in filter(None, a.budgets.split(","))
        ]
        for length in map(int, a.lengths.split(",")):
            for depth in map(float, a.depths.split(",")):
                for budget in budgets or [None]:
                    start, found = time.monotonic(), 0
                    for seed in range(a.trials):
                        made = needle(
                            length, depth, seed,
                            n_pairs=a.pairs, value_tokens=a.value_tokens, vocab_size=copier.vocab_size,
                        )  # fmt: skip
                        forget = made.rows if a.forget else None
                        got = copier.greedy(
                            made.tokens, len(made.answer), cache, forget=forget, budget=budget, threads=a.threads
                        )
                        found += got == made.answer
                    seconds = time.monotonic() - start
                    rows = f" budget {budget.rows[0]:5}" if budget else ""
                    print(f"length {length:7} depth {depth:4.2f}{rows}: {found}/{a.trials} found, {seconds:.1f} s",
                          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
