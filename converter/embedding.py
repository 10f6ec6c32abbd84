"""Importance of the token embedding's columns: llama.cpp has none for it, since nothing is multiplied with it.

What an error in a column does is decided by those who read the residual stream, of whom the first block's attention
sees it undiluted. So a column counts as much as the first products of that block amplify it: the squared norm of the
column of their Jacobian, averaged over tokens. Measured on the reference model this is as good as the gradient of the
whole model's predictions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter import products

if TYPE_CHECKING:
    import torch

    from ziggurat.converter.blocks import Block

TENSOR = "token_embd.weight"


def column_importance(block: Block, hidden: torch.Tensor) -> npt.NDArray[np.float32]:
    """How strongly the first products of a block amplify each channel of what it reads, shape [n_embd].

    The squares are taken of a product of the Jacobian with random signs (Hutchinson's estimator); always the same ones.

    Args:
        block: the first of the model.
        hidden: states before it, [sequences, positions, n_embd].
    """
    import torch

    first: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def see(layers: tuple[str, ...], x: Any, out: Any, expert: int | None, experts: int | None) -> None:
        if not first:
            first.append(x)
        if x is first[0]:
            outputs.append(out)

    states = hidden.detach().clone().requires_grad_()
    with products.watching(block, see):
        block(states, differentiable=True)
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, o.shape, generator=generator).mul(2).sub(1).to(o.device, o.dtype) for o in outputs]
    gradient = torch.autograd.grad(outputs, states, signs)[0]
    squares = gradient.float().square().flatten(0, -2).mean(0, dtype=torch.float64)
    return np.asarray(squares.cpu().numpy(), np.float32)
