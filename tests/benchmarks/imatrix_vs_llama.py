"""The importance matrix that `convert` gathers beside llama-imatrix's of the same source tree, on the same tokens.

Both run the model in F32, its KV cache too. llama-imatrix cuts the tokenized text into chunks and puts the token that
begins texts in the place of each chunk's first: the calibration tokens here are made the same way, by llama.cpp's own
tokenizer. The last line is JSON: for each tensor the largest relative difference of a column's mean square, and of all
its columns together (root mean square). Accepted are 1e-3; the exit status says whether that holds.

usage: python tests/benchmarks/imatrix_vs_llama.py --llama-imatrix PROGRAM --model FOLDER --text FILE
           [--ctx 512] [--chunks 32] [--threads 2]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from ziggurat.converter import importance, linears, upstream
from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.imatrix import read_imatrix, write_imatrix
from ziggurat.converter.pipeline import ConvertSettings, convert
from ziggurat.converter.tune import TunedModel, tune

LIMIT = 1e-3


def chunks(model: Path, text: str, ctx: int, most: int) -> npt.NDArray[np.int32]:
    """The chunks that llama-imatrix makes of a text: shape [chunks, ctx]."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
    vocab, data = llama_cpp.llama_model_get_vocab(loaded), text.encode()
    ids = (ctypes.c_int32 * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, len(ids), True, False)
    number = min(most, count // ctx)
    result = np.array(ids[: number * ctx], np.int32).reshape(number, ctx)
    if llama_cpp.llama_vocab_get_add_bos(vocab):
        result[:, 0] = llama_cpp.llama_vocab_bos(vocab)
    llama_cpp.llama_model_free(loaded)
    return result


def theirs(options: argparse.Namespace, model: Path, out: Path) -> dict[str, npt.NDArray[np.float32]]:
    """What llama-imatrix gathers."""
    command = [
        options.llama_imatrix, "-m", model, "-f", options.text, "-o", out, "-c", options.ctx, "-b", options.ctx, "-ub",
        options.ctx, "--chunks", options.chunks, "-t", options.threads, "--process-output", "--no-ppl",
        "-fa", "off", "-ctk", "f32", "-ctv", "f32",
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, check=False)
    if done.returncode or not out.is_file():
        raise SystemExit(f"llama-imatrix fails: {(done.stdout + done.stderr).decode(errors='replace')[-800:]}")
    return read_imatrix(out)


def ours(options: argparse.Namespace, ids: npt.NDArray[np.int32], folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """What a conversion gathers, written and read again."""
    checkpoint = open_checkpoint(options.model)
    tensors = linears.tensor_names(checkpoint, upstream.plan(checkpoint, "f32"))
    tokens = CalibrationTokens(ids, str(options.text))
    settings = CalibrateSettings(work=folder / "work", threads=options.threads)
    work = tune(TunedModel(Blocks(checkpoint), tensors), tokens, [], settings)
    write_imatrix(folder / "ours.gguf", importance.gather(work, tensors, tokens).matrix)
    return read_imatrix(folder / "ours.gguf")


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-imatrix", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    for name, value in (("--ctx", 512), ("--chunks", 32), ("--threads", 2)):
        parser.add_argument(name, type=int, default=value)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        convert(options.model, folder / "f32.gguf", ConvertSettings(type="f32"))
        wanted = theirs(options, folder / "f32.gguf", folder / "theirs.gguf")
        ids = chunks(folder / "f32.gguf", options.text.read_text(encoding="utf-8"), options.ctx, options.chunks)
        mine = ours(options, ids, folder)
    differences = {}
    for name, values in wanted.items():
        error = np.abs(mine[name] - values)
        largest = float((error / np.maximum(np.abs(values), np.finfo(np.float32).tiny)).max())
        differences[name] = {
            "column": largest,
            "all": float(np.sqrt(np.square(error).sum() / np.square(values).sum())),
        }
    worst = max(figures["column"] for figures in differences.values())
    print(json.dumps({"missing": sorted(set(wanted) ^ set(mine)), "largest": worst, "tensors": differences}))
    raise SystemExit(0 if worst <= LIMIT and set(wanted) == set(mine) else 1)


if __name__ == "__main__":
    main()
