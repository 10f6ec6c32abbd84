"""Writes a Llama that copies exactly, at any length, without training; see `copy_construction` for how.

usage: python tests/models/exact_copy.py OUT [options]
OUT ending in .gguf is a GGUF file, anything else a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

if not __package__:  # run as a file: only its own folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.copy_certificate import KEY_ERRORS, Certificate, certify, longest_certain
from models.copy_construction import CopyModel, tensors
from models.copy_files import BOS, EOS, FIRST_WORD, write_folder, write_gguf
from models.needles import Needle, needle, needle_prompt

__all__ = [
    "BOS", "EOS", "FIRST_WORD", "KEY_ERRORS", "Certificate", "CopyModel", "Needle", "certify", "longest_certain",
    "needle", "needle_prompt", "tensors", "write_folder", "write_gguf",
]  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a hand-constructed Llama that continues '... K V W ... K' with 'V W', wherever K stood."
    )
    default = CopyModel()
    parser.add_argument("out", type=Path, metavar="OUT", help="NAME.gguf, or a folder for a Hugging Face checkpoint")
    parser.add_argument("--type", choices=("f32", "f16", "bf16"), default="f32", help="stored type: f32 or f16 in GGUF,"
                        " f32 or bf16 in a folder; all hold the same values (default: f32)")  # fmt: skip
    for name, text in {
        "vocab_size": "tokens: 3 special, 256 bytes, the rest words of one character",
        "n_layers": "blocks; all but two do nothing",
        "hidden_size": "width of the residual stream; multiples of 256 for K-quants",
        "ffn_size": "width of the MLPs",
        "head_dim": "32, 64, 128 or any even number that leaves the code room",
        "n_heads": "query heads",
        "n_kv_heads": "KV heads: 1 for MQA, as many as query heads for MHA",
        "context": "positions to lay the construction out for",
        "rope_theta": "base of RoPE",
        "margin": "lead of the right key's score in nats",
        "filler_noise": "what filler blocks add to spare channels, relative to the code's 1",
        "seed": "of the code and the noise",
    }.items():
        value = getattr(default, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help=f"{text} (default: {value:g})")
    parser.add_argument("--copy-layers", type=int, nargs=2, default=default.copy_layers, metavar=("FIRST", "SECOND"),
                        help="blocks with the previous-token and the match heads (default: 1 2)")  # fmt: skip
    return parser


def main() -> None:
    parser = _parser()
    options = vars(parser.parse_args())
    out, kind = options.pop("out"), options.pop("type")
    options["copy_layers"] = tuple(options["copy_layers"])
    known = {field.name for field in fields(CopyModel)}
    try:
        model = CopyModel(**{name: value for name, value in options.items() if name in known})
        if kind == ("bf16" if out.suffix == ".gguf" else "f16"):
            raise ValueError(f"{out.name} cannot be {kind}: a GGUF takes f32 or f16 here, a folder f32 or bf16")
        if out.suffix == ".gguf":
            write_gguf(model, out, kind)
        else:
            write_folder(model, out, kind)
    except ValueError as error:
        parser.error(str(error))
    print(f"{out}: code of {model.n_code} places, distance {model.code.distance}; {model.n_fast} fast pairs")
    if model.filler_noise:
        print("filler noise: not certified")
        return
    for cache in ("f32", "f16", "q8_0"):
        c = certify(model, model.context, KEY_ERRORS[cache])
        print(
            f"keys in {cache:5} at {c.length} tokens: {'certain' if c.certain else 'not certain'}; scores lead by "
            f"{c.previous_margin:.1f} and {c.match_margin:.1f} nats, the logit by {c.logit_gap:.1f}"
        )


if __name__ == "__main__":
    main()
