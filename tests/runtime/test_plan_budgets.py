"""The planner with KV budgets: by hand, and beside what the library allocates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helpers import tiny_models
from helpers.tiny_models import Shape
from ziggurat.runtime import cli, plan
from ziggurat.runtime.bindings import ContextSettings, KVSettings
from ziggurat.runtime.budget import Budget, Uniform, allocate
from ziggurat.runtime.gguf_file import read_gguf
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.plan.budgets import row_capacity

SHAPE = plan.KVShape(n_head=(8, 8), n_head_kv=(4, 2), key_length=32, value_length=16, window=(0, 0), n_ctx_train=4096)


def settings(**values: object) -> ContextSettings:
    budget = KVSettings(**{"rows": (900, 100), **values.pop("kv", {})})  # type: ignore[arg-type]
    return ContextSettings(**{"n_ctx": 2000, "n_threads": 1, "kv": budget, **values})  # type: ignore[arg-type]


def test_bytes_by_hand() -> None:
    found = plan.budget_memory(SHAPE, "llama", 256, settings(n_seq_max=3), 512)
    assert found is not None
    row = (4 * (32 + 16) * 2, 2 * (32 + 16) * 2)  # of both K and V, in f16
    assert found.capacity == (1024, 256)  # 964 and 164, rounded up
    assert found.rows == (3 * 1024 * row[0], 3 * 256 * row[1])
    assert found.positions == (3 * 900 * 4 * 4, 3 * 100 * 2 * 4)
    assert found.queries == (3 * 32 * 8 * 32 * 2,) * 2
    assert (found.stage_rows, found.stage, found.hidden) == (2048, 2048 * row[0], 256 * 2048 * 4)
    assert found.layer_major
    assert found.full == 3 * 2048 * sum(row)
    assert found.kept == sum(found.rows) + sum(found.positions) + sum(found.queries)
    assert found.total == found.kept + found.stage + found.hidden


def test_other_scores_types_and_ways_of_reading() -> None:
    def of(arch: str = "llama", **values: object) -> plan.BudgetMemory:
        found = plan.budget_memory(SHAPE, arch, 256, settings(**values), 512)
        assert found is not None
        return found

    assert of(kv={"score": "recent"}).queries == (0, 0)
    assert of(type_k="f32").queries == (32 * 8 * 32 * 4,) * 2
    assert of(type_k="q8_0").queries == (32 * 8 * 32 * 2,) * 2
    assert of(type_k="q8_0", type_v="q8_0").rows == (1024 * (136 + 68), 256 * (68 + 34))
    lane = of("gpt2")
    assert (lane.layer_major, lane.stage, lane.hidden) == (False, 2048 * (384 + 192), 0)
    chunked = of(kv={"prefill": "chunked"})
    assert (chunked.stage_rows, chunked.hidden) == (1024 + 512, 256 * 512 * 4)
    assert of(kv={"prefill": "bounded"}) == of()


def test_nothing_more_is_taken_when_nothing_is_evicted() -> None:
    found = plan.budget_memory(SHAPE, "llama", 256, settings(kv={"rows": (2048, 9999)}), 512)
    assert found is not None
    assert found.capacity == (2048, 2048)
    assert found.total == found.full == sum(found.rows)
    almost = plan.budget_memory(SHAPE, "llama", 256, settings(kv={"rows": (9999, 2047)}), 512)
    assert almost is not None
    assert almost.capacity == row_capacity(KVSettings((9999, 2047)), 2048) == (2048 + 256, 2048 + 256)
    assert almost.stage > 0


@pytest.mark.parametrize("change", [{"window": (0, 64)}, {"exact": False}])
def test_models_that_cannot_have_a_budget_are_planned_without(change: dict[str, object]) -> None:
    shape = dataclasses.replace(SHAPE, **change)  # type: ignore[arg-type]
    assert not plan.takes_budget(shape)
    assert plan.budget_memory(shape, "llama", 256, settings(), 512) is None


def test_the_plan_counts_a_budgets_parts(spm_path: Path) -> None:
    outline = plan.outline(read_gguf(spm_path))
    assert outline.kv is not None
    asked = settings(n_seq_max=2)
    found = plan.budget_memory(outline.kv, "llama", outline.n_embd, asked, 512)
    planned = plan.plan_memory(outline, asked)
    assert found is not None
    assert planned.budget == found
    assert planned.context == found.total
    assert planned.kv_per_layer == found.kept_per_layer
    for gpu_layers in (1, 2, 3):
        host, gpu = plan.plan_memory(outline, asked, gpu_layers=gpu_layers).devices
        layers = gpu_layers - 1
        on_gpu = sum(found.kept_per_layer[2 - layers :]) if layers else 0
        assert gpu.context == on_gpu + (found.reading if layers else 0)
        assert host.context == found.kept - on_gpu + (found.reading if layers < 2 else 0)


def test_budgets_make_room_for_conversations(spm_path: Path) -> None:
    outline = plan.outline(read_gguf(spm_path))
    policy = KVPolicy(Budget(rows=100), Uniform())
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
    arguments = ["plan", spm_path, "--ctx", 4000, "--kv-budget", "12%", *(["--estimate"] if estimate else [])]
    planned = json.loads(ziggurat(capsys, *arguments, "--json")[1])["plan"]
    budget = planned["kv_budget"]
    assert (planned["kv_budget_asked"], budget["score"], budget["prefill"]) == ("12%", "snapkv", "exact")
    assert sum(budget["rows_per_layer"]) == 2 * 480
    parts = ("rows_bytes", "position_bytes", "query_bytes", "stage_bytes", "hidden_bytes")
    assert 0 <= planned["kv_bytes"] - sum(budget[part] for part in parts) <= 2000
    assert planned["kv_exact"]
    code, out, _ = ziggurat(capsys, *arguments)
    text = " ".join(out.split())
    assert code == 0
    assert "KV budget 12%:" in text
    assert "480 on average; to keep every row would take 1.00 MiB" in text
    assert "stage of one layer" in text


def test_the_command_says_when_a_model_cannot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tiny_models.write_model(tmp_path / "m.gguf", Shape(arch="gemma3", n_layer=6, sliding_window=64))
    code, out, _ = ziggurat(capsys, "plan", path, "--kv-budget", 64)
    assert code == 0
    assert "cannot have a KV budget" in " ".join(out.split())
    assert json.loads(ziggurat(capsys, "plan", path, "--kv-budget", 64, "--json")[1])["plan"]["kv_budget"] is None
