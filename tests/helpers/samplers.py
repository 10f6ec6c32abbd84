"""What a chain of samplers leaves of a distribution, with no model behind it."""

from __future__ import annotations

import ctypes

import numpy as np

from ziggurat.runtime.bindings import SamplerChain, library


def left(chain: SamplerChain, logits: np.ndarray) -> dict[int, float]:
    """Return the logits of the tokens that a chain without a last, choosing sampler leaves, by token."""
    lib = library.api()
    data = (lib.llama_token_data * len(logits))(*((token, float(logit), 0.0) for token, logit in enumerate(logits)))
    array = lib.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
    lib.llama_sampler_apply(chain.handle, ctypes.byref(array))
    found = {array.data[index].id: array.data[index].logit for index in range(array.size)}
    return {token: logit for token, logit in found.items() if logit > -np.inf}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities."""
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())
