"""Embeddings against other implementations of the same models, and what makes none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from helpers import bert_models, lora_files, tiny_models, unfit_models
from helpers.kv_reference import ReferenceSequence, Weights
from helpers.tiny_models import Shape
from ziggurat.runtime import lora, plan
from ziggurat.runtime.bindings import Context, ContextSettings, Model, measure
from ziggurat.runtime.engine.embedding import Embedder, embedding_settings
from ziggurat.runtime.engine.llama_engine import LlamaEngine
from ziggurat.runtime.engine.loader import Loaded, load
from ziggurat.runtime.engine.settings import EngineSettings
from ziggurat.runtime.errors import (
    ContextError,
    DecodeAborted,
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
    TokenError,
    UnsupportedError,
)
from ziggurat.runtime.gguf_file import read_gguf
from ziggurat.runtime.lora import LoraAdapter

SETTINGS = ContextSettings(n_ctx=512, n_ubatch=64, n_threads=1, type_k="f32", type_v="f32", flash_attention="off")
POOL: dict[str, Callable[[Any], Any]] = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "last": lambda states: states[-1],
}
LENGTHS = (5, 40, 1, 64, 9, 9, 30, 17, *[2] * 20)


def texts(lengths: tuple[int, ...], low: int, high: int) -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [[int(token) for token in rng.integers(low, high, length)] for length in lengths]


def normalized(rows: list[Any]) -> Any:
    stacked = np.stack(rows)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def vectors(embedder: Embedder, tokens: list[list[int]]) -> Any:
    job = embedder.start(tokens)
    while not job.step():
        pass
    result = job.result()
    assert result.prompt_tokens == sum(map(len, tokens))
    assert result.vectors.dtype == np.float32
    return result.vectors


@pytest.fixture
def on_decode(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that are computed."""
    sizes: list[int] = []
    original = Context.decode

    def decode(context: Context, batch: Any) -> None:
        sizes.append(len(batch))
        original(context, batch)

    monkeypatch.setattr(Context, "decode", decode)
    return sizes


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "bert.gguf"
    bert_models.write_bert(path, gguf.PoolingType.MEAN)
    return path


# --- what is computed


@pytest.mark.parametrize("pooling", POOL)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_decoders_against_the_reference(arch: str, pooling: str, tmp_path: Path) -> None:
    path = tiny_models.write_model(tmp_path / "model.gguf", Shape(arch=arch))
    tokens = texts(LENGTHS, 3, 290)
    weights = Weights(path)
    wanted = normalized([POOL[pooling](ReferenceSequence(weights).states(text)) for text in tokens])
    with Model(path) as model:
        embedder = Embedder(model, SETTINGS, pooling)
        assert (embedder.size, embedder.pooling) == (64, pooling)
        found = vectors(embedder, tokens)
        assert found.shape == (len(tokens), 64)
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
        assert ((found - wanted) ** 2).sum() < 1e-6 * len(tokens)
        # alone and in another order they are the same
        assert np.abs(vectors(embedder, tokens[::-1])[::-1] - found).max() < 1e-5
        assert np.abs(np.concatenate([vectors(embedder, [text]) for text in tokens]) - found).max() < 1e-5


@pytest.mark.parametrize("pooling", POOL)
def test_bert_against_transformers(pooling: str, tmp_path: Path) -> None:
    kind = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS, "last": gguf.PoolingType.LAST}[pooling]
    reference = bert_models.write_bert(tmp_path / "bert.gguf", kind)
    tokens = texts((7, 1, 48, 3, 12, 30, 5), 5, bert_models.N_VOCAB)
    wanted = normalized([POOL[pooling](bert_models.states(reference, text)) for text in tokens])
    with Model(tmp_path / "bert.gguf") as model:
        embedder = Embedder(model, replace(SETTINGS, n_ubatch=128))
        assert embedder.pooling == pooling
        assert not embedder.context.keeps_rows
        found = vectors(embedder, tokens)
    assert ((found - wanted) ** 2).sum() < 1e-5  # the CPU's GELU is a table of halves


def test_bert_tokens_have_their_frame(bert: Path) -> None:
    with Model(bert) as model:
        embedder = Embedder(model, SETTINGS)
        frame = embedder.encode("")
        assert frame == [bert_models.CLS, bert_models.SEP]
        assert embedder.encode("the hats") == [frame[0], 5, 7, 12, frame[1]]


