"""The exact-copy model gives the right answer, for the reason it claims to, and not without its needle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.families import reference
from helpers.stock import nmse
from models.copy_code import make_code
from models.copy_construction import to_bf16_values
from models.exact_copy import (
    BOS,
    FIRST_WORD,
    KEY_ERRORS,
    CopyModel,
    certify,
    longest_certain,
    needle,
    needle_prompt,
    write_folder,
    write_gguf,
)
from models.needle_grid import Cache, Copier
from models.outlier_measure import load
from ziggurat.converter.pipeline import ConvertSettings, convert

# The shapes that the runtime has to know: GQA, MQA, MHA; every head size; the copying blocks apart and at the ends.
SHAPES = {
    "gqa": CopyModel(),
    "mqa_32": CopyModel(head_dim=32, n_heads=2, n_kv_heads=1, n_layers=2, copy_layers=(0, 1), hidden_size=128),
    "mha_128": CopyModel(head_dim=128, n_heads=2, n_layers=3, copy_layers=(0, 2), hidden_size=512, ffn_size=64),
    "thirds_64": CopyModel(n_heads=6, n_kv_heads=2, n_layers=5, copy_layers=(1, 4), filler_noise=0.25, vocab_size=4000),
}


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("copy")
    for name, model in SHAPES.items():
        write_gguf(model, folder / f"{name}.gguf")
    return {name: folder / f"{name}.gguf" for name in SHAPES}


@pytest.fixture(scope="module")
def copier(ggufs: dict[str, Path]) -> Iterator[Copier]:
    with Copier(ggufs["gqa"]) as loaded:
        yield loaded


@pytest.mark.parametrize("ubatch", [32, 512])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("cache_type", ["f32", "f16"])
def test_finds_every_needle(copier: Copier, cache_type: str, flash: bool, ubatch: int) -> None:
    cache = Cache(cache_type, flash, ubatch)
    for length in (64, 512):
        for depth in (0.0, 0.3, 0.7, 1.0):
            made = needle(length, depth, 7, n_pairs=4, value_tokens=3)
            assert copier.greedy(made.tokens, 3, cache) == made.answer, (length, depth)


@pytest.mark.parametrize(("depth", "cache"), [(0.0, Cache("f16", True, 512)), (0.5, Cache("f32", False, 512))])
def test_finds_needles_at_4096(ggufs: dict[str, Path], depth: float, cache: Cache) -> None:
    tokens, answer = needle_prompt(4096, depth, 1, n_pairs=8, value_tokens=2)
    with Copier(ggufs["mqa_32"]) as copier:
        assert copier.greedy(tokens, 2, cache) == answer


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "gqa"])
def test_every_shape(ggufs: dict[str, Path], shape: str) -> None:
    with Copier(ggufs[shape]) as copier:
        for cache in (Cache("f32", False, 64), Cache("q8_0", True, 512)):
            made = needle(300, 0.4, 3, n_pairs=3, value_tokens=2, vocab_size=SHAPES[shape].vocab_size)
            assert copier.greedy(made.tokens, 2, cache) == made.answer, cache


def test_nothing_is_found_without_the_needle(copier: Copier) -> None:
    """Forgetting the needle's rows must show, and forgetting as many others must not."""
    for seed in range(4):
        made = needle(256, 0.25, seed, value_tokens=2)
        others = range(made.rows.stop + 60, made.rows.stop + 63)
        assert copier.greedy(made.tokens, 1, Cache("f32", False), forget=made.rows) != made.answer[:1]
        assert copier.greedy(made.tokens, 2, Cache("f32", False), forget=others) == made.answer


@pytest.mark.parametrize("shape", ["gqa", "mqa_32"])
def test_attention_is_what_the_certificate_says(shape: str, tmp_path: Path) -> None:
    model = SHAPES[shape]
    write_folder(model, tmp_path, "f32")
    made = needle(200, 0.5, 0, n_pairs=3)
    loaded = load(tmp_path)
    loaded.set_attn_implementation("eager")
    with torch.no_grad():
        output = loaded(torch.tensor([made.tokens]), output_attentions=True, use_cache=False)
    first, second = (output.attentions[layer][0] for layer in model.copy_layers)
    certificate = certify(model, len(made.tokens))
    assert certificate.previous_probability > 1 - 1e-9
    assert certificate.match_probability > 1 - 1e-9
    # (heads, position, key): one before, everywhere; the needle's value, at the end; F32 sums take up to 1e-5 away
    before = torch.diagonal(first, offset=-1, dim1=1, dim2=2)
    assert float(before.min()) > certificate.previous_probability - 1e-5
    assert float(second[:, -1, made.start + 1].min()) > certificate.match_probability - 1e-5
    best, next_best = output.logits[0, -1].topk(2).values.tolist()
    assert best - next_best > certificate.logit_gap - 1e-3


