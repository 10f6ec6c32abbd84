from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import pytest

from helpers import tiny_models
from ziggurat.runtime.bindings import Context, ContextSettings, Model
from ziggurat.runtime.errors import DecodeAborted, EngineClosedError, InvalidRequestError, ZigguratError
from ziggurat.runtime.evaluate import scoring
from ziggurat.runtime.evaluate.chunks import Chunks, Step, cut
from ziggurat.runtime.evaluate.decoder import ChunkDecoder, DecodeSettings
from ziggurat.runtime.evaluate.logits_file import LogitsFile, LogitsWriter, encode_rows
from ziggurat.runtime.evaluate.monitor import Monitor
from ziggurat.runtime.evaluate.reference import check_same_vocabulary, fingerprint, open_reference
from ziggurat.runtime.evaluate.text import TextResult, evaluate_text

TEXT = "the cat and the hat, an ant in the tent. " * 12
F32 = DecodeSettings(n_batch=128, n_ubatch=32, flash_attention="off", threads=1)


def evaluated(
    model: Model, chunks: Chunks, settings: DecodeSettings = F32, against: Path | None = None, threads: int = 1
) -> TextResult:
    with ChunkDecoder(model, chunks, settings, Monitor()) as decoder:
        if against is None:
            return evaluate_text(decoder, chunks, Monitor(), threads=threads)
        with open_reference(against, model.vocab, chunks, settings, Monitor()) as reference:
            return evaluate_text(decoder, chunks, Monitor(), reference=reference, threads=threads)


