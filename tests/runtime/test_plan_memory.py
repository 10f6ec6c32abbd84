"""The planner against what llama.cpp really allocates, and against what it says that it would."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from helpers import hollow_models, tiny_models
from helpers.hollow_models import Dims
from helpers.tiny_models import Shape
from ziggurat.runtime import plan
from ziggurat.runtime.bindings import BufferMemory, Context, ContextSettings, Model, measure
from ziggurat.runtime.errors import UnsupportedError
from ziggurat.runtime.gguf_file import read_gguf
from ziggurat.runtime.plan import fit
from ziggurat.runtime.plan.machine import Machine, impossible, shortage

GiB = 2**30
SHAPES = {
    "multi-head": Shape(head_dim=32, n_embd=256, n_head=8, n_head_kv=8, n_ff=704),
    "grouped": Shape(head_dim=32, n_embd=256, n_head=8, n_head_kv=2, n_ff=704),
    "one KV head": Shape(head_dim=64, n_embd=256, n_head=4, n_head_kv=1, n_ff=704),
    "heads by layer": Shape(arch="deci", head_dim=32, n_layer=3, n_head=(4, 4, 4), n_head_kv=(4, 1, 2)),
    "sliding": Shape(arch="gemma3", head_dim=32, n_layer=8, sliding_window=300),
}
SETTINGS = {
    "one": ContextSettings(n_ctx=1000, n_threads=1),
    "q8_0": ContextSettings(n_ctx=2048, type_k="q8_0", type_v="q8_0", n_threads=1),
    "four sequences": ContextSettings(n_ctx=1024, n_seq_max=4, n_threads=1),
    "small ubatch": ContextSettings(n_ctx=4096, n_ubatch=64, n_threads=1),
    "no flash attention": ContextSettings(n_ctx=1024, flash_attention="off", n_threads=1),
}


def logits_bytes(context: Context) -> int:
    """What the library reports of the buffer that its breakdown leaves out, to a hundredth of a MiB."""
    (line,) = (line for line in context.log_lines if "output buffer size" in line)
    return round(float(line.split("=")[1].split()[0]) * 2**20)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_plan_is_what_is_allocated(shape: Shape, settings: ContextSettings, tmp_path: Path) -> None:
    path = tiny_models.write_model(tmp_path / "m.gguf", shape)
    with Model(path) as model, Context(model, settings) as context:
        real = measure(context)
        total = sum(buffer.weights + buffer.context + buffer.compute for buffer in real) + logits_bytes(context)
    outline = plan.outline(read_gguf(path))
    with Model(path, simulated=True) as model, Context(model, settings) as context:
        asked = plan.measured_plan(outline, settings, measure(context))
    estimate = plan.plan_memory(outline, settings)
    kv = sum(buffer.context for buffer in real)
    for planned in (asked, estimate):
        assert sum(planned.kv_per_layer) == planned.context == kv
        assert planned.kv_exact
    assert asked.compute == sum(buffer.compute for buffer in real)
    assert asked.total == pytest.approx(total, rel=0.02)
    assert estimate.total == pytest.approx(total, rel=0.05)
    assert (asked.measured, estimate.measured) == (True, False)


REAL = {
    "llama 1.1b": Dims(n_layer=22, n_embd=2048, n_head=32, n_head_kv=4, n_ff=5632, n_vocab=32000),
    "llama 7b": Dims(n_layer=32, n_embd=4096, n_head=32, n_head_kv=32, head_dim=128, n_ff=11008, n_vocab=32000),
    "llama 8b": Dims(n_layer=32, n_embd=4096, n_head=32, n_head_kv=8, head_dim=128, n_ff=14336, n_vocab=128256),
    "llama 70b": Dims(
        n_layer=80, n_embd=8192, n_head=64, n_head_kv=8, head_dim=128, n_ff=28672, n_vocab=128256, type="Q4_K"
    ),
    "qwen2 7b": Dims(
        "qwen2", n_layer=28, n_embd=3584, n_head=28, n_head_kv=4, head_dim=128, n_ff=18944, n_vocab=152064
    ),
    "qwen3 0.6b": Dims(
        "qwen3", n_layer=28, n_embd=1024, n_head=16, n_head_kv=8, head_dim=128, n_ff=3072, n_vocab=151936, tied=True
    ),
    "gemma2 2b": Dims(
        "gemma2", 26, 2304, 8, 4, head_dim=256, n_ff=9216, n_vocab=256000, sliding_window=4096, tied=True
    ),
    "gemma3 4b": Dims(
        "gemma3", 34, 2560, 8, 4, head_dim=256, n_ff=10240, n_vocab=262144, sliding_window=1024, tied=True
    ),
    "mixtral": Dims("llama", 32, 4096, 32, 8, head_dim=128, n_ff=14336, n_vocab=32000, n_expert=8, n_expert_used=2),
    "qwen3 30b-a3b": Dims(
        "qwen3moe", 48, 2048, 32, 4, head_dim=128, n_ff=768, n_vocab=151936, n_expert=128, n_expert_used=8
    ),
}


@pytest.mark.parametrize("dims", REAL.values(), ids=REAL)
def test_models_of_real_size(dims: Dims, tmp_path: Path) -> None:
    path = hollow_models.write_model(tmp_path / "m.gguf", dims)
    outline = plan.outline(read_gguf(path))
    for settings in (
        ContextSettings(n_ctx=4096),
        ContextSettings(n_ctx=32768, n_seq_max=2),
        ContextSettings(n_ctx=8192, type_k="q8_0", type_v="q8_0"),
        ContextSettings(n_ctx=2048, n_seq_max=16, n_ubatch=128),
        ContextSettings(n_ctx=8192, flash_attention="off"),
    ):
        with Model(path, simulated=True) as model, Context(model, settings) as context:
            asked = plan.measured_plan(outline, settings, measure(context))
        estimate = plan.plan_memory(outline, settings)
        assert estimate.context == asked.context == sum(asked.kv_per_layer)
        assert estimate.weights == pytest.approx(asked.weights, rel=1e-5)
        assert -0.06 < estimate.compute / asked.compute - 1 < 0.09
        assert estimate.total == pytest.approx(asked.total, rel=0.01)


def test_weights_that_the_cpu_repacks_have_to_stay_in_memory() -> None:
    outline = plan.Outline(Path("m.gguf"), "llama", 64, 96, 100, 1024, None, plan.Weights(10, (20,), 30, 10, False))
    buffers = [
        BufferMemory("CPU", "CPU", 40, 0, 7),
        BufferMemory("CPU", "CPU_REPACK", 20, 0, 0),
        BufferMemory("CUDA0", "CUDA0", 500, 5, 3),
        BufferMemory("CPU", "CUDA_Host", 8, 0, 2),
    ]
    planned = plan.measured_plan(outline, ContextSettings(n_ctx=256), buffers)
    host, gpu = planned.devices
    assert (host.device, host.weights, host.repacked, host.compute, host.output) == ("CPU", 68, 20, 9, 400)
    assert host.fixed == 20 + 9 + 400
    assert (gpu.device, gpu.weights, gpu.context, gpu.compute, gpu.output) == ("CUDA0", 500, 5, 3, 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gpu_layers", [0, 1, 2, 4, 5, 99])
def test_layers_on_a_gpu(tied: bool, gpu_layers: int, tmp_path: Path) -> None:
    path = hollow_models.write_model(tmp_path / "m.gguf", Dims(n_head_kv=(8, 4, 2, 1), tied=tied))
    outline = plan.outline(read_gguf(path))
    settings = ContextSettings(n_ctx=1024)
    planned = plan.plan_memory(outline, settings, gpu_layers=gpu_layers)
    weights, everything = outline.weights, plan.plan_memory(outline, settings)
    assert planned.context == everything.context
    if not gpu_layers:
        assert planned == everything
        return
    # the output counts as a layer and goes first; a tied one is a copy of the embedding, which stays
    layers = min(gpu_layers - 1, 4)
    (gpu,) = planned.gpus
    copy = weights.embedding if tied else 0
    assert gpu.weights == weights.output + copy + sum(weights.layers[4 - layers :])
    assert gpu.context == sum(planned.kv_per_layer[4 - layers :])
    assert planned.weights == weights.total + copy


def known_model(tmp_path: Path) -> plan.Planner:
    """The model of the poster that this project starts from: 70 blocks of Llama 3 70B in 4.5 bits."""
    dims = dataclasses.replace(REAL["llama 70b"], n_layer=70, type="Q4_0")
    return plan.Planner(plan.outline(read_gguf(hollow_models.write_model(tmp_path / "m.gguf", dims))))


def test_streams_on_the_card_of_the_poster(tmp_path: Path) -> None:
    planner = known_model(tmp_path)
    assert planner.most_conversations(ContextSettings(n_ctx=10_000), 45 * GiB) == 4
    planned = planner.plan(ContextSettings(n_ctx=10_000))
    assert planned.weights / GiB == pytest.approx(32.5, abs=0.1)
    assert planned.context == 10_240 * 280 * 1024


def test_what_fits_is_exact_to_the_byte(tmp_path: Path) -> None:
    planner = known_model(tmp_path)
    settings = ContextSettings(n_ctx=4096)
    for count in (1, 2, 7, 256):
        needed = planner.plan(dataclasses.replace(settings, n_seq_max=count)).total
        assert planner.most_conversations(settings, needed) == count
        assert planner.most_conversations(settings, needed - 1) == count - 1
    assert planner.most_conversations(settings, 2**62) == 256
    assert planner.most_conversations(settings, 0) == 0
    for n_ctx in (256, 512, 10_240, 131_072):
        needed = planner.plan(dataclasses.replace(settings, n_ctx=n_ctx)).total
        assert planner.largest_ctx(settings, needed) == n_ctx
        assert planner.largest_ctx(settings, needed - 1) == n_ctx - 256
    assert planner.largest_ctx(settings, 2**62) == 131_072
    assert planner.largest_ctx(settings, 0) == 0


def test_the_largest_context_is_never_beyond_the_trained_one(tmp_path: Path) -> None:
    outline = known_model(tmp_path).model
    odd = plan.Planner(dataclasses.replace(outline, n_ctx_train=1000))
    assert odd.largest_ctx(ContextSettings(n_ctx=1), 2**62) == 1000
    unknown = plan.Planner(dataclasses.replace(outline, n_ctx_train=0))
    assert unknown.largest_ctx(ContextSettings(n_ctx=1), 2**62) == 2**20
    # the library counts rows in 32 bits
    assert unknown.largest_ctx(ContextSettings(n_ctx=1, n_seq_max=4096), 2**62) == (2**31 - 1024) // 4096
    assert unknown.most_conversations(ContextSettings(n_ctx=2**29), 2**62) == 3


def test_what_fits_can_be_a_part_of_the_plan(tmp_path: Path) -> None:
    outline = known_model(tmp_path).model
    planner = plan.Planner(outline, gpu_layers=71)
    settings = ContextSettings(n_ctx=4096)
    (gpu,) = planner.plan(dataclasses.replace(settings, n_seq_max=3)).gpus
    assert planner.most_conversations(settings, gpu.total, fit.on_gpus) == 3
    assert planner.most_conversations(settings, gpu.total - 1, fit.on_gpus) == 2


def test_a_model_without_attention_has_no_rows() -> None:
    outline = plan.Outline(Path("m.gguf"), "mamba", 64, 96, 100, 1024, None, plan.Weights(10, (20,), 30, 10, False))
    planned = plan.plan_memory(outline, ContextSettings(n_ctx=256))
    assert (planned.kv_per_layer, planned.context, planned.weights) == ((), 0, 60)
    assert plan.Planner(outline).largest_ctx(ContextSettings(n_ctx=256), 2**40) == 1024


def test_cache_types_that_do_not_fit_are_refused_by_the_plan(tmp_path: Path) -> None:
    path = hollow_models.write_model(tmp_path / "m.gguf", Dims(head_dim=48))
    with pytest.raises(UnsupportedError, match="--cache-type-k q8_0 needs heads of a multiple of 32"):
        plan.plan_memory(plan.outline(read_gguf(path)), ContextSettings(n_ctx=256, type_k="q8_0"))


def memory_plan(*devices: plan.DeviceMemory) -> plan.MemoryPlan:
    return plan.MemoryPlan(Path("m.gguf"), ContextSettings(n_ctx=4096), devices, (), True, True, False)


def test_what_is_short_is_said_in_one_line() -> None:
    machine = Machine(total=64, available=32, swap=16, gpus_free=(10, 20))
    host = plan.DeviceMemory("CPU", weights=12, context=10, compute=10)
    assert shortage(memory_plan(host), machine) is None
    gpu = plan.DeviceMemory("GPU", weights=30)
    assert shortage(memory_plan(host, gpu), machine) is None
    assert "31 B on the GPU and 30 B are free" in str(
        shortage(memory_plan(host, dataclasses.replace(gpu, compute=1)), machine)
    )
    slow = str(shortage(memory_plan(dataclasses.replace(host, weights=13)), machine))
    assert "33 B and 32 B are free" in slow and "slow" in slow
    rows = str(shortage(memory_plan(dataclasses.replace(host, context=23)), machine))
    assert "33 B beside the weights" in rows and "lower --ctx" in rows


def test_only_what_can_never_fit_is_impossible() -> None:
    machine = Machine(total=64, available=1, swap=16)
    assert impossible(memory_plan(plan.DeviceMemory("CPU", weights=10**6, context=80)), machine) is None
    assert "a context of 4096 tokens it needs 81 B beside the weights" in str(
        impossible(memory_plan(plan.DeviceMemory("CPU", weights=1, context=81)), machine)
    )
    # repacked weights cannot be read again when they are needed
    assert "81 B (21 B of it weights)" in str(
        impossible(memory_plan(plan.DeviceMemory("CPU", weights=30, context=60, repacked=21)), machine)
    )
