from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssd_lit.moe.clustering import random_balanced
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.permutation import moefy
from ssd_lit.moe.routers import CenterRouter
from ssd_lit.moe.similarity import PatternTracker, pattern_similarity


def adjusted_rand_by_pairs(a: Tensor, b: Tensor) -> float:
    """Hubert and Arabie's index, counted pair by pair."""
    pairs = list(combinations(range(len(a)), 2))
    both = sum(bool(a[i] == a[j] and b[i] == b[j]) for i, j in pairs)
    in_a = sum(bool(a[i] == a[j]) for i, j in pairs)
    in_b = sum(bool(b[i] == b[j]) for i, j in pairs)
    expected = in_a * in_b / len(pairs)
    return (both - expected) / ((in_a + in_b) / 2 - expected)


def test_similarity_is_the_mean_adjusted_rand_index_over_layers() -> None:
    before = [random_balanced(24, 4, seed=s) for s in (1, 2)]
    after = [before[0].clone(), random_balanced(24, 4, seed=9)]
    after[0][:5] = after[0][:5].flip(0)
    expected = sum(map(adjusted_rand_by_pairs, before, after)) / 2
    assert pattern_similarity(before, after) == pytest.approx(expected, abs=1e-12)


def test_names_of_clusters_do_not_matter_and_chance_gives_zero() -> None:
    labels = random_balanced(512, 16, seed=0)
    assert pattern_similarity([labels], [(labels + 5) % 16]) == 1.0
    chance = [pattern_similarity([labels], [random_balanced(512, 16, seed=s)]) for s in range(1, 9)]
    assert abs(sum(chance) / len(chance)) < 0.01


def test_the_tracker_compares_each_clustering_with_the_last() -> None:
    torch.manual_seed(1)
    w = torch.randn(64, 8)
    tracker = PatternTracker(8, seed=0)
    assert tracker.update([w]) is None
    before = tracker.labels[0]
    moved = w + 0.5 * torch.randn_like(w)
    found = tracker.update([moved])
    assert found is not None
    assert 0 < found < 1
    assert found == pytest.approx(adjusted_rand_by_pairs(before, tracker.labels[0]))
    assert tracker.update([moved]) == 1.0


def test_a_tracker_restored_from_disk_goes_on_the_same(tmp_path: Path) -> None:
    torch.manual_seed(2)
    weights = [torch.randn(64, 8), torch.randn(64, 8)]
    first, second = PatternTracker(8, seed=0), PatternTracker(8, seed=0)
    first.update(weights)
    torch.save(first.state_dict(), tmp_path / "state")
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    changed = [w + 0.3 * torch.randn_like(w) for w in weights]
    assert first.update(changed) == second.update(changed)
    assert all(map(torch.equal, first.labels, second.labels))


def test_neurons_that_moved_into_expert_order_are_still_known() -> None:
    torch.manual_seed(3)
    ffn = ExpertFFN(8, 64, experts=8, top_k=2, router=CenterRouter(8, 8))
    # Groups that every clustering finds, whatever the order.
    groups = torch.arange(64).remainder(8)
    ffn.w_in.data += 10 * torch.eye(8)[groups]
    tracker = PatternTracker(8, seed=0)
    tracker.update([ffn.w_in])
    tracker.reorder([moefy(ffn, tracker.labels[0])])
    assert torch.equal(tracker.labels[0], torch.arange(8).repeat_interleave(8))
    assert tracker.update([ffn.w_in]) == 1.0