def test_certificate_over_context_and_cache_types() -> None:
    for shape in SHAPES.values():
        model = replace(shape, filler_noise=0.0)
        for cache in ("f32", "f16", "bf16", "q8_0"):
            assert certify(model, model.context, KEY_ERRORS[cache]).certain, (model, cache)
        assert not certify(model, model.context, KEY_ERRORS["q4_0"]).certain
    # laid out for 1000 positions, the match is lost some way behind them
    short = CopyModel(context=1000)
    assert 1000 < longest_certain(short) < 1 << 20


def test_noise_is_not_certified() -> None:
    with pytest.raises(ValueError, match="noise"):
        certify(SHAPES["thirds_64"], 64)


def test_certificate_knows_a_model_that_fails() -> None:
    """With a margin of a few nats the leak over many keys wins, in the bound and in fact."""
    weak = CopyModel(margin=3.0)
    assert not certify(weak, 4096).certain
    assert 0 < longest_certain(CopyModel(margin=9.0)) < 65536


def test_folder_converts_to_the_gguf(ggufs: dict[str, Path], tmp_path: Path) -> None:
    """Both ways of writing give the same model, and text and ids map one to one."""
    write_folder(SHAPES["gqa"], tmp_path / "hf", "bf16")
    convert(tmp_path / "hf", tmp_path / "out.gguf", ConvertSettings(type="f32"))
    tokens = needle(64, 0.5, 0).tokens
    with Copier(tmp_path / "out.gguf") as converted, Copier(ggufs["gqa"]) as written:
        logits = converted.logits(tokens)
        assert np.array_equal(logits, written.logits(tokens))
        assert nmse(logits, reference(tmp_path / "hf", tokens).logits.numpy()) < 1e-6
        text = b"".join(converted.piece(token) for token in tokens[1:]).decode()
        for model in (converted, written):
            assert model.tokenize(text, add_special=True) == tokens
            assert model.tokenize(" Ünicode 7\n") == written.tokenize(" Ünicode 7\n")
        assert converted.tokenize("a") == [converted.tokenize("ba")[1]]


def test_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_gguf(CopyModel(seed=seed, vocab_size=400, ffn_size=32), tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_code_keeps_its_distance() -> None:
    code = make_code(500, 24, 0)
    different = (code.words.shape[1] - code.words @ code.words.T) / 2
    assert different[~np.eye(500, dtype=bool)].min() >= code.distance >= 4


def test_bf16_values_round_to_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7, 3e-41, 1e38], np.float32)
    assert np.array_equal(to_bf16_values(values), torch.from_numpy(values).bfloat16().float().numpy())


@pytest.mark.parametrize(("depth", "start"), [(0.0, 1), (1.0, 59), (0.5, 30)])
def test_needle_prompt(depth: float, start: int) -> None:
    made = needle(64, depth, 0, n_pairs=5, value_tokens=3)
    assert len(made.tokens) == 64
    assert (made.tokens[0], made.start) == (BOS, start)
    assert [made.tokens[i] for i in made.rows] == [made.tokens[-1], *made.answer]
    assert made.tokens.count(made.tokens[-1]) == 2
    assert all(made.tokens.count(token) == 1 for token in made.answer)
    assert min(made.tokens[1:]) >= FIRST_WORD
    assert needle_prompt(64, depth, 0, n_pairs=5, value_tokens=3) == (made.tokens, made.answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 3}, "multiple of n_kv_heads"),
        ({"copy_layers": (2, 1)}, "copy_layers"),
        ({"vocab_size": 100}, "vocab_size"),
        ({"head_dim": 16, "n_kv_heads": 1}, "slow pairs"),
        ({"rope_theta": 10.0}, "rope_theta"),
    ],
)
def test_sizes_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CopyModel(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1.5}, "depth"),
        ({"length": 16, "n_pairs": 8}, "too few"),
        ({"length": 9000, "n_pairs": 900}, "different tokens"),
    ],
)
def test_prompts_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needle(**{"length": 64, "depth": 0.5, "seed": 0, **options})  # type: ignore[arg-type]
