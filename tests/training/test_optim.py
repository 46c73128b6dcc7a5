import itertools

import pytest
import torch

from ssd_lit.config import OptimConfig
from ssd_lit.training.optim import build_optimizer, build_scheduler, leave_out_if, lr_factor


def test_norms_and_biases_are_not_decayed() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    decayed, plain = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[1].weight)}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert len(plain["params"]) == 3


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_rate_rises_to_one_and_falls_to_its_floor_at_the_last_step(schedule: str) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=10, min_lr_fraction=0.1, decay_fraction=0.25)  # type: ignore[arg-type]
    factors = [lr_factor(step, config=config, steps=100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors[99] == pytest.approx(0.1)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(factors[9:]))
    if schedule == "wsd":
        assert factors[60] == 1.0
    else:
        assert factors[55] == pytest.approx(0.55, abs=0.02)


def test_the_scheduler_follows_the_factor() -> None:
    config = OptimConfig(lr=2e-3, warmup_steps=4)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    scheduler = build_scheduler(optimizer, config, steps=20)
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * lr_factor(step, config=config, steps=20))
        optimizer.step()
        scheduler.step()


def test_state_of_another_kernel_loads_and_goes_on_alike() -> None:
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (build_optimizer(model, OptimConfig()) for model in models)
    x = torch.randn(4, 3)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    step(models[0], ours)
    step(models[1], theirs)
    state = theirs.state_dict()
    for group in state["param_groups"]:
        group["fused"] = None
    fresh = build_optimizer(models[1], OptimConfig())
    fresh.load_state_dict(state)
    assert [group["fused"] for group in fresh.param_groups] == [True, True]
    assert not any(group["fused"] for group in state["param_groups"])
    step(models[0], ours)
    step(models[1], fresh)
    assert torch.equal(models[0].weight, models[1].weight)


def test_an_update_left_out_changes_neither_weights_nor_state() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig())

    def step(x: float, left_out: float) -> list[torch.Tensor]:
        optimizer.zero_grad()
        model(torch.full((1, 3), x)).sum().backward()
        leave_out_if(torch.tensor(left_out), optimizer)
        optimizer.step()
        state = [value for one in optimizer.state_dict()["state"].values() for value in one.values()]
        return [value.clone() for value in [*model.state_dict().values(), *state]]

    before = step(1.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, step(torch.inf, 1.0), strict=True))
    after = step(1.0, 0.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
