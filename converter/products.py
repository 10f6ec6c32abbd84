"""Watching a block's matrix products: what its linear layers read and what they give."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ziggurat.converter.blocks import Block

EXPERT = re.compile(r"\.experts\.(\d+)\.")


class See(Protocol):
    """Who is told of a product."""

    def __call__(
        self, layers: tuple[str, ...], x: torch.Tensor, out: torch.Tensor, expert: int | None, experts: int | None
    ) -> None:
        """A product was computed.

        Args:
            layers: named as their weights in the checkpoint, without `.weight`; the experts of a mixture share a name
                without their number (`model.layers.0.mlp.experts.gate_proj`), however transformers keeps them.
            x: what they read, [..., columns].
            out: what they give, one layer's rows behind the other's: [..., rows], bias included.
            expert: which of `experts` it is; None: a layer of no mixture.
            experts: how many there are.
        """


@contextmanager
def watching(block: Block, see: See) -> Iterator[None]:
    """Tell of every product with a matrix of `block`, routers' among them, in calls meanwhile."""
    import torch

    handles = []
    for path, module in block.layer.named_modules():
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2:  # linear layers, GPT-2's Conv1D, routers
            handles.append(module.register_forward_hook(_hook(block, path, see)))
        elif isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            module.forward = _watched(block, module, see)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, module in block.layer.named_modules():
            module.__dict__.pop("forward", None)


def _hook(block: Block, path: str, see: See) -> Any:
    name, expert = block.stored_name(path), None
    if match := EXPERT.search(name):
        name, expert = EXPERT.sub(".experts.", name), int(match[1])
    experts = _count_experts(block, path) if expert is not None else None

    def hook(module: Any, args: tuple[Any, ...], out: Any) -> None:
        see((name,), args[0], out[0] if isinstance(out, tuple) else out, expert, experts)

    return hook


def _watched(block: Block, module: Any, see: See) -> Any:
    """The forward method of fused experts, each of whose products with a part of the fused tensor is seen."""
    import torch
    from torch.overrides import TorchFunctionMode

    family = block.family.experts
    assert family is not None
    place = f"{block.prefix}{family.module}.experts."
    fused = [
        (module.gate_up_proj, (place + family.gate, place + family.up)),
        (module.down_proj, (place + family.down,)),
    ]
    forward = module.forward

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.linear:
                for tensor, layers in fused:
                    offset = args[1].data_ptr() - tensor.data_ptr()
                    size = tensor[0].numel() * tensor.element_size()
                    if 0 <= offset < size * len(tensor):
                        see(layers, args[0], out, offset // size, len(tensor))
            return out

    def watched(*args: Any, **kwargs: Any) -> Any:
        with Watch():
            return forward(*args, **kwargs)

    return watched


def _count_experts(block: Block, path: str) -> int:
    module = block.layer
    for part in path.split("."):
        module = getattr(module, part)
        if part == "experts":
            return len(module)
    raise AssertionError(path)