def plain_log_probs(model: Model, chunks: Chunks) -> np.ndarray:
    """Every scored position of every chunk on its own: whole chunk, one sequence, softmax in float64."""
    settings = ContextSettings(n_ctx=chunks.n_ctx, n_threads=1, flash_attention="off")
    rows = []
    with Context(model, settings) as context:
        for chunk in chunks.tokens.tolist():
            context.clear()
            batch = context.new_batch()
            for position, token in enumerate(chunk):
                read = chunks.bos if position == 0 and chunks.bos is not None else token
                batch.add([read], position, 0, output_last=True)
            context.decode(batch)
            for position in range(chunks.n_ctx // 2, chunks.n_ctx - 1):
                logits = context.logits(position).astype(np.float64)
                rows.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return np.array(rows)


@pytest.fixture(scope="module")
def other_path(models: Path) -> Path:
    """Another model with the vocabulary of ``spm_path``."""
    return tiny_models.write_model(models / "other.gguf", seed=1)


# --- chunks


def test_chunks_and_scored_positions_are_the_rule_of_llama_cpp(spm_model: Model) -> None:
    chunks = cut(spm_model.vocab, TEXT, 33)
    tokens = spm_model.vocab.tokenize(TEXT, add_special=True, parse_special=False)
    assert chunks.text_tokens == len(tokens)
    assert chunks.n_chunks == len(tokens) // 33
    assert chunks.tokens.reshape(-1).tolist() == tokens[: chunks.n_chunks * 33]
    assert chunks.bos == tokens[0] == spm_model.vocab.bos
    assert chunks.inputs(1, 0, 4) == [chunks.bos, *tokens[34:37]]
    assert chunks.first == 16  # n_ctx / 2, rounded down
    assert chunks.rows_per_chunk == 33 - 1 - 16
    step = Step(1, 2, 0, 33)
    assert chunks.targets(step).tolist() == tokens[33 + 17 : 66]


def test_limit_takes_the_first_chunks_and_more_than_there_are_is_no_error(spm_model: Model) -> None:
    assert cut(spm_model.vocab, TEXT, 32, 2).n_chunks == 2
    assert cut(spm_model.vocab, TEXT, 32, 10_000).n_chunks == cut(spm_model.vocab, TEXT, 32).n_chunks


def test_a_vocabulary_without_bos_keeps_the_first_token(bpe_model: Model) -> None:
    chunks = cut(bpe_model.vocab, TEXT, 32)
    assert chunks.bos is None
    assert chunks.inputs(0, 0, 3) == chunks.tokens[0, :3].tolist()


@pytest.mark.parametrize("n_batch", [7, 32, 33, 64, 500])
def test_steps_cover_every_position_once_in_order(n_batch: int) -> None:
    chunks = Chunks(np.arange(5 * 32, dtype=np.int32).reshape(5, 32), None, 160)
    read, scored = [], []
    for step in chunks.steps(n_batch):
        for chunk in range(step.chunk_start, step.chunk_end):
            read += chunks.inputs(chunk, step.start, step.end)
        scored += chunks.targets(step).tolist()
    assert sorted(read) == list(range(160))
    assert scored == [32 * chunk + position for chunk in range(5) for position in range(17, 32)]


# --- arithmetic


def test_figures_are_those_of_an_independent_computation(spm_model: Model, other_path: Path) -> None:
    chunks = cut(spm_model.vocab, TEXT, 40, 4)
    result = evaluated(spm_model, chunks, against=other_path, threads=2)
    figures = result.as_json()
    with Model(other_path) as other:
        reference = plain_log_probs(other, chunks)
    model = plain_log_probs(spm_model, chunks)
    targets = chunks.tokens[:, 21:].reshape(-1)
    rows = np.arange(len(targets))
    nll, base = -model[rows, targets], -reference[rows, targets]
    kld = (np.exp(reference) * (reference - model)).sum(axis=1)
    n = len(targets)
    assert figures["tokens"] == n == 4 * 19
    assert figures["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert figures["nll_se"] == pytest.approx(nll.std() / math.sqrt(n - 1), rel=1e-3)
    assert figures["perplexity_se"] == pytest.approx(math.exp(nll.mean()) * nll.std() / math.sqrt(n - 1), rel=1e-3)
    assert figures["reference_perplexity"] == pytest.approx(math.exp(base.mean()), rel=1e-4)
    assert figures["kl_divergence"] == pytest.approx(kld.mean(), rel=1e-3)
    assert figures["kl_divergence_se"] == pytest.approx(kld.std() / math.sqrt(n - 1), rel=1e-3)
    assert figures["kl_p99"] == pytest.approx(np.quantile(kld, 0.99), rel=1e-3)
    assert figures["kl_median"] == pytest.approx(np.median(kld), rel=1e-3)
    assert figures["kl_max"] == pytest.approx(kld.max(), rel=1e-3)
    assert figures["top1_agreement"] == (model.argmax(axis=1) == reference.argmax(axis=1)).mean()
    assert figures["log_probability_difference"] == pytest.approx((base - nll).mean(), rel=1e-3)
    assert figures["probability_difference"] == pytest.approx((np.exp(-nll) - np.exp(-base)).mean(), rel=1e-3)
    assert np.allclose(figures["nll_by_chunk"], nll.reshape(4, -1).mean(axis=1), rtol=1e-4)


@pytest.mark.parametrize("n_batch", [16, 40, 80, 1000])
def test_batching_changes_nothing_but_rounding(spm_model: Model, other_path: Path, n_batch: int) -> None:
    chunks = cut(spm_model.vocab, TEXT, 40, 5)
    one = evaluated(spm_model, chunks, DecodeSettings(n_batch=n_batch, flash_attention="off", threads=1), other_path)
    whole = evaluated(spm_model, chunks, against=other_path)
    assert np.allclose(one.scores.nll, whole.scores.nll, atol=2e-3)
    assert np.allclose(one.scores.kld, whole.scores.kld, atol=2e-3)


def test_a_model_against_itself_diverges_by_nothing(spm_model: Model, spm_path: Path) -> None:
    figures = evaluated(spm_model, cut(spm_model.vocab, TEXT, 64), against=spm_path).as_json()
    assert figures["kl_divergence"] == figures["kl_max"] == 0.0
    assert figures["top1_agreement"] == 1.0
    assert figures["perplexity"] == figures["reference_perplexity"]


def test_mean_and_errors() -> None:
    assert scoring.mean(np.array([1.0, 3.0])) == scoring.Estimate(2.0, 1.0)
    assert scoring.mean(np.array([5.0])) == scoring.Estimate(5.0, 0.0)
    assert scoring.accuracy(3, 4) == scoring.Estimate(0.75, math.sqrt(0.75 * 0.25 / 3))
    assert scoring.accuracy(1, 1) == scoring.Estimate(1.0, 0.0)
    huge = scoring.log_softmax(np.array([[1e30, 0.0]], np.float32))
    assert huge[0, 0] == 0.0


def test_logits_that_are_no_numbers_are_refused_and_ruled_out_tokens_are_not() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(ZigguratError, match="no numbers"):
            scoring.log_softmax(np.array([[0.0, bad, 1.0]], np.float32))
    rows = scoring.log_softmax(np.array([[0.0, -np.inf]], np.float32))
    assert scoring.score(rows, np.array([0], np.int32), rows).kld == 0.0


def test_a_floor_leaves_mass_out() -> None:
    reference = np.log(np.array([[0.5, 0.5 - 1e-3, 1e-3]], np.float32))
    model = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    targets = np.array([2], np.int32)
    whole = scoring.score(model, targets, reference).kld
    cut_off = scoring.score(model, targets, reference, floor=math.log(2e-3)).kld
    assert cut_off[0] - whole[0] == pytest.approx(1e-3 * math.log(0.25 / 1e-3), rel=1e-4)


def test_blocks_cover_all_rows() -> None:
    blocks = list(scoring.row_blocks(100, 10**6))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(100))
    assert len(blocks) > 10


# --- the logits file


@pytest.fixture
def saved(other_path: Path, tmp_path: Path) -> Path:
    """The log-probabilities of the other model on four chunks of 40."""
    path = tmp_path / "other.logits"
    with Model(other_path) as model:
        chunks = cut(model.vocab, TEXT, 40, 4)
        vocabulary = fingerprint(model.vocab)
        with (
            LogitsWriter(path, chunks, "other", vocabulary, model.vocab.n_tokens) as writer,
            ChunkDecoder(model, chunks, F32, Monitor()) as decoder,
        ):
            assert not path.exists()
            evaluate_text(decoder, chunks, Monitor(), writer=writer)
    assert [found.name for found in tmp_path.iterdir()] == ["other.logits"]
    return path


def test_a_saved_reference_gives_the_figures_of_the_model(spm_model: Model, other_path: Path, saved: Path) -> None:
    chunks = cut(spm_model.vocab, TEXT, 40, 4)
    from_model = evaluated(spm_model, chunks, against=other_path).scores
    from_file = evaluated(spm_model, chunks, against=saved).scores
    assert np.allclose(from_file.kld, from_model.kld, atol=1e-3)
    assert np.allclose(from_file.reference_nll, from_model.reference_nll, atol=1e-6)
    assert (from_file.same_top == from_model.same_top).all()
    in_parts = evaluated(spm_model, chunks, DecodeSettings(n_batch=16, flash_attention="off", threads=1), saved).scores
    assert np.allclose(in_parts.kld, from_model.kld, atol=3e-3)
    fewer = evaluated(spm_model, cut(spm_model.vocab, TEXT, 40, 3), against=saved).scores
    assert np.allclose(fewer.kld, from_file.kld[: 3 * 19], atol=2e-3)


def test_rows_keep_the_top_exactly_and_the_rest_within_half_a_step() -> None:
    logits = np.random.default_rng(0).normal(0, 6, (5, 300)).astype(np.float32)
    rows = scoring.log_softmax(logits)
    rows[0] = -math.log(300)  # all alike
    targets = rows.argmin(axis=1).astype(np.int32)
    fields = [("step", "f4"), ("top", "f4"), ("target", "f4"), ("codes", "u2", (300,))]
    data = np.frombuffer(encode_rows(rows, targets), np.dtype(fields))
    decoded = data["top"][:, None] - data["step"][:, None] * data["codes"].astype(np.float32)
    assert (decoded.max(axis=1) == rows.max(axis=1)).all()
    kept = rows > rows.max(axis=1, keepdims=True) - 24
    assert np.abs(decoded - rows)[kept].max() < 24 / 65535
    assert (data["target"] == rows.min(axis=1)).all()


def test_a_file_of_llama_cpp_is_read(spm_model: Model, other_path: Path, tmp_path: Path) -> None:
    chunks = cut(spm_model.vocab, TEXT, 40, 2)
    with Model(other_path) as other:
        rows = plain_log_probs(other, chunks)
    n_vocab = rows.shape[1]
    step = (rows.max(axis=1) - rows.min(axis=1)) / 65535
    stored = np.zeros(len(rows), np.dtype([("step", "f4"), ("low", "f4"), ("codes", "u2", (n_vocab + n_vocab % 2,))]))
    stored["step"], stored["low"] = step, rows.min(axis=1)
    stored["codes"][:, :n_vocab] = np.rint((rows - rows.min(axis=1, keepdims=True)) / step[:, None])
    head = np.array([40, n_vocab, 2], "<i4").tobytes()
    path = tmp_path / "base.kld"
    path.write_bytes(b"_logits_" + head + chunks.tokens.tobytes() + stored.tobytes())
    from_file = evaluated(spm_model, chunks, against=path).scores
    from_model = evaluated(spm_model, chunks, against=other_path).scores
    assert np.allclose(from_file.kld, from_model.kld, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "n_ctx", "limit", "message"),
    [
        (TEXT, 32, 4, "chunks of 40 tokens, not 32; use --ctx 40"),
        (TEXT, 40, 5, "has 4 chunks, not 5; use --chunks 4"),
        ("and " + TEXT, 40, 4, "is of another text"),
    ],
)
def test_a_file_of_another_text_or_context_is_refused(
    spm_model: Model, saved: Path, text: str, n_ctx: int, limit: int, message: str
) -> None:
    chunks = cut(spm_model.vocab, text, n_ctx, limit)
    with pytest.raises(InvalidRequestError, match=message):
        evaluated(spm_model, chunks, against=saved)