def test_gemmas_windows_and_recurrent_models(tmp_path: Path) -> None:
    """Layers that see a window only, and states that a batch has to be cut into sequences for."""
    windows = tiny_models.write_model(
        tmp_path / "gemma3.gguf", Shape(arch="gemma3", n_layer=6, head_dim=32, sliding_window=16)
    )
    for path in (windows, unfit_models.write_mamba(tmp_path / "mamba.gguf")):
        tokens = texts((30, 3, 17, 64, 5), 3, 290)
        with Model(path) as model:
            embedder = Embedder(model, SETTINGS, "mean")
            together = vectors(embedder, tokens)
            alone = np.concatenate([vectors(embedder, [text]) for text in tokens])
        assert np.abs(together - alone).max() < 1e-4
        assert np.abs(together[0] - together[1]).max() > 1e-2


def test_adapters_change_embeddings(spm_path: Path, tmp_path: Path) -> None:
    pairs = lora_files.random_pairs(spm_path)
    adapter = lora_files.write_adapter(tmp_path / "a.gguf", pairs, alpha=4.0)
    merged = lora_files.merge(tmp_path / "merged.gguf", spm_path, [(pairs, 1.0)])
    found = []
    for path, adapters in ((spm_path, [LoraAdapter(adapter)]), (merged, []), (spm_path, [])):
        with Model(path) as model:
            lora.add_adapters(model, adapters)
            found.append(vectors(Embedder(model, SETTINGS, "mean"), texts((20,), 3, 290)))
    assert np.abs(found[0] - found[1]).max() < 1e-4
    assert np.abs(found[0] - found[2]).max() > 1e-2


# --- batches


def test_texts_share_batches(spm_model: Model, on_decode: list[int]) -> None:
    embedder = Embedder(spm_model, SETTINGS, "mean")
    vectors(embedder, texts(LENGTHS, 3, 290))
    assert on_decode == [46, 64, 48, 47, 10]  # of 64 tokens and 16 texts at most
    embedder.close()


def test_long_texts_are_read_in_parts(spm_path: Path, on_decode: list[int]) -> None:
    """Where the last token's state is all that counts."""
    tokens = texts((10, 500, 20), 3, 290)
    weights = Weights(spm_path)
    wanted = normalized([ReferenceSequence(weights).states(text)[-1] for text in tokens])
    with Model(spm_path) as model:
        embedder = Embedder(model, SETTINGS, "last")
        assert embedder.limit == 512
        assert ((vectors(embedder, tokens) - wanted) ** 2).sum() < 3e-6
        assert on_decode == [10, *[64] * 7, 52, 20]


@pytest.mark.parametrize("at", [0, 2, 7])
def test_an_aborted_step_is_done_again(spm_model: Model, at: int) -> None:
    tokens = texts((10, 500, 20), 3, 290)
    embedder = Embedder(spm_model, SETTINGS, "last")
    wanted = vectors(embedder, tokens)
    job = embedder.start(tokens)
    for _ in range(at):
        job.step()
    embedder.context.abort.set()
    with pytest.raises(DecodeAborted):
        job.step()
    embedder.context.abort.clear()
    while not job.step():
        pass
    assert np.abs(job.result().vectors - wanted).max() < 1e-6
    abandoned = embedder.start(tokens)
    abandoned.step()
    abandoned.step()
    assert np.array_equal(vectors(embedder, tokens), wanted)
    embedder.close()


# --- what is refused


def test_texts_that_do_not_fit(spm_model: Model, bert: Path) -> None:
    embedder = Embedder(spm_model, SETTINGS, "mean")
    with pytest.raises(UnsupportedError, match="the text has 65 tokens and 64 are computed at once, as mean pooling"):
        embedder.start(texts((3, 65), 3, 290))
    embedder.close()
    embedder = Embedder(spm_model, SETTINGS, "last")
    with pytest.raises(PromptTooLongError, match="the prompt has 513 tokens and the context 512"):
        embedder.start(texts((513,), 3, 290))
    embedder.close()
    with Model(bert) as model:
        embedder = Embedder(model, SETTINGS)
        assert embedder.limit == bert_models.N_CTX
        with pytest.raises(PromptTooLongError, match="has 49 tokens and the context 48"):
            embedder.start(texts((49,), 5, 17))


def test_texts_that_are_none(spm_model: Model) -> None:
    embedder = Embedder(spm_model, SETTINGS, "mean")
    for given, kind, message in (
        ([], InvalidRequestError, "there are no texts"),
        ([[5], []], InvalidRequestError, "text 1 has no tokens"),
        ([[5], [70000]], TokenError, "token 70000"),
    ):
        with pytest.raises(kind, match=message):
            embedder.start(given)  # type: ignore[arg-type]
    embedder.close()


