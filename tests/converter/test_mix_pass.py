"""Losses of the streamed backward pass, against gradients of the whole model; what they predict; resuming."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.deep import build_deep, load, random_tokens
from ziggurat.converter import embedding, ggml, linears, mix_losses, upstream
from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.checkpoint import open_checkpoint
from ziggurat.converter.errors import CalibrationError
from ziggurat.converter.matrices import matrices
from ziggurat.converter.mix_losses import LossSettings, Quantizing, systematic
from ziggurat.converter.mix_pass import MixSettings, measure
from ziggurat.converter.tune import TunedModel

MakeCheckpoint = Callable[..., Path]
Q2_K, Q4_K = 10, 12
TYPES = (Q2_K, Q4_K)
TOKENS = random_tokens(5, 24)
SETTINGS = CalibrateSettings(batch_tokens=72, threads=1)
ALL_ROWS = MixSettings(losses=LossSettings(share=1.0, most_rows=1 << 30, head_rows=1 << 30))


@dataclasses.dataclass(frozen=True)
class Model:
    folder: Path
    model: TunedModel
    wanted: dict[str, Quantizing]

    def measure(self, work: Path, settings: MixSettings = ALL_ROWS, tokens: CalibrationTokens = TOKENS) -> Any:
        return measure(self.model, self.wanted, tokens, settings, dataclasses.replace(SETTINGS, work=work))


def open_model(folder: Path, types: tuple[int, ...] = TYPES) -> Model:
    for type_id in types:
        ggml.prepare(type_id)
    checkpoint = open_checkpoint(folder)
    plan = upstream.plan(checkpoint, "bf16")
    tensors = linears.tensor_names(checkpoint, plan)
    shapes = {t.name: t.shape for t in plan.tensors if not t.shape[-1] % mix_losses.BLOCK and "gate_inp" not in t.name}
    wanted = {name: Quantizing(types) for name in [*tensors.values(), embedding.TENSOR] if name in shapes}
    return Model(folder, TunedModel(Blocks(checkpoint), tensors), wanted)


def whole_gradients(folder: Path) -> tuple[dict[str, list[torch.Tensor]], torch.Tensor]:
    """Of each sequence, the gradients by parameter of the log-probability of labels drawn as the pass draws them."""
    model = load(folder)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[torch.Tensor]] = {}
    shares = []
    for sequence in TOKENS.ids:
        model.zero_grad()
        log_p = model(torch.from_numpy(sequence[None].astype(np.int64)), use_cache=False).logits[0].log_softmax(-1)
        p = log_p.detach().exp()
        labels = torch.multinomial(p, 1, generator=generator)
        log_p.gather(-1, labels).sum().backward()
        shares.append(p * (1 - p))
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name, []).append(parameter.grad.clone())
    return found, torch.cat(shares)


def error(matrix: torch.Tensor, type_id: int) -> torch.Tensor:
    values = np.ascontiguousarray(matrix.detach().float().numpy())
    packed = np.empty((len(values), ggml.row_bytes(type_id, values.shape[1])), np.uint8)
    ggml.quantize_rows(type_id, values, packed)
    return torch.from_numpy(ggml.dequantize_rows(type_id, packed, values.shape[1]) - values)


def parameter_of(layer: str) -> tuple[str, slice]:
    """Where transformers keeps a layer's weight, and which rows of it: experts are fused."""
    for part, (fused, rows) in {
        "w1": ("gate_up_proj", slice(None, 512)),
        "w3": ("gate_up_proj", slice(512, None)),
        "w2": ("down_proj", slice(None)),
    }.items():
        if layer.endswith(f".experts.{part}"):
            return layer.removesuffix(part).replace("block_sparse_moe", "mlp") + fused, rows
    return f"{layer}.weight", slice(None)


@dataclasses.dataclass(frozen=True)
class Measured:
    case: Model
    losses: dict[str, Any]
    gradients: dict[str, list[torch.Tensor]]
    shares: torch.Tensor


@pytest.fixture(scope="module")
def measured(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Measured]:
    """Give what a family's model loses, and its gradients."""

    @functools.cache
    def make(name: str) -> Measured:
        case = open_model(checkpoint(name, dtype="float32"))
        losses = case.measure(tmp_path_factory.mktemp("whole"))
        return Measured(case, losses, *whole_gradients(case.folder))

    return make


