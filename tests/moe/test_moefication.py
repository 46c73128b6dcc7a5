"""The claims that the method rests on, in float64."""

import copy

import pytest
import torch
from torch import Tensor

from ssd_lit.config import ModelConfig, MoEConfig, OptimConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import Batch
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.clustering import balanced_kmeans, normalised_rows, random_balanced
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.permutation import moefy, permute_neurons
from ssd_lit.moe.routers import CenterRouter
from ssd_lit.training.optim import build_optimizer

EXPERTS, V = 8, 61


def language_model(seed: int = 0, top_k: int = 3) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(
        ModelConfig(layers=2, d_model=16, heads=2, d_ff=64),
        MoEConfig(experts=EXPERTS, top_k=top_k),
        VocabInfo(V, eos_id=0),
        context=12,
    ).double()  # fmt: skip
    for parameter in model.parameters():  # biases too, which start at zero
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randint(V, (4, 12), generator=g) for name in ("inputs", "targets")}


def moefy_all(model: LanguageModel, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    return [
        moefy(ffn, balanced_kmeans(normalised_rows(ffn.w_in), EXPERTS, seed=1).labels, optimizer) for ffn in model.ffns
    ]


@pytest.mark.parametrize("seed", range(3))
def test_dense_mode_computes_the_same_function_after_moefication(seed: int) -> None:
    model = language_model(seed)
    before = model(batch(seed))
    orders = moefy_all(model)
    assert any(not torch.equal(order, torch.arange(len(order))) for order in orders)
    assert (model(batch(seed)) - before).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["masked", "loop", "grouped"])
def test_with_all_experts_on_sparse_equals_dense(backend: str) -> None:
    model = language_model(4)
    moefy_all(model)
    if backend == "grouped":  # grouped products exist for float32 only
        model.float()
    dense = model(batch(4))
    model.set_mode("sparse", 2)
    for ffn in model.ffns:
        ffn.backend = backend
        # Every expert holds at least none of the activation mass. (With top_k = E the dense FFN itself is run.)
        ffn.oracle, ffn.threshold = True, 0.0
        assert ffn.route(torch.randn(5, 16, dtype=ffn.w_in.dtype)).experts.unique().tolist() == list(range(EXPERTS))
    assert (model(batch(4)) - dense).abs().max() < (1e-4 if backend == "grouped" else 1e-12)
    for ffn in model.ffns:
        ffn.oracle, ffn.threshold = False, None
    assert (model(batch(4)) - dense).abs().max() > 1e-3
    model.set_mode("sparse", EXPERTS)
    assert torch.equal(model(batch(4)), dense)


def test_an_optimiser_step_after_a_round_trip_equals_one_without_it_up_to_the_order() -> None:
    plain = language_model(5)
    optimizer = build_optimizer(plain, OptimConfig())
    train(plain, optimizer, seeds=(1, 2, 3))
    moved = copy.deepcopy(plain)
    moved_optimizer = build_optimizer(moved, OptimConfig())
    moved_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    orders = moefy_all(moved, moved_optimizer)
    moved.set_mode("sparse")
    moved.set_mode("dense")
    train(plain, optimizer, seeds=(4,))
    train(moved, moved_optimizer, seeds=(4,))

    for ffn, order in zip(plain.ffns, orders, strict=True):
        permute_neurons(ffn, order)
    for (name, a), b in zip(plain.named_parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)


def test_moments_left_behind_would_be_noticed() -> None:
    """The round-trip test can fail: without moving Adam's moments the next step differs."""
    plain = language_model(5)
    optimizer = build_optimizer(plain, OptimConfig())
    train(plain, optimizer, seeds=(1, 2, 3))
    moved = copy.deepcopy(plain)
    moved_optimizer = build_optimizer(moved, OptimConfig())
    moved_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    orders = moefy_all(moved)
    train(plain, optimizer, seeds=(4,))
    train(moved, moved_optimizer, seeds=(4,))
    permute_neurons(plain.ffns[0], orders[0])
    assert (plain.ffns[0].w_in - moved.ffns[0].w_in).abs().max() > 1e-6


def train(model: LanguageModel, optimizer: torch.optim.Optimizer, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        model.loss(batch(seed)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_labels_of_unequal_clusters_are_refused() -> None:
    ffn = ExpertFFN(4, 8, experts=2, top_k=1, router=CenterRouter(4, 2))
    with pytest.raises(ValueError, match="4 of 8 neurons into each of 2 experts"):
        moefy(ffn, torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]))
    with pytest.raises(ValueError, match="permutation"):
        permute_neurons(ffn, torch.tensor([0, 0, 1, 2, 3, 4, 5, 6]))
    moefy(ffn, random_balanced(8, 2, seed=0))
