"""Checkpoints that are quantized already: which of them llama.cpp's converter can turn back into floats.

Everything else is refused from the configuration and the tensors' names, before any work.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ziggurat.converter.errors import UnsupportedModelError

# quant_method in config.json, as far as the `conversion` package of llama.cpp knows it
METHODS = ("bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4")
GPTQ_BITS = (2, 4, 8)
GPTQ_FORMATS = ("gptq", "gptq_v2")  # gptq stores its zero points less one, gptq_v2 as they are
PACKED, NVFP4 = "pack-quantized", "nvfp4-pack-quantized"
SCALED = ("float-quantized", "int-quantized", "naive-quantized")

# Endings of tensor names that only quantized checkpoints have.
TRACES = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax")


def refuse_unknown(folder: Path, config: dict[str, Any], tensors: Collection[str]) -> None:
    """Refuse what cannot be dequantized, by the name of its method, format or number of bits.

    Args:
        folder: the checkpoint, for the message.
        config: its config.json.
        tensors: names of its tensors.

    Raises:
        UnsupportedModelError: it is quantized in a way that nobody here can undo.
    """
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization:
        reason = _unknown(quantization)
        if reason is not None:
            raise UnsupportedModelError(
                f"{folder} is quantized with {reason}: convert the original checkpoint, the one before quantization"
            )
    elif not (folder / "hf_quant_config.json").is_file():  # modelopt's own place for it
        trace = next((name for name in sorted(tensors) if name.endswith(TRACES)), None)
        if trace is not None:
            raise UnsupportedModelError(
                f"{folder} holds quantized tensors ({trace}), but config.json has no quantization_config that says "
                "how: convert the original checkpoint, the one before quantization"
            )


def _unknown(quantization: dict[str, Any]) -> str | None:
    """What it is quantized with and why that does not do, or None if it does."""
    method = quantization.get("quant_method")
    if method not in METHODS:
        return f"{method!r}, which cannot be turned back into floats here (possible: {', '.join(METHODS)})"
    if method == "gptq":
        bits, form = quantization.get("bits"), quantization.get("checkpoint_format", "gptq")
        if bits not in GPTQ_BITS:
            return f"'gptq' at {bits} bits, which cannot be turned back into floats here (possible: 2, 4, 8)"
        if form not in GPTQ_FORMATS:
            return f"'gptq' in the format {form!r}, which cannot be read here (possible: {', '.join(GPTQ_FORMATS)})"
    if method == "compressed-tensors":
        reason = _unknown_compressed(quantization)
        return None if reason is None else f"'compressed-tensors' {reason}"
    return None


def _unknown_compressed(quantization: dict[str, Any]) -> str | None:
    form, groups = quantization.get("format"), quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        return "without config_groups that say how"
    if form == NVFP4 or form == "mixed-precision" and all(g.get("format") == NVFP4 for g in groups.values()):
        return None
    if form != PACKED and form not in SCALED:
        return f"in the format {form!r}, which cannot be read here (possible: {', '.join((PACKED, *SCALED, NVFP4))})"
    if len(groups) > 1:
        return f"in {len(groups)} groups of layers ({', '.join(groups)}), of which one is possible here"
    (weights,) = (g.get("weights") for g in groups.values())
    if not isinstance(weights, dict):
        return "without weights in its group of layers"
    strategy = weights.get("strategy")
    possible = ("group",) if form == PACKED else ("channel", "block")
    if strategy not in possible:
        return f"in the format {form!r} with the strategy {strategy!r} (possible: {', '.join(possible)})"
    if form == PACKED:
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if weights.get("type", "int") != "int" or not isinstance(bits, int) or not isinstance(size, int):
            return f"in the format {form!r} with {weights.get('type')!r} values of {bits} bits in groups of {size}"
        if weights.get("actorder") in (True, "group"):
            return "with columns out of order (actorder), which cannot be read here"
    elif weights.get("group_size") is not None:
        return f"in the format {form!r} in groups of {weights['group_size']} columns"
    return None
