"""The matrices of a block's linear layers, in memory, whatever transformers keeps them in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ziggurat.converter.blocks import Block
from ziggurat.converter.products import EXPERT

if TYPE_CHECKING:
    import torch


def matrices(block: Block) -> dict[str, list[torch.Tensor]]:
    """Views of the weights by layer, [rows, columns] as in the GGUF: the block computes with what is written into them.

    Layers are named as in `activations.Collector`. One matrix each; of the experts of a mixture, one per expert.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    found: dict[str, list[torch.Tensor]] = {}
    for path, module in block.layer.named_modules():
        if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            family = block.family.experts
            assert family is not None
            place = f"{block.prefix}{family.module}.experts."
            half = module.gate_up_proj.shape[1] // 2
            found[place + family.gate] = [expert[:half] for expert in module.gate_up_proj.detach()]
            found[place + family.up] = [expert[half:] for expert in module.gate_up_proj.detach()]
            found[place + family.down] = list(module.down_proj.detach())
        elif getattr(getattr(module, "weight", None), "ndim", 0) == 2:  # linear layers, GPT-2's Conv1D, routers
            weight = module.weight.detach()
            name = EXPERT.sub(".experts.", block.stored_name(path))
            found.setdefault(name, []).append(weight.T if isinstance(module, Conv1D) else weight)
    return found