@pytest.mark.parametrize("name", ["llama_gqa", "phi3", "gpt2", "gemma2", "gemma3", "mixtral"])
def test_losses_are_those_of_the_whole_models_gradients(name: str, measured: Callable[[str], Measured]) -> None:
    this = measured(name)
    case, losses, gradients = this.case, this.losses, this.gradients
    layers = {tensor: layer for layer, tensor in case.model.tensors.items()}
    assert set(losses) == set(case.wanted)
    checked = 0
    for block in (case.model.blocks.block(0), case.model.blocks.block(1)):
        for layer, views in matrices(block).items():
            tensor = case.model.tensors.get(layer)
            if tensor not in case.wanted:
                continue
            parameter, rows = parameter_of(layers[tensor])
            for i, type_id in enumerate(TYPES):
                wanted = 0.0
                for expert, view in enumerate(views):
                    e = error(view, type_id)
                    for g in gradients[parameter]:
                        g = g[expert][rows] if g.ndim == 3 else g.T if name == "gpt2" else g
                        wanted += float((g * e).double().sum(1).square().sum())
                assert losses[tensor][i] == pytest.approx(wanted / (2 * TOKENS.ids.size), rel=2e-3)
                checked += 1
    assert checked >= 2 * 2 * 4


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_losses_of_embedding_and_head(name: str, measured: Callable[[str], Measured]) -> None:
    """The head's are exact means over labels; a tied matrix has both."""
    this = measured(name)
    case, losses, gradients, shares = this.case, this.losses, this.gradients, this.shares
    blocks = case.model.blocks
    read, rows = head_inputs(case.folder), blocks.embedding_rows(torch.arange(blocks.n_vocab))
    for i, type_id in enumerate(TYPES):
        of_head = float((shares * (read @ error(blocks.head_matrix, type_id).T).square()).sum(1).mean()) / 2
        if name == "gpt2":
            assert losses[embedding.TENSOR][i] > of_head
            assert linears.HEAD_TENSOR not in losses
            continue
        assert losses[linears.HEAD_TENSOR][i] == pytest.approx(of_head, rel=2e-3)
        sums = [
            float((g * error(rows, type_id)).double().sum(1).square().sum())
            for g in gradients["model.embed_tokens.weight"]
        ]
        assert losses[embedding.TENSOR][i] == pytest.approx(sum(sums) / (2 * TOKENS.ids.size), rel=2e-3)


def head_inputs(folder: Path) -> torch.Tensor:
    model, seen = load(folder), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(torch.from_numpy(TOKENS.ids.astype(np.int64)), use_cache=False)
    return seen[0].flatten(0, 1)


