"""What llama.cpp's own `conversion` package knows about a checkpoint: names, permutations, metadata, vocabulary.

It travels in the patched library (`llama_cpp._conversion`, with the gguf writer it belongs to as `llama_cpp._gguf`).
Nothing is computed here: tensors stay lazy until `PlannedTensor.load`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ziggurat.converter import ggml, pretokenizer, vocabulary
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import ConvertError, LibraryError, TokenizerError, UnsupportedModelError

logger = logging.getLogger(__name__)


# What upstream imports, some of it only where it is used.
NEEDED = ("torch", "transformers", "sentencepiece", "google", "yaml", "requests", "tqdm")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the GGUF to be: its name, shape (outermost dimension first) and the type of an unquantized file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    load: Callable[[], npt.NDArray[Any]]
    """Reads it, once: float32 or float16 of `shape`, or for any other `type_id` the raw bytes of [rows, row bytes]."""


@dataclass(frozen=True)
class Plan:
    """Everything of the GGUF to be except for the final types: what upstream's converter would write."""

    arch: str
    metadata: dict[str, Any]
    """Key to gguf value, as the writer of `llama_cpp._gguf` keeps them."""
    tensors: list[PlannedTensor]

    @property
    def parameters(self) -> int:
        """Values of all tensors."""
        return sum(math.prod(t.shape) for t in self.tensors)

    def value(self, key: str, default: Any = None) -> Any:
        """The metadata value of `key`, with `{arch}` filled in."""
        entry = self.metadata.get(key.format(arch=self.arch))
        return default if entry is None else entry.value

    def model_shape(self) -> ggml.ModelShape:
        """The dimensions that llama.cpp's recipes look at."""

        def first(key: str, default: int) -> int:
            value = self.value(key, default)
            return int(value[0] if isinstance(value, (list, tuple)) else value)

        n_embd, n_head = first("{arch}.embedding_length", 0), first("{arch}.attention.head_count", 1)
        head = n_embd // max(n_head, 1)
        return ggml.ModelShape(
            arch=self.arch,
            n_embd=n_embd,
            n_ff=first("{arch}.feed_forward_length", 0),
            n_layer=first("{arch}.block_count", 0),
            n_head=n_head,
            n_head_kv=first("{arch}.attention.head_count_kv", n_head),
            n_expert=first("{arch}.expert_count", 0),
            n_embd_head_k=first("{arch}.attention.key_length", head),
            n_embd_head_v=first("{arch}.attention.value_length", head),
        )


def plan(
    checkpoint: Checkpoint, base: str, *, pre: str | None = None, name: str | None = None, called: str | None = None
) -> Plan:
    """Map a checkpoint to GGUF: metadata, vocabulary and lazy tensors in llama.cpp's order.

    Args:
        checkpoint: an opened checkpoint.
        base: type of the matrices in an unquantized file: "f32", "f16" or "bf16".
        pre: pre-tokenizer name to write instead of the recognized one.
        name: the model's name in the metadata; default: from the model card, the configuration or `called`.
        called: what people call the model; default: the name of its folder.

    Raises:
        UnsupportedModelError: upstream does not know the architecture, or fails on this checkpoint.
        TokenizerError: the vocabulary cannot be read, or the pre-tokenizer is not known.
        LibraryError: the patched library is not installed.
    """
    conversion, gguf = _packages()
    try:
        model_class = conversion.get_model_class(checkpoint.architecture)
    except NotImplementedError:  # how upstream says that it has no class for the name
        raise UnsupportedModelError(
            f"{checkpoint.folder}: the architecture {checkpoint.architecture} is not known to llama.cpp's converter"
        ) from None
    tensors: list[PlannedTensor] = []
    adapter = _adapter_class(model_class, checkpoint, pre)
    ftype = gguf.LlamaFileType["ALL_F32" if base == "f32" else f"MOSTLY_{base.upper()}"]
    with _translated(checkpoint, "its tensors"):
        hparams = _complete(conversion.ModelBase.load_hparams(checkpoint.folder, False))
        out = Path(f"{checkpoint.folder.name or 'model'}.gguf")  # only looked at, never written
        model = adapter(checkpoint.folder, ftype, out, model_name=name, hparams=hparams)

        def sink(tensor_name: str, data: Any, qtype: Any) -> None:
            shape = tuple(int(n) for n in data.shape)
            model.gguf_writer.add_tensor_info(tensor_name, shape, np.dtype(np.float32), 0, raw_dtype=qtype)
            tensors.append(PlannedTensor(tensor_name, shape, int(qtype), _loader(gguf, tensor_name, data, qtype)))

        model.tensor_sink = sink
        model.prepare_tensors()
    known = {t.name for t in tensors}
    for part in model.gguf_writer.tensors:  # tensors that upstream repacks itself, with their final type
        for tensor_name, info in part.items():
            if tensor_name not in known:
                shape, load = tuple(int(n) for n in info.shape), _loader(gguf, tensor_name, info.tensor)
                tensors.append(PlannedTensor(tensor_name, shape, int(info.dtype), load))
    pretokenizer.read_tokenizer_json(checkpoint.folder)  # transformers' own words on a damaged file do not name it
    with (
        _translated(checkpoint, "its metadata or vocabulary"),
        _model_card(checkpoint.folder, called or Path(os.path.abspath(checkpoint.folder)).name, gguf) as card,
    ):
        model.dir_model_card = card
        model.prepare_metadata(vocab_only=False)
    tensors.sort(key=lambda t: _file_order(t.name))
    return Plan(gguf.MODEL_ARCH_NAMES[model.model_arch], dict(model.gguf_writer.kv_data[0]), tensors)


