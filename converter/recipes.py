"""Which type every tensor gets: llama.cpp's recipes, answered by llama.cpp itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ziggurat.converter import ggml
from ziggurat.converter.errors import QuantizeError
from ziggurat.converter.upstream import Plan, PlannedTensor

# File type name to llama.cpp's number (enum llama_ftype).
FTYPES = {
    "f32": 0, "f16": 1, "bf16": 32,
    "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7,
    "q2_k": 10, "q2_k_s": 21, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15,
    "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18,
    "iq1_s": 24, "iq1_m": 31, "iq2_xxs": 19, "iq2_xs": 20, "iq2_s": 28, "iq2_m": 29,
    "iq3_xxs": 23, "iq3_xs": 22, "iq3_s": 26, "iq3_m": 27, "iq4_nl": 25, "iq4_xs": 30,
}  # fmt: skip

FLOAT_TYPES = ("f32", "f16", "bf16")


def choose(
    plan: Plan, type_name: str, *, imatrix: Collection[str] | None, shape: ggml.ModelShape | None = None
) -> list[int]:
    """The ggml type of each tensor of `plan` in a file of type `type_name`.

    Args:
        plan: made with `base` = `type_name` for the float types, with "bf16" for all others.
        type_name: a key of `FTYPES`.
        imatrix: names of the tensors with importance data; None without an importance matrix.
        shape: of the whole model if `plan` has lost blocks: llama.cpp's quantizer goes on using it when it prunes, for
            the model's size and as the number of feed-forward tensors; default: of `plan`.

    Raises:
        QuantizeError: a tensor's type needs an importance matrix and there is none for it.
        UnsupportedModelError: llama.cpp has no recipe for the model.
    """
    if type_name in FLOAT_TYPES:
        return [t.type_id for t in plan.tensors]
    table = [(t.name, t.type_id, t.shape) for t in plan.tensors]
    shape = shape or plan.model_shape()
    types, needs = ggml.recipe_types(shape, FTYPES[type_name], table, has_imatrix=imatrix is not None)
    _refuse_without_importance(plan.tensors, needs, type_name, imatrix)
    return types


def _refuse_without_importance(
    tensors: Sequence[PlannedTensor], needs: Sequence[bool], type_name: str, imatrix: Collection[str] | None
) -> None:
    lacking = [t.name for t, need in zip(tensors, needs, strict=True) if need and t.name not in (imatrix or ())]
    if not lacking:
        return
    if imatrix is None:
        raise QuantizeError(f"{type_name} needs an importance matrix: give one with --imatrix, or take another --type")
    raise QuantizeError(f"{type_name} needs importance data for {lacking[0]}, and the importance matrix has none")
