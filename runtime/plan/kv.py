"""What KV rows take: arithmetic over the shape of a model's attention.

Figures agree with llama.cpp's allocation to the byte; where a family keeps something else than plain rows per layer,
``KVShape.exact`` is False and callers say so. Source: ``llama-kv-cache.cpp``, ``llama-kv-cache-iswa.cpp`` and the
``load_arch_hparams`` of each architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ziggurat.runtime.errors import ModelFileError, UnsupportedError
from ziggurat.runtime.gguf_file import GGUFFile

#: KV row type -> (values per block, bytes per block)
CACHE_TYPE_BLOCKS = {"f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18), "f32": (1, 4)}
#: The library rounds the rows of a cache up to this.
ROW_PADDING = 256


@dataclass(frozen=True)
class SlidingWindow:
    """How an architecture lays out its sliding-window layers when the file does not list them.

    Every ``period`` layers one is full: the last of them, or the first with ``full_first``. ``default`` is the window
    the architecture has without metadata, 0 for none.
    """

    period: int
    full_first: bool = False
    default: int = 0


# Architectures absent here ignore attention.sliding_window unless the file lists the layers (phi3, qwen2, …).
_SLIDING: dict[str, SlidingWindow] = {
    "afmoe": SlidingWindow(4),
    "cohere2": SlidingWindow(4),
    "cohere2moe": SlidingWindow(4, full_first=True),
    "exaone-moe": SlidingWindow(4),
    "gemma2": SlidingWindow(2, default=4096),
    "gemma3": SlidingWindow(6),
    "gpt-oss": SlidingWindow(2),
    "laguna": SlidingWindow(4, full_first=True),
    "mellum": SlidingWindow(4),
    "olmo2": SlidingWindow(4),
    "plamo3": SlidingWindow(8),
    "smallthinker": SlidingWindow(4, full_first=True),
}
_LISTED = {"granite-swa", "mimo2", "step35"}
# Metadata of families that keep recurrent state, compressed rows or shared rows beside or instead of plain ones.
_NOT_PLAIN = (
    "ssm.state_size",
    "attention.kv_lora_rank",
    "attention.shared_kv_layers",
    "wkv.head_size",
    "shortconv.l_cache",
)


@dataclass(frozen=True)
class KVShape:
    """What decides the bytes of a KV cache. Tuples have one entry per layer.

    ``key_width`` and ``value_width`` are values per row (KV heads times head size); ``key_length`` and ``value_length``
    the sizes of one head; ``window`` is the sliding window in tokens, 0 for a layer that sees everything.
    """

    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    key_length: int
    value_length: int
    window: tuple[int, ...]
    n_ctx_train: int
    exact: bool = True

    @property
    def n_layer(self) -> int:
        """Number of layers with a cache of their own."""
        return len(self.n_head_kv)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers that see everything: those that can have a budget."""
        return tuple(layer for layer, window in enumerate(self.window) if not window)

    def key_width(self, layer: int) -> int:
        """Values in one K row of a layer."""
        return self.n_head_kv[layer] * self.key_length

    def value_width(self, layer: int) -> int:
        """Values in one V row of a layer."""
        return self.n_head_kv[layer] * self.value_length


def kv_shape(model: GGUFFile) -> KVShape:
    """Read the KV shape out of a model's metadata.

    Raises ModelFileError when the file does not say how many layers or heads it has, UnsupportedError for models
    without attention.
    """
    arch = model.architecture
    n_layer = model.integer(f"{arch}.block_count")
    if not arch or n_layer is None:
        raise ModelFileError(
            f"{model.path}: has no {arch or 'general.architecture'} block count; it is not a language model"
        )
    n_layer -= model.integer(f"{arch}.nextn_predict_layers") or 0
    n_head = _per_layer(model, f"{arch}.attention.head_count", n_layer)
    if n_head is None:
        raise UnsupportedError(f"{model.path}: a {arch} model has no attention heads, so it has no KV cache")
    n_head_kv = _per_layer(model, f"{arch}.attention.head_count_kv", n_layer) or n_head
    embedding = model.integer(f"{arch}.embedding_length") or 0
    head = embedding // max(n_head[0], 1)
    exact = all(model.fields.get(f"{arch}.{key}") is None for key in _NOT_PLAIN)
    key_swa = model.integer(f"{arch}.attention.key_length_swa")
    key = model.integer(f"{arch}.attention.key_length") or head
    return KVShape(
        n_head=n_head,
        n_head_kv=n_head_kv,
        key_length=key,
        value_length=model.integer(f"{arch}.attention.value_length") or head,
        window=_windows(model, arch, n_layer),
        n_ctx_train=model.integer(f"{arch}.context_length") or 0,
        exact=exact and key_swa in (None, key) and arch not in ("llama4", "gemma3n", "gemma4"),
    )


def _per_layer(model: GGUFFile, key: str, n_layer: int) -> tuple[int, ...] | None:
    """Return an integer given once or per layer as one value per layer."""
    single = model.integer(key)
    if single is not None:
        return (single,) * n_layer
    listed = model.array(key)
    if listed is None:
        return None
    if len(listed) < n_layer:
        raise ModelFileError(f"{model.path}: {key} lists {len(listed)} layers of {n_layer}; the file is damaged")
    return tuple(int(value) for value in listed[:n_layer])