def _packages() -> tuple[Any, Any]:
    """The relocated `conversion` and `gguf` packages."""
    try:
        from llama_cpp import _conversion, _gguf
    except ImportError as e:
        if e.name and e.name.split(".")[0] in NEEDED:
            raise LibraryError(f"{e.name} is not installed: `pip install 'ziggurat[convert]'`") from e
        raise LibraryError(f"the installed llama-cpp-python has no converter: {ggml.REMEDY}") from e
    return _conversion, _gguf


def _adapter_class(model_class: Any, checkpoint: Checkpoint, pre: str | None) -> Any:
    """Upstream's class with the pre-tokenizer recognized from the tokenizer's content where its hash is unknown."""

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        if pre is not None:
            return pre
        upstream_log = logging.getLogger("hf-to-gguf")
        level = upstream_log.level
        upstream_log.setLevel(logging.ERROR)  # it prints a page on an unknown hash, which is the normal case here
        try:
            return str(model_class.get_vocab_base_pre(self, tokenizer))
        except NotImplementedError:  # how upstream says that the hash is unknown
            content = pretokenizer.read_tokenizer_json(checkpoint.folder)
            if content is None:  # vocab.json and merges.txt alone: what transformers makes of them
                content = json.loads(tokenizer.backend_tokenizer.to_str())
            return pretokenizer.recognize(content, checkpoint.folder)
        finally:
            upstream_log.setLevel(level)

    def set_vocab(self: Any) -> None:
        model_class.set_vocab(self)
        vocabulary.mend_unigram(checkpoint.folder, self.gguf_writer)

    namespace = {
        "model_arch": model_class.model_arch,
        "get_vocab_base_pre": get_vocab_base_pre,
        "set_vocab": set_vocab,
    }
    return type(model_class.__name__, (model_class,), namespace)


def _complete(hparams: dict[str, Any]) -> dict[str, Any]:
    """Add what upstream's classes ask for and transformers 5 no longer writes."""
    if hparams.get("model_type") == "gpt2" and "n_ctx" not in hparams:
        return {**hparams, "n_ctx": hparams["n_positions"]}
    return hparams


@contextmanager
def _model_card(folder: Path, called: str, gguf: Any) -> Iterator[Path | None]:
    """The folder upstream takes name, version, size and licence from; its name counts: it has to be `called` so.

    None if the model card cannot be read, which is no reason not to convert.
    """
    try:
        gguf.Metadata.load_model_card(folder)
    except Exception as e:  # written by hand: not UTF-8, or anything that yaml raises
        logger.warning("%s is left aside, it cannot be read: %s", folder / "README.md", _first_line(e))
        yield None
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / (called or "model")
        link.symlink_to(os.path.abspath(folder), target_is_directory=True)
        yield link


@contextmanager
def _translated(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Turn whatever upstream raises on a bad checkpoint into one of our errors."""
    try:
        yield
    except ConvertError:
        raise
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] not in NEEDED:
            raise UnsupportedModelError(f"{checkpoint.folder}: converting it needs {e.name}: install it") from e
        raise LibraryError(f"{e.name} is not installed: `pip install 'ziggurat[convert]'`") from e
    except (FileNotFoundError, UnicodeDecodeError) as e:
        raise TokenizerError(f"{checkpoint.folder}: {what} cannot be read: {_first_line(e)}") from e
    except Exception as e:  # upstream raises anything from AssertionError to KeyError
        logger.debug("upstream's converter failed", exc_info=True)
        if "< vocab_size" in _first_line(e):
            raise TokenizerError(
                f"{checkpoint.folder}: the tokenizer has more tokens than the vocab_size in config.json: the two "
                "do not belong together"
            ) from e
        if unmapped := re.search(r"Can not map tensor '(.*)'", str(e)):
            raise UnsupportedModelError(
                f"{checkpoint.folder}: llama.cpp has no place for tensor {unmapped[1]} in {checkpoint.architecture}: "
                "either config.json (number of layers?) is not of these weights, or the model is not built like this"
            ) from e
        raise UnsupportedModelError(
            f"{checkpoint.folder}: llama.cpp's converter for {checkpoint.architecture} cannot handle {what}: "
            f"{_first_line(e)}"
        ) from e


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    if not text and isinstance(error, AssertionError):  # what it asserted is all there is to tell
        text = traceback.extract_tb(error.__traceback__)[-1].line or ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _loader(gguf: Any, name: str, data: Any, qtype: Any = None) -> Callable[[], npt.NDArray[Any]]:
    """A function that reads a lazy tensor once; the upstream graph that computes it is let go with it.

    Upstream's lazy tensors keep every result they computed, so whoever kept them would end with the whole model in
    memory. What upstream raises while it computes becomes an UnsupportedModelError.
    """
    types = gguf.GGMLQuantizationType
    graph = [data if qtype in (None, types.F32, types.F16, types.BF16) else gguf.quants.quantize(data, qtype)]

    def load() -> npt.NDArray[Any]:
        lazy = graph.pop()
        try:
            if isinstance(lazy, gguf.LazyChunkedTensor):
                chunks: npt.NDArray[Any] = np.concatenate([np.asarray(chunk()) for chunk in lazy._chunks])
                return chunks.reshape(tuple(lazy.shape))
            return cast("npt.NDArray[Any]", gguf.LazyNumpyTensor.to_eager(lazy))
        except MemoryError:
            raise
        except Exception as e:
            logger.debug("upstream's converter failed", exc_info=True)
            raise UnsupportedModelError(f"llama.cpp's converter cannot compute {name}: {_first_line(e)}") from e

    return load


def _file_order(name: str) -> tuple[int, str]:
    """llama.cpp's order of tensors: what belongs to no block first, then block by block, by name within."""
    parts = name.split(".")
    block = int(parts[1]) if parts[0] == "blk" and len(parts) > 1 and parts[1].isdecimal() else -1
    return block, name
