"""Opens a Hugging Face checkpoint: configuration and tensor table, every byte accounted for, no weight read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziggurat.converter import prequantized
from ziggurat.converter.errors import CheckpointError, TokenizerError, UnsupportedModelError

# Bytes per element of the safetensors types; names as in the safetensors format description.
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

# A header larger than this is not a header: the format's reference implementation has the same limit.
MAX_HEADER_BYTES = 100_000_000

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: its type, its shape (outermost dimension first) and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been checked for completeness."""

    folder: Path
    config: dict[str, Any]
    architecture: str
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(math.prod(t.shape) for t in self.tensors.values())


def open_checkpoint(folder: Path, *, ignore_code: bool = False) -> Checkpoint:
    """Check the folder and read its configuration and tensor table.

    Args:
        folder: a local folder in Hugging Face format.
        ignore_code: accept a checkpoint that brings its own Python code; the code is not run in either case.

    Raises:
        CheckpointError: not such a folder, or files are missing, truncated or inconsistent.
        UnsupportedModelError: the checkpoint wants its own code run, or is quantized in a way nobody here can undo.
        TokenizerError: no tokenizer files.
    """
    _refuse_other_inputs(folder)
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} does not hold a JSON object: copy the file again")
    if not ignore_code:
        _refuse_custom_code(folder, config)
    tensors = _tensor_table(folder)
    _refuse_endless_layers(folder, config, len(tensors))
    prequantized.refuse_unknown(folder, config, tensors)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise TokenizerError(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy the model's tokenizer files there"
        )
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointError(f'{folder / "config.json"} names no architecture: add its "architectures" entry')
    return Checkpoint(folder, config, architectures[0], tensors)


def _refuse_other_inputs(folder: Path) -> None:
    if folder.is_file():
        with folder.open("rb") as f:
            magic = f.read(4)
        if magic == b"GGUF":
            raise CheckpointError(
                f"{folder} is a GGUF file already: give the Hugging Face folder it was made from "
                "(llama-quantize changes the type of a GGUF)"
            )
        raise CheckpointError(f"{folder} is a file: give the folder that holds config.json and *.safetensors")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: give a folder in Hugging Face format or a hub id (owner/name)")
    if not (folder / "config.json").is_file():
        hint = "give the folder that holds config.json and *.safetensors"
        if (folder / "params.json").is_file():
            hint = "this looks like a checkpoint in its vendor's own format; get the Hugging Face version of the model"
        raise CheckpointError(f"{folder} has no config.json: {hint}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({e}): copy the file again") from e


def _refuse_custom_code(folder: Path, config: dict[str, Any]) -> None:
    """Refuse checkpoints that ask for their own Python code: what it computes cannot be known without running it."""
    for name, content in (("config.json", config), ("tokenizer_config.json", None)):
        if content is None:
            if not (folder / name).is_file():
                continue
            content = _read_json(folder / name)
        if isinstance(content, dict) and content.get("auto_map"):
            raise UnsupportedModelError(
                f"{folder / name} asks for code of its own (auto_map), which is never run here: if the architecture is "
                "also part of transformers, --ignore-code converts it as such; else use another checkpoint"
            )


def _refuse_endless_layers(folder: Path, config: dict[str, Any], n_tensors: int) -> None:
    """Refuse a number of layers beyond all sense: upstream makes a table of names for every one of them."""
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        n_layers = config.get(key)
        if isinstance(n_layers, int) and n_layers > max(n_tensors, 10_000):
            raise CheckpointError(
                f"{folder / 'config.json'} says {key} = {n_layers}, the weights are {n_tensors} tensors: it is not "
                "of these weights, copy the file again"
            )


def _tensor_table(folder: Path) -> dict[str, TensorInfo]:
    """Tensor table of all shards; the index, where there is one, must agree with the files."""
    index = folder / "model.safetensors.index.json"
    weight_map: dict[str, str] = {}
    if index.is_file():
        content = _read_json(index)
        found = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
            raise CheckpointError(f"{index} has no weight_map: copy the file again")
        weight_map = found
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(
                    f"{index} names {shard!r}, a file outside the folder: do not trust this checkpoint"
                )
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder / shard} is missing, though {index.name} lists it: download it again")
    else:
        shards = sorted(p.name for p in folder.glob("model*.safetensors"))
    if not shards:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened: get a "
                "safetensors version, or save it as one with save_pretrained(..., safe_serialization=True)"
            )
        raise CheckpointError(f"{folder} has no model*.safetensors: copy the weights there")

    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_safetensors_header(folder / shard).items():
            if name in tensors:
                raise CheckpointError(f"{folder / shard} repeats tensor {name} of {tensors[name].file.name}")
            tensors[name] = info
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{folder}: tensor {missing[0]} is listed in {index.name} but in no file: download it again"
        )
    extra = sorted(set(tensors) - set(weight_map)) if weight_map else []
    if extra:
        raise CheckpointError(
            f"{tensors[extra[0]].file} holds tensor {extra[0]}, which {index.name} does not list: these files are not "
            "of one checkpoint, download it again"
        )
    if not tensors:
        raise CheckpointError(f"{folder}: the safetensors files hold no tensor")
    return tensors


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor table of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the header is damaged, or tensors lie beyond the end of the file (a cut download).
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path} is truncated or no safetensors file ({size} bytes): download it again")
        try:
            header = json.loads(f.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
            raise CheckpointError(f"{path} has a damaged header ({e}): download it again") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header (no JSON object): download it again")
    data = size - 8 - length
    table: dict[str, TensorInfo] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as e:
            raise CheckpointError(f"{path}: the entry of tensor {name} is damaged: download the file again") from e
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise CheckpointError(f"{path}: the entry of tensor {name} is damaged: download the file again")
        elements = math.prod(shape)
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{path}: tensor {name} has the type {dtype}, which is not known here")
        if end > data:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends at byte {8 + length + end}, the file at {size}: "
                "download it again"
            )
        if end - begin != elements * DTYPE_BYTES[dtype]:
            raise CheckpointError(f"{path}: tensor {name} of shape {list(shape)} does not fit its {end - begin} bytes")
        table[name] = TensorInfo(dtype, shape, path, end - begin)
        places.append((begin, end, name))
    places.sort()
    for (_, end, name), (begin, _, other) in zip(places, places[1:], strict=False):
        if begin < end:
            raise CheckpointError(f"{path}: the tensors {name} and {other} overlap: download the file again")
    return table