def _windows(model: GGUFFile, arch: str, n_layer: int) -> tuple[int, ...]:
    window = model.integer(f"{arch}.attention.sliding_window")
    listed = model.array(f"{arch}.attention.sliding_window_pattern")
    if listed is not None and (arch in _SLIDING or arch in _LISTED):
        return tuple((window or 0) if slides else 0 for slides in listed[:n_layer])
    return sliding_windows(arch, n_layer, window, model.integer(f"{arch}.attention.sliding_window_pattern"))


def sliding_windows(arch: str, n_layer: int, window: int | None, period: int | None = None) -> tuple[int, ...]:
    """Return the window of each layer, 0 for those that see everything, as an architecture of llama.cpp lays them out.

    ``window`` and ``period`` (every how many layers one is full) are what the model's metadata says, None where absent.
    """
    layout = _SLIDING.get(arch)
    window = window or (layout.default if layout else 0)
    if not window or (layout is None and arch not in _LISTED):
        return (0,) * n_layer
    period = period or (layout.period if layout else 0)
    full = 0 if layout and layout.full_first else period - 1
    return tuple(0 if period and layer % period == full else window for layer in range(n_layer))


def padded(rows: int) -> int:
    """Round a number of rows up as the library does."""
    return -(-rows // ROW_PADDING) * ROW_PADDING


def row_bytes(width: int, cache_type: str) -> int:
    """Bytes of one row of ``width`` values. Raises UnsupportedError when the type's blocks do not divide it."""
    block, block_bytes = CACHE_TYPE_BLOCKS[cache_type]
    if width % block:
        raise UnsupportedError(
            f"cache type {cache_type} stores blocks of {block} values, a row here has {width}; use f16"
        )
    return width // block * block_bytes


def bytes_per_token(
    shape: KVShape, type_k: str = "f16", type_v: str = "f16", *, flash_attention: bool = True
) -> tuple[int, ...]:
    """Bytes that one token's K and V rows take in each layer; without flash attention all V rows are the widest's."""
    widest = max(shape.value_width(layer) for layer in range(shape.n_layer))
    return tuple(
        row_bytes(shape.key_width(layer), type_k)
        + row_bytes(shape.value_width(layer) if flash_attention else widest, type_v)
        for layer in range(shape.n_layer)
    )


def rows_per_layer(shape: KVShape, n_ctx: int, *, n_ubatch: int = 512, swa_full: bool = False) -> tuple[int, ...]:
    """Rows allocated in each layer for one sequence of ``n_ctx`` tokens.

    A sliding-window layer holds its window and one ubatch, but never more than a full one.
    """
    full = padded(n_ctx)
    return tuple(full if swa_full or not window else padded(min(full, window + n_ubatch)) for window in shape.window)


def kv_bytes_per_layer(
    shape: KVShape,
    n_ctx: int,
    *,
    type_k: str = "f16",
    type_v: str = "f16",
    n_seq: int = 1,
    n_ubatch: int = 512,
    swa_full: bool = False,
    flash_attention: bool = True,
) -> tuple[int, ...]:
    """Bytes the library allocates in each layer for the rows of ``n_seq`` sequences of ``n_ctx`` tokens each."""
    rows = rows_per_layer(shape, n_ctx, n_ubatch=n_ubatch, swa_full=swa_full)
    per_row = bytes_per_token(shape, type_k, type_v, flash_attention=flash_attention)
    return tuple(n_seq * n * size for n, size in zip(rows, per_row, strict=True))


def kv_bytes(
    shape: KVShape,
    n_ctx: int,
    *,
    type_k: str = "f16",
    type_v: str = "f16",
    n_seq: int = 1,
    n_ubatch: int = 512,
    swa_full: bool = False,
    flash_attention: bool = True,
) -> int:
    """Bytes the library allocates for the KV cache of ``n_seq`` sequences of ``n_ctx`` tokens each."""
    return sum(
        kv_bytes_per_layer(
            shape,
            n_ctx,
            type_k=type_k,
            type_v=type_v,
            n_seq=n_seq,
            n_ubatch=n_ubatch,
            swa_full=swa_full,
            flash_attention=flash_attention,
        )
    )


def rows_held(shape: KVShape, n_tokens: int, allocated: Sequence[int]) -> tuple[int, ...]:
    """Rows in use in each layer after ``n_tokens`` tokens, given what ``rows_per_layer`` allocated."""
    return tuple(min(n_tokens, rows) for rows in allocated)


def check_cache_types(shape: KVShape, type_k: str, type_v: str) -> None:
    """Raise UnsupportedError, naming type and head size, when a quantized cache does not fit the model's heads.

    The library checks this only with flash attention, and aborts the process otherwise.
    """
    for side, cache_type, size in (("k", type_k, shape.key_length), ("v", type_v, shape.value_length)):
        block = CACHE_TYPE_BLOCKS[cache_type][0]
        if size % block:
            raise UnsupportedError(
                f"--cache-type-{side} {cache_type} needs heads of a multiple of {block} values,"
                f" this model's have {size}: use f16"
            )
