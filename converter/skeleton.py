"""The model around a checkpoint's blocks: transformers' own, without weights, with recorders in the blocks' places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import CheckpointError, ConvertError, LibraryError
from ziggurat.converter.families import Family

if TYPE_CHECKING:
    import torch


class Prepared(Exception):  # noqa: N818
    """Ends a forward pass when the last recorder has what it wants."""


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where and in what type torch computes, by their names.

    Raises:
        LibraryError: torch or transformers is missing.
        ConvertError: there is no such device.
    """
    try:
        import torch
        import transformers  # noqa: F401 - what is missing is said at once
    except ImportError as e:
        raise LibraryError(f"{e.name} is not installed: `pip install 'ziggurat[convert]'`") from e
    if device != "cpu" and device.partition(":")[0] != "cuda":
        raise ConvertError(f"there is no device {device!r}: choose cpu or cuda")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConvertError("torch finds no CUDA device: leave --device out, or install a CUDA build of torch")
    return torch.device(device), getattr(torch, dtype)


def build(checkpoint: Checkpoint, family: Family) -> tuple[Any, Any]:
    """Configuration and model, both transformers'; the model's matrices have no memory.

    Raises:
        CheckpointError: the configuration is refused, or of another architecture than it says.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        config.use_cache = False
        with _without_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=family.attention)
    except Exception as e:  # transformers checks configurations with errors of many kinds
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} is refused by transformers ({type(e).__name__}: {e})"
        ) from e
    if type(model).__name__ != checkpoint.architecture:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} names {checkpoint.architecture}, its model_type belongs to "
            f"{type(model).__name__}: correct one of them"
        )
    for module in model.modules():  # fused experts one by one, so that each one's input can be seen
        if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return config, model.eval().requires_grad_(False)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Let modules be built without memory for matrices, while what they compute for themselves is really there.

    Modules make room for matrices by `torch.empty` and compute buffers by anything else, so only that goes to the
    device without memory. (All of it there, as `torch.device("meta")` does, would lose rotary frequencies.) Drawing
    random values for what is not there would take most of the time.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Meta(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is torch.empty:
                kwargs["device"] = "meta"
            elif func is torch.nn.init.normal_ and kwargs["tensor"].is_meta:
                return kwargs["tensor"]
            return func(*args, **kwargs)

    with Meta():
        yield


def install_recorders(base: Any, layers: str, count: int) -> list[Any]:
    """Put recorders in the blocks' places; the last one ends the forward pass."""
    import torch

    class Recorder(torch.nn.Module):
        def __init__(self, last: bool) -> None:
            super().__init__()
            self.last = last
            self.seen: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
            self.hidden: torch.Tensor | None = None

        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.seen = args, kwargs
            if self.hidden is None:
                self.hidden = hidden
            if self.last:
                raise Prepared
            return hidden

    recorders = [Recorder(index == count - 1) for index in range(count)]
    setattr(base, layers, torch.nn.ModuleList(recorders))
    return recorders
