"""The engine with a KV budget over a model some of whose layers have a sliding window."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command import Ziggurat
from helpers.tiny_models import Shape, write_model
from ziggurat.runtime.budget import Budget, Uniform
from ziggurat.runtime.engine.llama_engine import EngineSettings, LlamaEngine
from ziggurat.runtime.engine.protocol import GenerationRequest
from ziggurat.runtime.kv_policy import KVPolicy

pytestmark = pytest.mark.usefixtures("budgets")
SHAPE = Shape("gemma2", n_layer=4, sliding_window=40, softcap=3.0)
RING = 768  # rows: the window and a ubatch of 512
LENGTH = 900


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.gguf", SHAPE)


def test_the_figures_are_of_the_layers_they_say(ziggurat: Ziggurat, path: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    code, _, err = ziggurat(
        "run", path, "a" * (2 * LENGTH), "--raw", "-n", 5, "--ctx", 2048, "--kv-budget", 100, "--kv-policy", "snapkv",
        "--stats", stats,
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(stats.read_text())
    tokens = told["prompt_tokens"]
    assert tokens > RING
    assert told["kv_rows_per_layer"] == [RING, 100, RING, 100]
    # of the generated tokens the last one is not computed any more
    assert told["evicted_rows"] == 2 * (tokens - 100)
    row = 2 * SHAPE.head_dim * 2 * 2
    assert told["kv_bytes_full"] == (2 * RING + 2 * 2048) * row
    assert told["kv_bytes"] > (2 * RING + 2 * 256) * row


def test_turns_drafts_and_forks(path: Path) -> None:
    """Conversations go on where they were and share beginnings, by what the sliding layers still hold."""
    policy = KVPolicy(Budget(rows=100), Uniform(), reading=1)
    settings = EngineSettings(n_ctx=2048, threads=1, kv=policy, parallel=2, cached=1, prompt_lookup=True)
    with LlamaEngine(path, settings) as engine:
        assert engine.load().kv_unsupported is None
        tokens = engine.tokenize("abcab" * 200)
        for turn in range(3):
            request = GenerationRequest(tokens=tuple(tokens), max_tokens=20, conversation="one")
            events = list(engine.stream(request))
            stats = events[-1].stats
            assert stats.generated_tokens == 20
            assert (turn == 0) == (stats.reused_tokens == 0)
            tokens = [*tokens, *(event.token for event in events[:-1]), *engine.tokenize("cde" * 20)]
        kept = engine.kept("one")
        assert kept.budgets == (0, 100, 0, 100)
        assert kept.positions[0].shape[1] == kept.positions[2].shape[1] == RING