def test_embeddings_that_are_multiplied(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Gemma's are, by the root of their width: the streamed gradient is at what it makes of them."""
    from ziggurat.converter.mix_pass import _embedding_factor

    blocks = Blocks(open_checkpoint(checkpoint("gemma3")))
    unique = np.unique(TOKENS.ids)
    rows = blocks.embedding_rows(torch.from_numpy(unique.astype(np.int64)))
    states = blocks.embed(torch.from_numpy(TOKENS.ids.astype(np.int64)))
    assert _embedding_factor(TOKENS.ids, unique, rows, states) == pytest.approx(blocks.n_embd**0.5, rel=1e-2)
    assert _embedding_factor(TOKENS.ids[:1], unique, rows, states[:1]) == pytest.approx(blocks.n_embd**0.5, rel=1e-2)


def test_it_predicts_the_divergence(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Of the model with one tensor quantized, from itself."""
    case = open_model(checkpoint("llama_gqa", dtype="float32"), (Q4_K,))
    losses = case.measure(tmp_path)
    model = load(case.folder)
    ids = torch.from_numpy(TOKENS.ids.astype(np.int64))
    ratios = []
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits.double().log_softmax(-1)
        for layer, tensor in case.model.tensors.items():
            weight = model.get_parameter(f"{layer}.weight")
            e = error(weight, Q4_K)
            weight.add_(e)
            changed = model(ids, use_cache=False).logits.double().log_softmax(-1)
            weight.sub_(e)
            ratios.append(losses[tensor][0] / float((whole.exp() * (whole - changed)).sum(-1).mean()))
    assert 0.8 < np.exp(np.mean(np.log(ratios))) < 1.25
    assert np.std(np.log(ratios)) < 0.5


def test_a_sample_of_rows_tells_about_the_same(measured: Callable[[str], Measured], tmp_path: Path) -> None:
    case, exact = measured("llama_gqa").case, measured("llama_gqa").losses
    sample = MixSettings(losses=LossSettings(share=0.25, least_rows=16, least_values=1, head_rows=64))
    few = case.measure(tmp_path / "few", sample)
    assert np.std([np.log(few[name] / exact[name]) for name in exact]) < 0.25


def test_systematic_sampling() -> None:
    rng = np.random.default_rng(0)
    mass = rng.random(1000) ** 4
    places, weights = systematic(mass, 100)
    assert len(places) <= 100 and (np.diff(places) > 0).all()
    assert (mass[places] * weights).sum() == pytest.approx(mass.sum())
    values = mass * rng.uniform(0.5, 1.5, 1000)
    assert (values[places] * weights).sum() == pytest.approx(values.sum(), rel=0.1)
    np.testing.assert_array_equal(systematic(mass, 1000)[1], 1)
    assert systematic(np.zeros(10), 5)[1].sum() == 10


def test_interrupted_it_goes_on(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = build_deep(tmp_path_factory.mktemp("deep") / "model", 3)
    whole = open_model(folder).measure(tmp_path / "whole")

    class Stop:
        def __init__(self, steps: int) -> None:
            self.left = steps

        def stage(self, name: str, total: int) -> None: ...

        def step(self, count: int, what: str) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    case, how = open_model(folder), dataclasses.replace(SETTINGS, work=tmp_path / "parts")
    for steps in (3, 5, 1, 1):  # in both passes; every try gets further
        with pytest.raises(KeyboardInterrupt):
            measure(case.model, case.wanted, TOKENS, ALL_ROWS, how, Stop(steps))
    resumed = measure(case.model, case.wanted, TOKENS, ALL_ROWS, how)
    assert set(resumed) == set(whole)
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values)
    with pytest.raises(CalibrationError, match="how"):
        measure(case.model, case.wanted, TOKENS, dataclasses.replace(ALL_ROWS, seed=1), how)


def test_in_a_coarse_model_other_gradients_but_the_same_errors(
    measured: Callable[[str], Measured], tmp_path: Path
) -> None:
    """The head's error is measured on what the coarse blocks give, the blocks' weights are whole again afterwards."""
    case, fine = measured("llama_gqa").case, measured("llama_gqa").losses
    coarse = case.measure(tmp_path / "coarse", dataclasses.replace(ALL_ROWS, coarse=True))
    ratios = np.log([coarse[name] / fine[name] for name in fine])
    assert 0 < np.abs(ratios).max() < 1.5
    # of two types the errors are the same: a matrix's losses differ by one factor, about, which is the gradients'
    assert np.abs(ratios[:, 0] - ratios[:, 1]).max() < 0.5


def test_scaled_columns_lose_what_the_scaled_quantizer_makes(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    case = open_model(checkpoint("llama_gqa", dtype="float32"), (Q4_K,))
    plain = case.measure(tmp_path / "plain")
    name = "blk.1.ffn_up.weight"
    scales = np.exp(np.random.default_rng(0).normal(0, 1.0, (1, 256))).astype(np.float32)
    case.wanted[name] = Quantizing((Q4_K,), None, scales)
    scaled = case.measure(tmp_path / "scaled")
    assert scaled[name][0] > 1.2 * plain[name][0]  # random scales spread what shares a block
    assert all(scaled[other][0] == plain[other][0] for other in plain if other != name)


def test_embedding_importance_is_what_the_first_block_reads(checkpoint: MakeCheckpoint) -> None:
    blocks = Blocks(open_checkpoint(checkpoint("llama_gqa", dtype="float32")))
    block = blocks.block(0)
    layer, scale = block.layer, torch.exp(torch.linspace(-2, 2, blocks.n_embd))
    layer.input_layernorm.weight.data *= scale
    attention = layer.self_attn
    wanted = layer.input_layernorm.weight.square() * sum(
        m.weight.square().sum(0) for m in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    hidden = blocks.embed(torch.from_numpy(random_tokens(8, 64).ids.astype(np.int64)))
    got = embedding.column_importance(block, hidden)
    assert np.corrcoef(np.log(got), wanted.log().numpy())[0, 1] > 0.97
    np.testing.assert_array_equal(got, embedding.column_importance(block, hidden))