def test_poolings_that_make_no_embeddings(spm_model: Model, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="the model's pooling is none, .* choose one of mean, cls, last"):
        Embedder(spm_model, SETTINGS)
    for pooling in ("none", "rank"):
        with pytest.raises(UnsupportedError, match=f"pooling is {pooling}"):
            Embedder(spm_model, SETTINGS, pooling)
    with pytest.raises(InvalidRequestError, match="pooling max is unknown"):
        Embedder(spm_model, SETTINGS, "max")
    bert_models.write_bert(tmp_path / "rank.gguf", gguf.PoolingType.RANK)
    with Model(tmp_path / "rank.gguf") as model, pytest.raises(UnsupportedError, match="pooling is rank"):
        Embedder(model, SETTINGS)


def test_a_context_refuses_what_the_library_aborts_on(bert: Path) -> None:
    with Model(bert) as model, Context(model, replace(SETTINGS, n_ubatch=16)) as context:
        batch = context.new_batch()
        batch.add([5] * 17, 0, 0, output_last=False)
        with pytest.raises(ContextError, match="17 tokens have to be computed at once, and here 16 are"):
            context.decode(batch)


def test_what_is_wanted_no_more_is_not_computed(bert: Path) -> None:
    with LlamaEngine(bert, EngineSettings(n_ctx=64, threads=1, embeddings=True)) as engine:
        engine.load()
        answers = iter((True, True, False))
        with pytest.raises(EngineError, match="wanted no more"):
            engine.embed([[5, 6, 7]] * 200, wanted=lambda: next(answers))
        assert engine.embed([[5, 6, 7]]).prompt_tokens == 3


# --- loading


@pytest.fixture
def loaded() -> Iterator[Callable[..., Loaded]]:
    open_models: list[Model] = []

    def opened(path: Path, **settings: Any) -> Loaded:
        found = load(path, EngineSettings(n_ctx=256, threads=1, **settings), lambda _: True)
        open_models.append(found.model)
        return found

    yield opened
    for model in open_models:
        model.close()


def test_loading(loaded: Callable[..., Loaded], spm_path: Path, bert: Path) -> None:
    decoder = loaded(spm_path, embeddings=True, pooling="last")
    assert decoder.embedder is not None
    assert (decoder.info.generates_text, decoder.info.embedding_size) == (True, 64)
    encoder = loaded(bert, embeddings=True)
    assert encoder.embedder is not None
    assert (encoder.info.generates_text, encoder.info.embedding_size, encoder.info.kv_bytes) == (False, 64, 0)
    assert vectors(encoder.embedder, [encoder.embedder.encode("the man")]).shape == (1, 64)
    without = loaded(spm_path)
    assert (without.embedder, without.info.embedding_size) == (None, None)
    with pytest.raises(UnsupportedError, match="a bert model does not generate text token by token; it makes embed"):
        loaded(bert)
    with pytest.raises(UnsupportedError, match="the model's pooling is none"):
        loaded(spm_path, embeddings=True)
    with pytest.raises(InvalidRequestError, match="pooling mean is for embeddings"):
        EngineSettings(pooling="mean")


# --- memory


@pytest.mark.parametrize("n_ubatch", [64, 512])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_the_plan_is_what_the_library_allocates(arch: str, n_ubatch: int, tmp_path: Path) -> None:
    shape = Shape(arch=arch, n_embd=256, head_dim=32, n_head=8, n_ff=704, n_layer=6, sliding_window=64)
    path = tiny_models.write_model(tmp_path / "m.gguf", shape)
    settings = embedding_settings(replace(SETTINGS, n_ctx=1024, n_ubatch=n_ubatch), "mean")
    planned = plan.plan_memory(plan.outline(read_gguf(path)), settings)
    with Model(path) as model, Context(model, settings) as context:
        rows = measure(context)
    assert planned.context == sum(row.context for row in rows)
    assert planned.compute == pytest.approx(sum(row.compute for row in rows), rel=0.12)


def test_both_contexts_are_planned(spm_path: Path) -> None:
    outline = plan.outline(read_gguf(spm_path))
    alone = plan.plan_memory(outline, SETTINGS)
    other = plan.plan_memory(outline, embedding_settings(SETTINGS, "mean"))
    both = alone.beside(other)
    assert both.weights == alone.weights
    assert both.total == alone.total + other.total - other.weights
    assert other.output == (outline.n_vocab + 64) * 64 * 4
    assert both.kv_per_layer == alone.kv_per_layer
