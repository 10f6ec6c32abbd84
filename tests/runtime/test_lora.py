"""LoRA adapters: what is computed with them is what the merged weights compute, and files that are none are refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from helpers import lora_files, tiny_models
from helpers.command import Ziggurat
from helpers.lora_files import Pairs, random_pairs, write_adapter
from helpers.tiny_models import Shape
from ziggurat.runtime import lora, plan
from ziggurat.runtime.bindings import Context, ContextSettings, KVSettings, Model
from ziggurat.runtime.engine import FinishEvent, GenerationRequest
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.errors import (
    AdapterError,
    InvalidRequestError,
    ModelFileError,
    StateMismatchError,
    UnsupportedError,
    ZigguratError,
)
from ziggurat.runtime.gguf_file import read_gguf
from ziggurat.runtime.kv_file import load_sequence, save_sequence
from ziggurat.runtime.lora import LoraAdapter
from ziggurat.runtime.sampling import SamplingParams

ALPHA, RANK = 8.0, 4
TOKENS = [3 + (7 * n) % 250 for n in range(200)]
PLAIN = ContextSettings(n_ctx=256, n_threads=1, type_k="f32", type_v="f32", flash_attention="off")
# prompts longer than the budgets are read layer by layer, ubatch by ubatch
BUDGET = replace(PLAIN, n_ubatch=64, kv=KVSettings((60, 40), window=16))
SHAPES = {
    "llama": Shape(),
    "qwen2": Shape(arch="qwen2"),
    "fused": Shape(arch="phi3"),
    "experts": Shape(n_expert=4),
}
PARTS = {"fused": ("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "experts": (*lora_files.PARTS, "ffn_gate_inp")}


@pytest.fixture(scope="module")
def base(spm_path: Path) -> Path:
    return spm_path


@pytest.fixture(scope="module")
def pairs(base: Path) -> Pairs:
    return random_pairs(base)


@pytest.fixture(scope="module")
def adapter(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("lora") / "adapter.gguf", pairs, alpha=ALPHA)


def logits(
    path: Path, *adapters: tuple[Path, float], settings: ContextSettings = PLAIN, tokens: list[int] = TOKENS
) -> Any:
    """The logits after the prompt and after eight single tokens more, (9, vocabulary)."""
    found = []
    with Model(path) as model:
        lora.add_adapters(model, [LoraAdapter(*adapter) for adapter in adapters])
        with Context(model, settings) as context:
            batch = context.new_batch()
            for position, chunk in enumerate([tokens, *([token] for token in TOKENS[:8])]):
                batch.clear()
                at = context.last_position(0) + 1
                assert at == (position and len(tokens) + position - 1)
                context.decode(_with(batch, chunk, at))
                found.append(context.logits(len(chunk) - 1))
    return np.array(found)


def _with(batch: Any, tokens: list[int], position: int) -> Any:
    batch.add(tokens, position, 0, output_last=True)
    return batch


def nmse(a: Any, b: Any) -> float:
    return float(((a - b) ** 2).sum() / (b**2).sum())


# --- what is computed


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("budget", [False, True], ids=["whole cache", "budget"])
def test_an_adapter_is_the_merged_model(name: str, budget: bool, tmp_path: Path, request: Any) -> None:
    shape = SHAPES[name]
    settings = PLAIN
    if budget:
        request.getfixturevalue("budgets")
        settings = BUDGET
    model = tiny_models.write_model(tmp_path / "model.gguf", shape)
    pairs = random_pairs(model, rank=RANK, parts=(*PARTS.get(name, lora_files.PARTS), "output", "token_embd"))
    assert len(pairs) >= 4 * shape.n_layer + 2
    file = write_adapter(tmp_path / "adapter.gguf", pairs, alpha=ALPHA, arch=shape.arch)
    lora.read_adapters([LoraAdapter(file)], read_gguf(model))
    merged = lora_files.merge(tmp_path / "merged.gguf", model, [(pairs, 0.5 * ALPHA / RANK)])
    adapted = logits(model, (file, 0.5), settings=settings)
    assert nmse(adapted, logits(merged, settings=settings)) < 1e-6
    assert nmse(adapted, logits(model, settings=settings)) > 0.01


def test_without_an_alpha_the_scale_is_all(base: Path, pairs: Pairs, tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a.gguf", pairs, alpha=None)
    merged = lora_files.merge(tmp_path / "merged.gguf", base, [(pairs, -0.25)])
    assert nmse(logits(base, (file, -0.25)), logits(merged)) < 1e-6


def test_scale_0_is_the_model_alone(base: Path, adapter: Path) -> None:
    assert np.array_equal(logits(base, (adapter, 0.0)), logits(base))


@pytest.mark.usefixtures("budgets")
@pytest.mark.parametrize("settings", [PLAIN, BUDGET], ids=["whole cache", "budget"])
def test_two_adapters_add_up(
    base: Path, pairs: Pairs, adapter: Path, tmp_path: Path, settings: ContextSettings
) -> None:
    others = random_pairs(base, rank=2, parts=("attn_v", "ffn_down"), seed=5)
    other = write_adapter(tmp_path / "other.gguf", others, alpha=2.0)
    changes = [(pairs, 0.5 * ALPHA / RANK), (others, 2.0)]
    merged = lora_files.merge(tmp_path / "merged.gguf", base, changes)
    both = logits(base, (adapter, 0.5), (other, 2.0), settings=settings)
    assert nmse(both, logits(merged, settings=settings)) < 1e-6
    assert nmse(both, logits(base, (adapter, 0.5), settings=settings)) > 1e-3


def test_half_precision_and_quantized_adapters(base: Path, pairs: Pairs, tmp_path: Path) -> None:
    halves = {name: (a.astype(np.float16), b.astype(np.float16)) for name, (a, b) in pairs.items()}
    file = write_adapter(tmp_path / "half.gguf", halves)
    merged = lora_files.merge(tmp_path / "merged.gguf", base, [(halves, ALPHA / RANK)])
    assert nmse(logits(base, (file, 1.0)), logits(merged)) < 1e-4  # the CPU rounds what it multiplies with F16 as well

    wide = random_pairs(base, rank=32)

    def quantized(writer: gguf.GGUFWriter) -> None:
        for name, matrices in wide.items():
            for suffix, matrix in zip(("lora_a", "lora_b"), matrices, strict=True):
                rows = gguf.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(f"{name}.{suffix}", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    file = write_adapter(tmp_path / "q8_0.gguf", {}, extra=quantized)
    lora.read_adapters([LoraAdapter(file)], read_gguf(base))
    merged = lora_files.merge(tmp_path / "merged.gguf", base, [(wide, ALPHA / 32)])
    assert nmse(logits(base, (file, 1.0)), logits(merged)) < 1e-3


@pytest.mark.usefixtures("budgets")
def test_prompts_read_in_steps_are_adapted(base: Path, adapter: Path) -> None:
    wanted = logits(base, (adapter, 1.0), settings=BUDGET)[0]
    with Model(base) as model:
        lora.add_adapters(model, [LoraAdapter(adapter)])
        with Context(model, BUDGET) as context:
            context.prompt_begin(0, TOKENS)
            while not context.prompt_step(0, 1).finished:
                pass
            assert np.array_equal(context.logits(-1), wanted)


# --- the engine


def generate(engine: LlamaEngine) -> list[int]:
    request = GenerationRequest(tokens=(1, *TOKENS[:40]), max_tokens=12, sampling=SamplingParams(temperature=0))
    return [event.token for event in engine.stream(request) if not isinstance(event, FinishEvent)]


def test_the_engine_applies_adapters_and_names_them(
    base: Path, pairs: Pairs, adapter: Path, tmp_path: Path, spm_model: Model
) -> None:
    merged = lora_files.merge(tmp_path / "merged.gguf", base, [(pairs, 0.5 * ALPHA / RANK)])
    answers = []
    for path, loras in ((base, (LoraAdapter(adapter, 0.5),)), (merged, ()), (base, ())):
        with LlamaEngine(path, EngineSettings(n_ctx=512, threads=1, loras=loras)) as engine:
            description = engine.load().description
            assert description == spm_model.description + (" + adapter.gguf x 0.5" if loras else "")
            answers.append(generate(engine))
    assert answers[0] == answers[1] != answers[2]


def test_adapters_are_freed_with_the_model(base: Path, adapter: Path) -> None:
    for _ in range(3):
        with Model(base) as model:
            before = Context(model, PLAIN)
            lora.add_adapters(model, [LoraAdapter(adapter)])
            after = Context(model, PLAIN)
            assert (before.loras, len(after.loras)) == ((), 1)
        model.close()


def test_the_command_line(ziggurat: Ziggurat, base: Path, adapter: Path, tmp_path: Path) -> None:
    def answer(*options: object) -> str:
        code, out, err = ziggurat("run", base, "the man", "--raw", "-n", 12, "--temp", 0, "--ctx", 300, *options)
        assert code == 0, err
        return str(out)

    alone = answer()
    assert answer("--lora", f"{adapter}=0") == alone != answer("--lora", adapter)
    odd = tmp_path / "a=b.gguf"
    odd.write_bytes(adapter.read_bytes())
    assert answer("--lora", odd) == answer("--lora", f"{odd}=1") == answer("--lora", adapter)
    assert answer("--lora", f"{odd}=0.5", "--lora", f"{adapter}=0.5") == answer("--lora", adapter)
    for text, message in {
        f"{adapter}=x": "the scale 'x' is not a number",
        f"{adapter}=": "the scale '' is not a number",
        f"{adapter}=nan": "the scale of an adapter cannot be nan",
        f"{adapter}=1e39": "the scale of an adapter cannot be 1e+39",
        "=2": "there is no file before the scale",
    }.items():
        assert message in ziggurat.fails("run", base, "a", "--lora", text, code=2)
    assert "no such file" in ziggurat.fails("run", base, "a", "--lora", tmp_path / "none.gguf", code=1)


# --- memory


def test_the_plan_counts_adapters(ziggurat: Ziggurat, base: Path, pairs: Pairs, adapter: Path) -> None:
    size = sum(a.nbytes + b.nbytes for a, b in pairs.values())
    outline = plan.outline(read_gguf(base))
    for gpu_layers in (0, 1, 99):
        alone = plan.plan_memory(outline, PLAIN, gpu_layers=gpu_layers)
        both = plan.plan_memory(replace(outline, adapters=size), PLAIN, gpu_layers=gpu_layers)
        assert (both.adapters, both.total - alone.total) == (size, size)
        assert sum(device.fixed for device in both.devices) - sum(device.fixed for device in alone.devices) == size
        assert all((device.adapters > 0) == (device.weights > 0) for device in both.devices)
    for options in ((), ("--estimate",)):
        found = json.loads(ziggurat("plan", base, "--json", "--lora", adapter, *options)[1])["plan"]
        assert found["adapters_bytes"] == size
        assert (
            found["total_bytes"] - json.loads(ziggurat("plan", base, "--json", *options)[1])["plan"]["total_bytes"]
            == size
        )
    assert "adapters" in ziggurat("plan", base, "--lora", adapter)[1]
    assert "adapters" not in ziggurat("plan", base)[1]


# --- saved sequences


@pytest.mark.usefixtures("budgets")
def test_a_saved_sequence_is_of_its_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    path, copy = tmp_path / "s.kv", tmp_path / "copy.gguf"
    copy.write_bytes(adapter.read_bytes())

    def opened(*adapters: LoraAdapter) -> Any:
        with Model(base) as model:
            lora.add_adapters(model, adapters)
            with Context(model, BUDGET) as context:
                return load_sequence(path, context, 0, "model")

    with Model(base) as model:
        lora.add_adapters(model, [LoraAdapter(adapter), LoraAdapter(adapter, 0.5)])
        with Context(model, BUDGET) as context:
            context.decode(_with(context.new_batch(), TOKENS, 0))
            save_sequence(path, context, 0, TOKENS, "model")
    assert opened(LoraAdapter(copy, 0.5), LoraAdapter(adapter), LoraAdapter(copy, 0)) == TOKENS
    for others in ((), (LoraAdapter(adapter),), (LoraAdapter(adapter), LoraAdapter(adapter, 0.25))):
        with pytest.raises(StateMismatchError, match="was saved with another set of LoRA adapters"):
            opened(*others)


# --- files that are refused


def wrong(name: str, pairs: Pairs, path: Path) -> Path:
    """An adapter with one thing that is not as it should be."""
    q = "blk.0.attn_q.weight"
    a, b = pairs[q]
    extras: dict[str, Callable[[gguf.GGUFWriter], Any]] = {
        "alora": lambda w: w.add_array("adapter.alora.invocation_tokens", [1, 2]),
        "alpha of 64 bits": lambda w: w.add_float64("adapter.lora.alpha", 8.0),
        "alpha of text": lambda w: w.add_string("adapter.lora.alpha", "8"),
        "half a pair": lambda w: w.add_tensor("blk.0.attn_q.weight.lora_a", a),
        "a tensor that is none": lambda w: w.add_tensor("blk.0.attn_q.weight", a),
    }
    changed: dict[str, Pairs] = {
        "empty": {},
        "half a pair": {name: pair for name, pair in pairs.items() if name != q},
        "no such weight": {**pairs, "blk.9.attn_q.weight": (a, b)},
        "other width": {**pairs, q: (np.zeros((RANK, 32), np.float32), b)},
        "not transposed": {**pairs, q: (a.T.copy(), b)},
        "other rank": {**pairs, q: (a[:2], b)},
        "rank 0": {**pairs, q: (a[:0], b[:, :0])},
        "experts": {**pairs, q: (np.stack([a, a]), np.stack([b, b]))},
        "integers": {**pairs, q: (a.astype(np.int32), b.astype(np.int32))},
        "alpha not finite": pairs,
    }
    values: dict[str, dict[str, Any]] = {
        "a model": {"kind": "model"},
        "control vector": {"method": "control_vector"},
        "other architecture": {"arch": "qwen2"},
        "alpha of 64 bits": {"alpha": None},
        "alpha of text": {"alpha": None},
        "alpha not finite": {"alpha": float("nan")},
    }
    extra = {"extra": extras[name]} if name in extras else {}
    return write_adapter(path, changed.get(name, pairs), **values.get(name, {}), **extra)


REFUSED: dict[str, tuple[type[ZigguratError], str]] = {
    "a model": (ModelFileError, "is not an adapter (its general.type is 'model')"),
    "control vector": (ModelFileError, "is not a LoRA adapter (its adapter.type is 'control_vector')"),
    "other architecture": (AdapterError, "is an adapter of a qwen2 model, and this is a llama"),
    "alora": (UnsupportedError, "is an activated LoRA"),
    "alpha of 64 bits": (ModelFileError, "adapter.lora.alpha is not a number of 32 bits"),
    "alpha of text": (ModelFileError, "adapter.lora.alpha is not a number of 32 bits"),
    "alpha not finite": (ModelFileError, "adapter.lora.alpha is not a number of 32 bits"),
    "empty": (ModelFileError, "has no weights of an adapter"),
    "half a pair": (AdapterError, "LoRA tensor pair for 'blk.0.attn_q.weight' is missing one component"),
    "a tensor that is none": (AdapterError, "LoRA tensor 'blk.0.attn_q.weight' has unexpected suffix"),
    "no such weight": (AdapterError, "LoRA tensor 'blk.9.attn_q.weight' does not exist in base model"),
    "other width": (AdapterError, "tensor 'blk.0.attn_q.weight' has incorrect shape"),
    "not transposed": (AdapterError, "blk.0.attn_q.weight is adapted by (4, 64) and (4, 64), which do not go together"),
    "other rank": (AdapterError, "is adapted by (64, 2) and (4, 64), which do not go together"),
    "rank 0": (AdapterError, "which do not go together"),
    "experts": (AdapterError, "which do not go together"),
    "integers": (UnsupportedError, "blk.0.attn_q.weight.lora_a is I32; adapters are F32, F16, BF16, Q8_0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_adapters_are_refused_in_one_line(name: str, base: Path, pairs: Pairs, tmp_path: Path) -> None:
    kind, message = REFUSED[name]
    path = wrong(name, pairs, tmp_path / "wrong.gguf")
    with LlamaEngine(base, EngineSettings(n_ctx=256, threads=1, loras=(LoraAdapter(path),))) as engine:
        with pytest.raises(ZigguratError) as caught:
            engine.load()
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_gguf(base: Path, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    whole = adapter.read_bytes()
    for content, message in ((b"", "is empty"), (b"PK\3\4 and so on", "is not a GGUF file"), (whole[:-9], "truncated")):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=message):
            lora.read_adapters([LoraAdapter(path)], read_gguf(base))
    with pytest.raises(ModelFileError, match="is not an adapter"):
        lora.read_adapters([LoraAdapter(base)], read_gguf(base))
    with pytest.raises(ModelFileError, match="no such file"):
        lora.read_adapters([LoraAdapter(tmp_path / "none")], read_gguf(base))


def test_a_split_adapter(base: Path, pairs: Pairs, tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a-00001-of-00002.gguf", pairs, extra=lambda w: w.add_uint16("split.count", 2))
    write_adapter(tmp_path / "a-00002-of-00002.gguf", pairs)
    with pytest.raises(UnsupportedError, match="this one is split"):
        lora.read_adapters([LoraAdapter(first)], read_gguf(base))


def test_the_embedding_of_a_tied_model(tmp_path: Path) -> None:
    model = tiny_models.write_model(tmp_path / "tied.gguf", Shape(arch="gemma2", n_layer=1, sliding_window=64))
    pairs = random_pairs(model, parts=("token_embd",))
    file = write_adapter(tmp_path / "a.gguf", pairs, arch="gemma2")
    with pytest.raises(UnsupportedError, match="changes the embedding, which is the output matrix"):
        lora.read_adapters([LoraAdapter(file)], read_gguf(model))


def test_norms_are_told_of(base: Path, pairs: Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    norm = np.ones(64, np.float32)
    file = write_adapter(tmp_path / "a.gguf", pairs, extra=lambda w: w.add_tensor("blk.1.attn_norm.weight", norm))
    with caplog.at_level(logging.WARNING):
        lora.read_adapters([LoraAdapter(file)], read_gguf(base))
    assert "1 norms of the adapter are not applied, blk.1.attn_norm.weight among them" in caplog.text
    assert np.array_equal(logits(base, (file, 1.0)), logits(base, (write_adapter(tmp_path / "b.gguf", pairs), 1.0)))


def test_scales_are_numbers() -> None:
    for scale in (float("inf"), float("nan"), 1e300):
        with pytest.raises(InvalidRequestError, match="the scale of an adapter cannot be"):
            LoraAdapter("a.gguf", scale)
