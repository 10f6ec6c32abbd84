"""Tensors equal, byte for byte, what llama.cpp's own chain makes: upstream's BF16 conversion, then its quantizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import _conversion, _gguf

from helpers.plain import plain
from helpers.quantizer import quantize
from ziggurat.converter.errors import ImatrixError
from ziggurat.converter.pipeline import convert
from ziggurat.converter.recipes import FTYPES

MakeCheckpoint = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("quiet")

TYPES = ["q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "iq4_nl", "q5_k_m", "q6_k", "q8_0",
         "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq3_s", "iq3_m"]  # fmt: skip
IMATRIX_TYPES = ["q4_k_m", "q4_0", "iq4_xs", "q2_k_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs",
                 "iq1_s", "iq1_m"]  # fmt: skip
FAMILIES = ["llama_tied", "llama_untied", "qwen2", "gemma3", "phi3", "mixtral", "qwen3_moe", "gpt2", "olmo2"]


@pytest.fixture(scope="module")
def upstream(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give upstream's own unquantized GGUF of a checkpoint; only the pre-tokenizer's name is made up."""
    made: dict[tuple[Path, str], Path] = {}

    def make(folder: Path, outtype: str = "bf16") -> Path:
        import torch

        if (folder, outtype) not in made:
            out = tmp_path_factory.mktemp("upstream") / f"{outtype}.gguf"
            model_class = _conversion.get_model_class(_architecture(folder))
            body = {"model_arch": model_class.model_arch, "get_vocab_base_pre": lambda self, tokenizer: "gpt-2"}
            ftype = _gguf.LlamaFileType["ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"]
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                type("Upstream", (model_class,), body)(folder, ftype, out).write()
            made[folder, outtype] = out
        return made[folder, outtype]

    return make


def _architecture(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["architectures"][0])


def tensors(path: Path) -> Iterator[tuple[str, int, bytes]]:
    for tensor in sorted(_gguf.GGUFReader(path).tensors, key=lambda t: t.name):
        yield tensor.name, int(tensor.tensor_type), tensor.data.tobytes()


def same(ours: Path, reference: Path) -> None:
    for mine, wanted in zip(tensors(ours), tensors(reference), strict=True):
        assert mine[:2] == wanted[:2]
        assert mine[2] == wanted[2], mine[0]


def write_imatrix(path: Path, columns: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Write random importance data in llama.cpp's GGUF form; return the means it stands for."""
    rng = np.random.default_rng(5)
    writer = _gguf.GGUFWriter(path=None, arch="imatrix")
    means = {}
    for name, shape in columns.items():
        counts = rng.integers(1, 50, (*shape[:-1], 1)).astype(np.float32)
        counts[0, 0] = 0 if shape[0] > 1 else counts[0, 0]  # an expert that no token reached
        sums = rng.gamma(0.5, 4.0, shape).astype(np.float32) * counts
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            means[name] = np.where(counts > 0, sums / counts, np.float32(1)).astype(np.float32).reshape(-1)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return means


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type(checkpoint: MakeCheckpoint, upstream: Callable[..., Path], tmp_path: Path, type_name: str) -> None:
    """A checkpoint in F32 shows that the rounding to BF16 comes first, as in the chain."""
    folder = checkpoint("llama_gqa", dtype="float32")
    quantize(upstream(folder), tmp_path / "ref.gguf", FTYPES[type_name])
    convert(folder, tmp_path / "own.gguf", plain(type=type_name))
    same(tmp_path / "own.gguf", tmp_path / "ref.gguf")


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16"])
def test_unquantized(checkpoint: MakeCheckpoint, upstream: Callable[..., Path], tmp_path: Path, type_name: str) -> None:
    folder = checkpoint("llama_gqa", dtype="float32")
    convert(folder, tmp_path / "own.gguf", plain(type=type_name))
    same(tmp_path / "own.gguf", upstream(folder, type_name))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("type_name", ["q4_k_m", "q4_0"])
def test_every_family(
    checkpoint: MakeCheckpoint, upstream: Callable[..., Path], tmp_path: Path, family: str, type_name: str
) -> None:
    folder = checkpoint(family, dtype="bfloat16")
    quantize(upstream(folder), tmp_path / "ref.gguf", FTYPES[type_name])
    convert(folder, tmp_path / "own.gguf", plain(type=type_name))
    same(tmp_path / "own.gguf", tmp_path / "ref.gguf")


@pytest.mark.parametrize(("family", "type_name"), [("llama_gqa", t) for t in IMATRIX_TYPES] + [("mixtral", "iq3_xxs")])
def test_with_an_importance_matrix(
    checkpoint: MakeCheckpoint, upstream: Callable[..., Path], tmp_path: Path, family: str, type_name: str
) -> None:
    folder = checkpoint(family, dtype="bfloat16", layers=1 if family == "mixtral" else 2)
    source = upstream(folder)
    columns = {
        t.name: (t.data.shape[0] if t.data.ndim == 3 else 1, int(t.shape[0]))
        for t in _gguf.GGUFReader(source).tensors
        if len(t.shape) > 1 and t.name.startswith("blk")
    }
    means = write_imatrix(tmp_path / "imatrix.gguf", columns)
    quantize(source, tmp_path / "ref.gguf", FTYPES[type_name], means)
    settings = plain(type=type_name, imatrix=tmp_path / "imatrix.gguf")
    convert(folder, tmp_path / "own.gguf", settings)
    same(tmp_path / "own.gguf", tmp_path / "ref.gguf")


def test_an_importance_matrix_of_another_model(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "imatrix.gguf", {"blk.0.attn_q.weight": (1, 7)})
    with pytest.raises(ImatrixError, match="another model"):
        convert(checkpoint("llama_gqa"), tmp_path / "own.gguf", plain(imatrix=tmp_path / "imatrix.gguf"))
