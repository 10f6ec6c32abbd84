"""Choosing blocks: what may be asked for, guards, the three criteria on made-up measurements, families that refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ziggurat.converter import prune
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import PruneError
from ziggurat.converter.prune import PruneSettings
from ziggurat.converter.prune_families import UNSAFE, check_prunable


@pytest.mark.parametrize(("text", "wanted"), [("3", (3, None)), ("25%", (None, 25.0)), (" 12.5 % ", (None, 12.5))])
def test_amount(text: str, wanted: tuple[int | None, float | None]) -> None:
    assert prune.parse_amount(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "0%", "-1", "1.5", "100%", "250%", "x", "3 blocks", "nan%", "٣", "1e2"])
def test_amount_refused(text: str) -> None:
    with pytest.raises(PruneError):
        prune.parse_amount(text)


@pytest.mark.parametrize(("text", "wanted"), [("3", (3,)), ("7,5", (5, 7)), ("2 - 4, 3,9", (2, 3, 4, 9)), ("05", (5,))])
def test_list(text: str, wanted: tuple[int, ...]) -> None:
    assert prune.parse_blocks(text) == wanted


@pytest.mark.parametrize("text", ["", ",", "3,", "a", "4-2", "-1", "3;4", "1-2-3", "99999999999"])
def test_list_refused(text: str) -> None:
    with pytest.raises(PruneError):
        prune.parse_blocks(text)


@pytest.mark.parametrize(
    ("asked", "n"), [({"count": 3}, 3), ({"percent": 25.0}, 2), ({"percent": 7.0}, 1), ({"percent": 31.5}, 3)]
)
def test_number(asked: dict[str, Any], n: int) -> None:
    assert prune.number_to_remove(PruneSettings(**asked), 8) == n


@pytest.mark.parametrize(
    ("asked", "n_layer", "message"),
    [
        ({"count": 9}, 8, "the model has 8"),
        ({"count": 8}, 8, "at most 6"),
        ({"count": 7}, 8, "at most 6"),
        ({"percent": 90.0}, 8, "at most 6"),
        ({"percent": 5.0}, 8, "12.5%"),
        ({"count": 1}, 2, "none can go"),
        ({"count": 1}, 1, "none can go"),
    ],
)
def test_number_refused(asked: dict[str, Any], n_layer: int, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        prune.number_to_remove(PruneSettings(**asked), n_layer)


@pytest.mark.parametrize(
    ("blocks", "message"), [((8,), "no block 8"), ((0,), "first"), ((3, 7), "last"), ((0, 99), "no block 99")]
)
def test_blocks_refused(blocks: tuple[int, ...], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        prune.check_blocks(blocks, 8)


def test_blocks() -> None:
    assert prune.check_blocks((5, 1, 6), 8) == (1, 5, 6)


def test_influence_takes_the_least_but_never_the_ends() -> None:
    influence = np.array([0.0, 0.3, 0.1, 0.2, 0.1, 0.4, 0.05, 0.0])
    assert prune.by_influence(influence, 1) == (6,)
    assert prune.by_influence(influence, 2) == (4, 6)
    assert prune.by_influence(influence, 3) == (2, 4, 6)


def test_angular_takes_the_run_that_turns_least() -> None:
    angular = np.ones((6, 7))
    angular[0, 2] = angular[4, 6] = 0.0  # they would take the first and the last block
    angular[3, 5] = 0.1
    angular[1, 4] = 0.2
    assert prune.by_angular(angular, 2) == (3, 4)
    assert prune.by_angular(angular, 3) == (1, 2, 3)
    assert prune.by_angular(angular, 4) == (1, 2, 3, 4)


def test_perplexity_is_greedy() -> None:
    asked: list[tuple[int, ...]] = []

    def losses(removed: tuple[int, ...], candidates: Sequence[int]) -> list[float]:
        asked.append(removed)
        assert set(candidates) == {1, 2, 3, 4} - set(removed)
        # 3 costs least alone; without it 2 costs most, though it was second
        return [{1: 4.0, 2: 2.0, 3: 1.0, 4: 3.0}[c] + (9 if removed and c == 2 else 0) for c in candidates]

    assert prune.by_perplexity(losses, 6, 2) == (3, 4)
    assert asked == [(), (3,)]


def test_perplexity_without_a_finite_loss() -> None:
    with pytest.raises(PruneError, match="damaged"):
        prune.by_perplexity(lambda removed, candidates: [float("nan")] * len(candidates), 6, 1)


def test_runs() -> None:
    assert prune.runs([7, 2, 3, 5, 4]) == [(2, 4), (7, 1)]
    assert prune.runs([]) == []


def checkpoint(architecture: str, **config: object) -> Checkpoint:
    return Checkpoint(Path("model"), config, architecture, {})


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel"])
def test_families_that_stand_it(name: str) -> None:
    plain = {"layer_types": ["full_attention"] * 4, "mlp_only_layers": [], "decoder_sparse_step": 1}
    check_prunable(checkpoint(name, **plain, use_sliding_window=False))


@pytest.mark.parametrize("name", UNSAFE)
def test_families_that_refuse_say_why(name: str) -> None:
    with pytest.raises(PruneError, match="by their index|belongs to them"):
        check_prunable(checkpoint(name))


def test_an_unknown_family_refuses() -> None:
    with pytest.raises(PruneError, match="not known here"):
        check_prunable(checkpoint("SomethingForCausalLM"))


@pytest.mark.parametrize(
    "config",
    [
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"use_sliding_window": True},
        {"no_rope_layers": [1, 1, 1, 0]},
        {"first_k_dense_replace": 1},
        {"mlp_only_layers": [2]},
        {"decoder_sparse_step": 2},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_a_configuration_with_a_pattern_refuses(config: dict[str, object]) -> None:
    with pytest.raises(PruneError, match=next(iter(config))):
        check_prunable(checkpoint("LlamaForCausalLM", **config))
