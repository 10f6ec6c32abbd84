"""Blocks taken out of a file: the same tensors as llama.cpp's quantizer keeps, and metadata that fit them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import _gguf

from helpers import families
from helpers.deep import build_deep
from helpers.plain import plain
from helpers.quantizer import quantize
from helpers.stock import Gguf
from ziggurat.converter import surgery
from ziggurat.converter.errors import PruneError
from ziggurat.converter.imatrix import read_imatrix
from ziggurat.converter.pipeline import ConvertSettings, convert
from ziggurat.converter.prune import PruneSettings
from ziggurat.converter.recipes import FTYPES
from ziggurat.converter.upstream import Plan, PlannedTensor

pytestmark = pytest.mark.usefixtures("quiet")

REMOVED = (2, 3, 5)
N_LAYER = 8


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a checkpoint of eight blocks of a family."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            width = {} if name == "gpt2" else {"intermediate_size": 256}  # less to quantize
            made[name] = build_deep(tmp_path_factory.mktemp(name) / "model", N_LAYER, name, "bfloat16", **width)
        return made[name]

    return make


def contents(path: Path) -> dict[str, tuple[int, bytes]]:
    reader = _gguf.GGUFReader(path)
    return {t.name: (int(t.tensor_type), t.data.tobytes()) for t in reader.tensors}


def settings(type_name: str, blocks: tuple[int, ...] = REMOVED, imatrix: Path | None = None) -> ConvertSettings:
    return plain(type=type_name, threads=1, imatrix=imatrix, prune=PruneSettings(blocks=blocks, repair=False))


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3", "mixtral", "gpt2", "olmo2"])
@pytest.mark.parametrize("type_name", ["q4_k_m", "q3_k_m", "q4_0"])
def test_same_tensors_as_llama_cpp(
    deep: Callable[[str], Path], gguf: Callable[[Path, str], Path], tmp_path: Path, family: str, type_name: str
) -> None:
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    quantize(gguf(deep(family), "bf16"), theirs, FTYPES[type_name], prune=REMOVED, threads=1)
    convert(deep(family), ours, settings(type_name))
    got, wanted = contents(ours), contents(theirs)
    assert sorted(got) == sorted(wanted)
    for name in wanted:
        assert got[name] == wanted[name], name


def test_importance_matrix_of_the_whole_model(
    deep: Callable[[str], Path], gguf: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    theirs, ours, matrix = (tmp_path / f"{name}.gguf" for name in ("theirs", "ours", "matrix"))
    whole = gguf(deep("llama_gqa"), "bf16")
    rng = np.random.default_rng(3)
    writer = _gguf.GGUFWriter(path=None, arch="imatrix")
    for tensor in _gguf.GGUFReader(whole).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            writer.add_tensor(f"{tensor.name}.in_sum2", rng.gamma(0.5, 4, (1, int(tensor.shape[0]))).astype(np.float32))
            writer.add_tensor(f"{tensor.name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file(matrix)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    importance = {name: values.reshape(-1) for name, values in read_imatrix(matrix).items()}
    quantize(whole, theirs, FTYPES["iq4_xs"], importance, prune=REMOVED, threads=1)
    convert(deep("llama_gqa"), ours, settings("iq4_xs", imatrix=matrix))
    assert contents(ours) == contents(theirs)


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3", "phi3", "qwen3_moe", "gpt2", "olmo2"])
def test_computes_what_transformers_does_without_the_blocks(
    deep: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    ours = tmp_path / "ours.gguf"
    convert(deep(family), ours, settings("f32"))
    tokens = [int(t) for t in np.random.default_rng(0).integers(5, 200, 24)]
    wanted = families.reference(deep(family), tokens, without=REMOVED)
    n = wanted.clear(1e-3)
    with Gguf(ours) as model:
        got = model.logits(tokens)
    logits = wanted.logits.numpy()
    error = ((got[:n, : logits.shape[1]] - logits[:n]) ** 2).sum() / (logits[:n] ** 2).sum()
    assert n > 4 and error < 1e-6


def test_metadata(deep: Callable[[str], Path], tmp_path: Path) -> None:
    convert(deep("llama_gqa"), tmp_path / "ours.gguf", settings("f32"))
    fields = _gguf.GGUFReader(tmp_path / "ours.gguf").fields
    assert fields["llama.block_count"].contents() == N_LAYER - len(REMOVED)
    assert fields["ziggurat.prune.blocks"].contents() == list(REMOVED)
    assert fields["ziggurat.prune.block_count_before"].contents() == N_LAYER
    assert fields["ziggurat.prune.criterion"].contents() == "list"
    assert fields["ziggurat.prune.repair"].contents() == "none"


def plan(**metadata: object) -> Plan:
    """A plan of four blocks with one tensor each."""
    kinds = _gguf.GGUFValueType
    values = {"llama.block_count": _gguf.GGUFValue(4, kinds.UINT32)}
    for key, value in metadata.items():
        kind = kinds.ARRAY if isinstance(value, list) else kinds.UINT32
        values["llama." + key.replace("__", ".")] = _gguf.GGUFValue(value, kind)
    names = ["token_embd.weight", *(f"blk.{i}.attn_q.weight" for i in range(4)), "output.weight"]
    return Plan("llama", values, [PlannedTensor(n, (1, 1), 0, lambda: np.zeros((1, 1), np.float32)) for n in names])


def test_arrays_by_block_lose_the_same_entries() -> None:
    cut = surgery.remove_blocks(plan(attention__head_count_kv=[8, 4, 2, 1], rope__dimension_sections=[1, 2, 3, 0]), {1})
    assert cut.value("{arch}.attention.head_count_kv") == [8, 2, 1]
    assert cut.value("{arch}.rope.dimension_sections") == [1, 2, 3, 0]
    assert cut.value("{arch}.block_count") == 3
    names = ["token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.2.attn_q.weight", "output.weight"]
    assert [t.name for t in cut.tensors] == names


@pytest.mark.parametrize(
    "metadata",
    [{"swiglu_limits": [1, 2, 3, 4]}, {"attention__head_count": [1, 2]}, {"leading_dense_block_count": 1}],
)
def test_metadata_bound_to_the_index_refuses(metadata: dict[str, object]) -> None:
    with pytest.raises(PruneError, match="no block can be removed"):
        surgery.remove_blocks(plan(**metadata), {1})
