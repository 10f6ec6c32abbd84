"""The vectors that a context for embeddings has made of its sequences."""

from __future__ import annotations

from typing import Any

from ziggurat.runtime.bindings import library
from ziggurat.runtime.bindings.context import Context
from ziggurat.runtime.errors import InvalidRequestError

# enum llama_pooling_type of llama.h
_NAMES = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}


def pooling(context: Context) -> str:
    """Return how the context makes one vector of a sequence: mean, cls (the first token's) or last (the last one's).

    Also none, which makes a vector of every token, and rank, which makes scores.
    """
    number = int(library.api().llama_pooling_type(context.handle))
    return _NAMES.get(number, f"of kind {number}")


def vector(context: Context, sequence: int) -> Any:
    """Copy the vector of a sequence of the last batch: a float32 array of shape (n_embd_out,).

    Raises InvalidRequestError for a sequence that was not in it.
    """
    import numpy as np

    pointer = library.api().llama_get_embeddings_seq(context.handle, sequence)
    if not pointer:
        raise InvalidRequestError(f"the last batch made no vector of sequence {sequence}")
    return np.ctypeslib.as_array(pointer, shape=(context.model.n_embd_out,)).copy()
