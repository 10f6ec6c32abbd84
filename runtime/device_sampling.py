"""Which requests the library may sample for within the context's graph, so that no logits leave the GPU.

Its samplers there are not all the same as those on the CPU: some are missing, some leave other candidates, and some
leave them in another order, in which the same seed draws another token. A request is sampled there only if its tokens
are the same, but for rounding: the draw adds up probabilities in floats there and in doubles on the CPU.
"""

from __future__ import annotations

from ziggurat.runtime.bindings import kv
from ziggurat.runtime.sampler import penalizes
from ziggurat.runtime.sampling import SamplingParams

#: Candidates that the library tries its samplers with before it takes them.
_PROBE = 128 * 1024


def unsupported(params: SamplingParams, n_vocab: int, *, logprobs: bool = False) -> str | None:
    """Return why a request's tokens cannot be chosen within the graph, None if they can.

    The context matters as well, see ``worthwhile``; drafts are never checked there.
    """
    if params.read_grammar() is not None:
        return "a grammar is asked token by token"
    if logprobs:
        return "log-probabilities are made of logits, which stay on the device"
    for off, name in (
        (params.mirostat == 0, "mirostat"),
        (params.dry_multiplier == 0, "DRY"),
        (not penalizes(params), "penalties"),
        (params.top_n_sigma <= 0, "top-n-sigma"),
    ):
        if not off:
            return f"there is no {name} there"
    if params.greedy and params.typical_p == 1 and params.xtc_probability == 0:
        return None
    if params.typical_p < 1 or params.xtc_probability > 0:
        return "there is no typical-p and no XTC there"
    if params.min_keep > 1:
        return "min-keep is not heeded there"
    if params.dynatemp_range > 0:
        return "with a dynamic temperature candidates are in another order there"
    if params.top_k >= min(n_vocab, _PROBE):
        return "the library aborts on a top-k beyond the candidates there"
    if params.top_k and params.top_p == 1:
        return "after top-k alone candidates are in another order there"
    return None


def worthwhile(*, n_gpu_layers: int | None, n_layer: int, has_gpu: bool, kv_budget: bool, drafts: bool) -> bool:
    """Whether a context with these can have samplers in its graph, and gains by it.

    It does where the logits are computed on a GPU: ``n_gpu_layers`` (None: all) count the output as the last layer.
    Raises LibraryError without a library.
    """
    on_gpu = has_gpu and (n_gpu_layers is None or n_gpu_layers > n_layer)
    return on_gpu and not drafts and (not kv_budget or kv.takes_samplers())