def test_a_file_of_another_vocabulary_is_refused(bpe_model: Model, spm_model: Model, saved: Path) -> None:
    chunks = cut(bpe_model.vocab, TEXT, 40, 4)
    with pytest.raises(InvalidRequestError, match="is of a vocabulary of"):
        evaluated(bpe_model, chunks, against=saved)
    with (
        LogitsFile(saved) as file,
        pytest.raises(InvalidRequestError, match=r"another vocabulary \(of the model other"),
    ):
        file.check(cut(spm_model.vocab, TEXT, 40, 4), "different", spm_model.vocab.n_tokens)


def test_a_damaged_file_is_refused(spm_model: Model, saved: Path) -> None:
    chunks = cut(spm_model.vocab, TEXT, 40, 4)
    good = saved.read_bytes()

    def refused(data: bytes) -> str:
        saved.write_bytes(data)
        with pytest.raises(InvalidRequestError) as caught:
            evaluated(spm_model, chunks, against=saved)
        return str(caught.value)

    assert "cut off or damaged" in refused(good[:-7])
    assert "header is damaged" in refused(good[:20] + b"\xff" + good[21:])
    assert "header is damaged" in refused(good[:9])
    assert "rows of chunk 3 are damaged" in refused(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
    tokens_at = good.index(chunks.tokens.tobytes())
    assert "tokens are damaged" in refused(good[:tokens_at] + b"\x02" + good[tokens_at + 1 :])


def test_an_interrupted_save_leaves_nothing(spm_model: Model, tmp_path: Path) -> None:
    chunks = cut(spm_model.vocab, TEXT, 40, 4)
    monitor = Monitor(lambda _what, done, _total: monitor.stop() if done else None)
    settings = DecodeSettings(n_batch=40, threads=1)
    with (
        pytest.raises((EngineClosedError, DecodeAborted)),
        LogitsWriter(tmp_path / "x", chunks, "m", "v", spm_model.vocab.n_tokens) as writer,
        ChunkDecoder(spm_model, chunks, settings, monitor) as decoder,
    ):
        evaluate_text(decoder, chunks, monitor, writer=writer)
    assert list(tmp_path.iterdir()) == []


def test_crc_is_over_the_tokens(saved: Path, spm_model: Model) -> None:
    with LogitsFile(saved) as file:
        assert file.header.tokens_crc32 == zlib.crc32(cut(spm_model.vocab, TEXT, 40, 4).tokens.tobytes())


# --- vocabularies


def test_the_first_different_token_is_named(spm_model: Model, bpe_model: Model, models: Path) -> None:
    check_same_vocabulary(spm_model.vocab, spm_model.vocab, "ref")
    with pytest.raises(InvalidRequestError, match="ref: the reference has another vocabulary .*token 0 is 'Ā'"):
        check_same_vocabulary(spm_model.vocab, bpe_model.vocab, "ref")
    tokens = tiny_models.spm_tokens()
    longer = tiny_models.Tokens(
        "llama", [*tokens.texts, "▁zebra"], [*tokens.scores, -50.0], [*tokens.types, tiny_models.NORMAL], 1, 2
    )
    with Model(tiny_models.write_model(models / "longer.gguf", tokens=longer), vocab_only=True) as other:
        last = spm_model.vocab.n_tokens
        with pytest.raises(InvalidRequestError, match=rf"token {last} \('▁zebra'\) exists in the reference only"):
            check_same_vocabulary(spm_model.vocab, other.vocab, "ref")
        with pytest.raises(InvalidRequestError, match=rf"token {last} \('▁zebra'\) exists in the model only"):
            check_same_vocabulary(other.vocab, spm_model.vocab, "ref")
