"""The planner with KV budgets: by hand, and beside what the library allocates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helpers import hollow_models, tiny_models
from helpers.hollow_models import Dims
from helpers.tiny_models import Shape
from ziggurat.runtime import cli, plan
from ziggurat.runtime.bindings import Context, ContextSettings, KVLayout, KVSettings, Model, measure
from ziggurat.runtime.budget import Budget, Uniform, allocate
from ziggurat.runtime.gguf_file import read_gguf
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.plan.budgets import row_capacity

SHAPE = plan.KVShape(n_head=(8, 8), n_head_kv=(4, 2), key_length=32, value_length=16, window=(0, 0), n_ctx_train=4096)


def settings(**values: object) -> ContextSettings:
    budget = KVSettings(**{"rows": (900, 100), **values.pop("kv", {})})  # type: ignore[arg-type]
    return ContextSettings(**{"n_ctx": 2000, "n_threads": 1, "kv": budget, **values})  # type: ignore[arg-type]


def test_bytes_by_hand() -> None:
    found = plan.budget_memory(SHAPE, 256, settings(n_seq_max=3), 512)
    assert found is not None
    row = (4 * (32 + 16) * 2, 2 * (32 + 16) * 2)  # of both K and V, in f16
    assert found.capacity == (1024, 256)  # 964 and 164, rounded up
    assert found.rows == (3 * 1024 * row[0], 3 * 256 * row[1])
    assert found.positions == (4 * 900 * 4 * 4, 4 * 100 * 2 * 4)  # and those that are about to be kept
    assert found.queries == (3 * 48 * 8 * 32 * 2,) * 2
    assert found.copies == tuple(
        rows + positions + queries
        for rows, positions, queries in zip(
            (1024 * row[0], 256 * row[1]), (900 * 4 * 4, 100 * 2 * 4), (48 * 8 * 32 * 2,) * 2, strict=True
        )
    )
    assert (found.stage_rows, found.stage, found.hidden) == (2048, 2048 * row[0], 256 * 2048 * 4)
    assert found.layer_major
    assert found.full == 3 * 2048 * sum(row)
    assert found.kept == sum(found.rows) + sum(found.positions) + sum(found.queries)
    assert found.total == found.kept + sum(found.copies) + found.stage + found.hidden


def test_other_scores_types_and_ways_of_reading() -> None:
    def of(*, layer_major: bool = True, **values: object) -> plan.BudgetMemory:
        found = plan.budget_memory(SHAPE, 256, settings(**values), 512, layer_major=layer_major)
        assert found is not None
        return found

    assert of(kv={"score": "recent"}).queries == (0, 0)
    assert of(type_k="f32").queries == (48 * 8 * 32 * 4,) * 2
    assert of(type_k="q8_0").queries == (48 * 8 * 32 * 2,) * 2
    assert of(type_k="q8_0", type_v="q8_0").rows == (1024 * (136 + 68), 256 * (68 + 34))
    lane = of(layer_major=False)
    assert (lane.layer_major, lane.stage, lane.hidden) == (False, 2048 * (384 + 192), 0)
    chunked = of(kv={"prefill": "chunked"})
    assert (chunked.stage_rows, chunked.hidden) == (1024 + 512, 256 * 512 * 4)
    one, two, more = (of(n_seq_max=2, kv={"n_reading": count}) for count in (1, 2, 3))
    assert (two.stage, two.hidden) == (2 * one.stage, 2 * one.hidden)
    assert (two.copies, two.kept) == (tuple(2 * size for size in one.copies), one.kept)
    none = of(n_seq_max=2, kv={"n_reading": 2, "n_copies": 0})
    assert (none.copies, none.total) == ((0, 0), two.total - sum(two.copies))
    assert more.total == two.total  # no more than there are sequences
    assert of(kv={"prefill": "bounded"}).total == of().total
    # a row more of each layer, which the library asks how quantized rows are rotated
    assert (of().rotation, of(type_v="q8_0").rotation) == (0, 256 + 68 + 128 + 34)


def test_nothing_more_is_taken_when_nothing_is_evicted() -> None:
    found = plan.budget_memory(SHAPE, 256, settings(kv={"rows": (2048, 9999)}), 512)
    assert found is not None
    assert found.capacity == (2048, 2048)
    assert found.total == found.full == sum(found.rows)
    almost = plan.budget_memory(SHAPE, 256, settings(kv={"rows": (9999, 2047)}), 512)
    assert almost is not None
    assert almost.capacity == row_capacity(KVSettings((9999, 2047)), 2048, (0, 0), 512) == (2048 + 256, 2048 + 256)
    assert almost.stage > 0


@pytest.mark.parametrize("change", [{"window": (64, 64)}, {"exact": False}])
def test_models_that_cannot_have_a_budget_are_planned_without(change: dict[str, object]) -> None:
    shape = dataclasses.replace(SHAPE, **change)  # type: ignore[arg-type]
    assert not plan.takes_budget(shape)
    assert plan.budget_memory(shape, 256, settings(), 512) is None


def test_layers_with_a_sliding_window_have_no_budget() -> None:
    shape = dataclasses.replace(SHAPE, window=(0, 1000))
    found = plan.budget_memory(shape, 256, settings(kv={"rows": (900, 0)}), 512)
    assert found is not None
    row = (4 * (32 + 16) * 2, 2 * (32 + 16) * 2)
    assert found.capacity == (1024, 1536)  # 964, and the window with a ubatch
    assert (found.positions[1], found.queries[1]) == (0, 0)
    assert found.copies[1] == found.rows[1] == 1536 * row[1]
    assert found.stage == 2048 * row[0]
    assert found.full == 2048 * row[0] + 1536 * row[1]
    everything = plan.budget_memory(shape, 256, settings(kv={"rows": (2048, 0)}), 512)
    assert everything is not None
    assert everything.rows == (2048 * row[0], 1536 * row[1])
    assert everything.copies == everything.rows  # a prompt writes over the ring


def test_the_plan_counts_a_budgets_parts(spm_path: Path) -> None:
    outline = plan.outline(read_gguf(spm_path))
    assert outline.kv is not None
    asked = settings(n_seq_max=2)
    found = plan.budget_memory(outline.kv, outline.n_embd, asked, 512)
    planned = plan.plan_memory(outline, asked)
    assert found is not None
    assert planned.budget == found
    assert planned.context == found.total
    assert planned.kv_per_layer == found.kept_per_layer
    for gpu_layers in (1, 2, 3):
        host, gpu = plan.plan_memory(outline, asked, gpu_layers=gpu_layers).devices
        layers = gpu_layers - 1
        on_gpu = sum((*found.kept_per_layer[2 - layers :], *found.copies[2 - layers :])) if layers else 0
        assert gpu.context == on_gpu + (found.reading if layers else 0)
        assert host.context == found.kept + sum(found.copies) - on_gpu + (found.reading if layers < 2 else 0)


def test_budgets_make_room_for_conversations(spm_path: Path) -> None:
    outline = plan.outline(read_gguf(spm_path))
    policy = KVPolicy(Budget(rows=100), Uniform(), reading=1)
    asked = ContextSettings(n_ctx=8192)
    memory = plan.Planner(outline).plan(dataclasses.replace(asked, n_seq_max=4)).total
    with_budget = plan.Planner(outline, policy=policy)
    count = with_budget.most_conversations(asked, memory)
    assert count > 40
    most = with_budget.plan(dataclasses.replace(asked, n_seq_max=count))
    assert most.total <= memory
    assert most.settings.kv is not None
    assert list(most.settings.kv.rows) == allocate(200, 2, schedule="uniform")


def ziggurat(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.run_command(cli.ziggurat, "ziggurat", [str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("estimate", [True, False])
def test_the_command_shows_them(capsys: pytest.CaptureFixture[str], spm_path: Path, estimate: bool) -> None:
    arguments = [
        "plan",
        spm_path,
        "--ctx",
        4000,
        "--kv-budget",
        "12%",
        "--memory",
        "9MiB",
        *(["--estimate"] if estimate else []),
    ]
    planned = json.loads(ziggurat(capsys, *arguments, "--json")[1])["plan"]
    budget = planned["kv_budget"]
    assert (planned["kv_budget_asked"], budget["score"], budget["prefill"]) == ("12%", "snapkv", "exact")
    assert sum(budget["rows_per_layer"]) == 2 * 480
    parts = ("rows_bytes", "position_bytes", "query_bytes", "sum_bytes", "copy_bytes", "stage_bytes", "hidden_bytes")
    assert 0 <= planned["kv_bytes"] - sum(budget[part] for part in parts) <= 2000
    assert planned["kv_exact"]
    code, out, _ = ziggurat(capsys, *arguments)
    text = " ".join(out.split())
    assert code == 0
    assert "KV budget 12%:" in text
    assert "480 on average; to keep every row would take 1.00 MiB" in text
    assert "while a prompt is read: stage of one layer" in text
    arguments += ["--parallel", 4, "--kv-reading", 3]
    three = json.loads(ziggurat(capsys, *arguments, "--json")[1])["plan"]["kv_budget"]
    assert three["prompts_at_a_time"] == 3
    for part in ("copy_bytes", "stage_bytes", "hidden_bytes"):
        assert three[part] == 3 * budget[part]
    assert "while 3 prompts are read: stage of one layer" in " ".join(ziggurat(capsys, *arguments)[1].split())


def test_the_command_says_when_a_model_cannot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tiny_models.write_model(tmp_path / "m.gguf", Shape(arch="gemma3", n_layer=3, sliding_window=64))
    code, out, _ = ziggurat(capsys, "plan", path, "--kv-budget", 64)
    assert code == 0
    assert "cannot have a KV budget" in " ".join(out.split())
    assert json.loads(ziggurat(capsys, "plan", path, "--kv-budget", 64, "--json")[1])["plan"]["kv_budget"] is None


# --- beside the library

SHAPES = {
    "grouped": Shape(head_dim=32, n_embd=256, n_head=8, n_head_kv=2, n_ff=704, n_layer=4),
    "multi-head": Shape(head_dim=32, n_embd=256, n_head=8, n_head_kv=8, n_ff=704),
    "one KV head": Shape(arch="qwen3", head_dim=64, n_embd=256, n_head=4, n_head_kv=1, n_ff=704, n_layer=3),
    "heads by layer": Shape(arch="deci", head_dim=32, n_layer=3, n_head=(4, 4, 4), n_head_kv=(4, 1, 2)),
    "sliding windows": Shape(arch="gemma3", head_dim=32, n_layer=3, sliding_window=300, slides=(True, False, True)),
    "a long window": Shape(arch="gemma2", head_dim=32, n_layer=2, sliding_window=3000),
}
ASKED = {
    "one": {"n_ctx": 4000},
    "one of f32": {"n_ctx": 2048, "type_k": "f32", "type_v": "f32"},
    "four of q8_0": {"n_ctx": 2048, "n_seq_max": 4, "type_k": "q8_0", "type_v": "q8_0"},
    "bf16 and q4_0": {"n_ctx": 4096, "type_k": "bf16", "type_v": "q4_0"},
    "q4_0 and f16": {"n_ctx": 2048, "n_seq_max": 2, "type_k": "q4_0", "type_v": "f16"},
    "no flash attention": {"n_ctx": 2048, "flash_attention": "off"},
    "small ubatch": {"n_ctx": 8192, "n_ubatch": 64},
    "recent": {"n_ctx": 2048, "kv": {"score": "recent", "window": 7}},
    "tova": {"n_ctx": 2048, "kv": {"score": "tova"}},
    "keydiff": {"n_ctx": 4096, "kv": {"score": "keydiff"}},
    "h2o": {"n_ctx": 4096, "n_seq_max": 2, "kv": {"score": "h2o"}},
    "h2o in a lane": {"n_ctx": 2048, "kv": {"score": "h2o", "prefill": "lane"}},
    "chunked": {"n_ctx": 4096, "n_ubatch": 128, "kv": {"prefill": "chunked", "slack": 300}},
    "two prompts of four": {"n_ctx": 2048, "n_seq_max": 4, "kv": {"n_reading": 2}},
    "three prompts, one after others": {"n_ctx": 2048, "n_seq_max": 4, "kv": {"n_reading": 3, "n_copies": 1}},
    "a lane": {"n_ctx": 4096, "kv": {"prefill": "lane"}},
    "nothing is evicted": {"n_ctx": 512, "kv": {"rows": (512,)}},
}


@pytest.mark.usefixtures("budgets")
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_plan_is_what_is_allocated(shape: Shape, asked: dict[str, object], tmp_path: Path) -> None:
    path = tiny_models.write_model(tmp_path / "m.gguf", shape)
    given = dict(asked.get("kv", {}))  # type: ignore[call-overload]
    rows = given.pop("rows", None)
    outline = plan.outline(read_gguf(path))
    assert outline.kv is not None
    kept = rows * shape.n_layer if rows else tuple(allocate(700 * shape.n_layer, shape.n_layer))
    kept = tuple(0 if window else most for most, window in zip(kept, outline.kv.window, strict=True))
    context_settings = settings(**{**asked, "kv": {"rows": kept, **given}})
    with Model(path) as model, Context(model, context_settings) as context:
        assert context.kv_active
        layout, capacity = context.kv_layout(), context.kv_capacity()
        real = measure(context)
    planned = plan.plan_memory(outline, context_settings)
    budget = planned.budget
    assert budget is not None
    assert layout is not None
    assert capacity == budget.capacity
    assert layout == KVLayout(
        rows_bytes=sum(budget.rows),
        position_bytes=sum(budget.positions),
        query_bytes=sum(budget.queries),
        sum_bytes=sum(budget.sums),
        copy_bytes=sum(budget.copies),
        stage_bytes=budget.stage,
        hidden_bytes=budget.hidden,
        stage_rows=budget.stage_rows,
        layer_major=budget.layer_major,
    )
    assert 0 <= sum(buffer.context for buffer in real) - planned.context <= budget.padding
    total = sum(buffer.weights + buffer.context + buffer.compute for buffer in real) + planned.output
    # the graphs of such small models take more than all else, and are estimated
    assert planned.total == pytest.approx(total, rel=0.05, abs=2**20)
    with Model(path, simulated=True) as model, Context(model, context_settings) as context:
        said = plan.measured_plan(outline, context_settings, measure(context))
    assert said.kv_exact
    assert said.compute == sum(buffer.compute for buffer in real)
    assert said.context == sum(buffer.context for buffer in real)


REAL = {
    "0.3b": Dims(n_layer=24, n_embd=1024, n_head=16, n_head_kv=4, n_ff=2816, n_vocab=2048),
    "llama 7b": Dims(n_layer=32, n_embd=4096, n_head=32, n_head_kv=32, head_dim=128, n_ff=11008, n_vocab=32000),
    "llama 8b": Dims(n_layer=32, n_embd=4096, n_head=32, n_head_kv=8, head_dim=128, n_ff=14336, n_vocab=128256),
    "qwen3 30b-a3b": Dims(
        "qwen3moe", 48, 2048, 32, 4, head_dim=128, n_ff=768, n_vocab=151936, n_expert=128, n_expert_used=8
    ),
}


@pytest.mark.usefixtures("budgets")
@pytest.mark.parametrize("dims", REAL.values(), ids=REAL)
def test_models_of_real_size(dims: Dims, tmp_path: Path) -> None:
    path = hollow_models.write_model(tmp_path / "m.gguf", dims)
    outline = plan.outline(read_gguf(path))
    with Model(path, simulated=True) as model:
        for values in (
            {"n_ctx": 4096},
            {"n_ctx": 16384, "n_seq_max": 4},
            {"n_ctx": 8192, "type_k": "q8_0", "type_v": "q8_0"},
            {"n_ctx": 32768, "type_k": "bf16", "type_v": "q4_0", "n_ubatch": 128},
            {"n_ctx": 65536, "type_k": "q4_0", "type_v": "q8_0"},
            {"n_ctx": 8192, "flash_attention": "off"},
            {"n_ctx": 65536, "n_ubatch": 128},
        ):
            for mean, schedule in ((1024, "pyramid"), (300, "uniform")):
                rows = tuple(allocate(mean * dims.n_layer, dims.n_layer, schedule=schedule))
                asked = ContextSettings(**values, kv=KVSettings(rows))  # type: ignore[arg-type]
                with Context(model, asked) as context:
                    said = plan.measured_plan(outline, asked, measure(context))
                estimate = plan.plan_memory(outline, asked)
                assert said.kv_exact
                assert -0.1 < estimate.compute / said.compute - 1 < 0.1
                assert estimate.total == pytest.approx(said.total, rel=0.01)
