"""Which tensor of the GGUF holds the weight of which linear layer of the checkpoint."""

from __future__ import annotations

from collections.abc import Collection

from ziggurat.converter import surgery
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.products import EXPERT
from ziggurat.converter.upstream import Plan

HEAD, HEAD_TENSOR = "lm_head", "output.weight"


def tensor_names(checkpoint: Checkpoint, plan: Plan, removed: Collection[int] = ()) -> dict[str, str]:
    """Names of linear layers' weights in the GGUF, as upstream's table of names has them.

    Rows may stand in another order there (those of q and k do), columns never.

    Args:
        checkpoint: where the layers are.
        plan: of the GGUF, its blocks renumbered if some were removed.
        removed: these, as the checkpoint numbers them.

    Returns:
        For each layer of the remaining blocks, named as its weight in the checkpoint without `.weight`, the name of
        a tensor of `plan`; the experts of a mixture share a name without their number and a tensor. The head is HEAD
        where the GGUF has a matrix of its own for it.
    """
    from llama_cpp import _gguf as gguf

    n_layer = surgery.block_count(plan) + len(removed)
    places, known = surgery.renumber(n_layer, removed), {t.name for t in plan.tensors if len(t.shape) > 1}
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == plan.arch)
    table = gguf.get_tensor_name_map(arch, n_layer)
    names: dict[str, str] = {}
    for stored in checkpoint.tensors:
        layer = EXPERT.sub(".experts.", stored.removesuffix(".weight"))
        name = table.get_name(layer) if stored.endswith(".weight") else None
        if name is None or not name.startswith("blk."):
            continue
        renamed = surgery.renamed(f"{name}.weight", places)
        if renamed in known:
            names[layer] = renamed
    if HEAD_TENSOR in known:
        names[HEAD] = HEAD_TENSOR
    return names
