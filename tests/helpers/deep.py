"""Tiny checkpoints with more blocks than those of the families, and what transformers computes in each of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpers import families
from ziggurat.converter.calibration_text import CalibrationTokens


def build_deep(folder: Path, layers: int = 5, name: str = "llama_gqa", dtype: Any = "float32", **options: Any) -> Path:
    """Write a checkpoint of family `name` with `layers` blocks and other options of its config."""
    family = families.FAMILIES[name]
    count = "n_layer" if "n_layer" in family.options else "num_hidden_layers"
    deep = dataclasses.replace(family, options={**family.options, count: layers, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "deep", deep)
        return families.build("deep", folder, dtype=dtype)


def random_tokens(sequences: int = 5, positions: int = 24, seed: int = 0) -> CalibrationTokens:
    """Sequences of ids that every family's vocabulary has."""
    ids = np.random.default_rng(seed).integers(3, 200, (sequences, positions)).astype(np.int32)
    return CalibrationTokens(ids, "random")


def load(folder: Path) -> Any:
    """The checkpoint in transformers, in F32."""
    with families._quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()


def hidden_states(model: Any, ids: np.ndarray[Any, Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states before each block and behind the last, as they are before the final norm; and the logits.

    The last of transformers' `output_hidden_states` is behind the norm, so it is taken from the norm's input.
    """
    base = getattr(model, model.base_model_prefix)
    norm = base.ln_f if hasattr(base, "ln_f") else base.norm
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        output = model(torch.from_numpy(ids.astype(np.int64)), output_hidden_states=True, use_cache=False)
    handle.remove()
    return [*output.hidden_states[:-1], seen[0]], output.logits
