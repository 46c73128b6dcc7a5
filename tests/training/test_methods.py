"""What each method promises, on real runs of a tiny model."""

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_lit.cli import main
from ssd_lit.config import load_experiment
from ssd_lit.data.index import VocabInfo, load_index
from ssd_lit.data.objectives import Batch
from ssd_lit.models.flops import forward_costs
from ssd_lit.paths import run_dir
from ssd_lit.records import read_chain
from ssd_lit.support.files import read_json
from ssd_lit.tracking.metrics_log import read_metrics
from ssd_lit.training.checkpoint import ROUTER
from ssd_lit.training.module import Pretraining
from tests.conftest import Bench, tiny_experiment

pytestmark = pytest.mark.whole_run

FFN = "model.backbone.transformer.h.0.mlp"


def checkpoint(bench: Bench, arm: str, stage: str | None = None) -> dict[str, Any]:
    """The checkpoint of a training stage that is done, the last one by default."""
    run = bench.open(arm)
    content: dict[str, Any] = torch.load(run.checkpoint(stage or run.training_stages[-1]), weights_only=True)
    return content


def weights(bench: Bench, arm: str, stage: str | None = None) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint(bench, arm, stage)["state_dict"]
    return found


def evaluated(bench: Bench, arm: str) -> dict[str, Any]:
    bench.phases(arm)
    bench.stage("evaluate", bench.dir(arm))
    found: dict[str, Any] = read_json(bench.dir(arm) / "evaluation.json")
    return found


def step_costs(bench: Bench, arm: str) -> tuple[Any, int]:
    run = bench.runs[arm]
    vocab = VocabInfo.of(load_index(bench.data / "tokens"))
    return forward_costs(run.model, run.moe, vocab, run.data.sequence_length), run.training.batch_size


def test_a_shared_warm_up_is_trained_once_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    grid = {"method": "ssd", "grid": {"moe.construction": ["kmeans", "random"]}}
    bench = Bench(tmp_path / "a", arms={"ssd": grid})
    owner, user = bench.runs
    assert bench.runs[user].shares_warmup == bench.runs[owner].name
    assert main(["train", str(bench.dir(user)), "--threads", "1"]) == 1
    first = bench.phases(owner, "warmup")[0]
    shared = bench.phases(user, "warmup")[0]
    assert replace(shared, inputs={}, provenance={}) == replace(first, inputs={}, provenance={})
    bench.phases(user)

    alone = Bench(tmp_path / "b", arms={user: {"method": "ssd", "moe": {"construction": "random"}}})
    assert alone.runs[user].shares_warmup is None
    alone.phases(user)
    expected, got = weights(alone, user), weights(bench, user)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    curves = [read_metrics(b.dir(user) / "metrics.jsonl") for b in (alone, bench)]
    assert curves[0].keys() == curves[1].keys()
    assert curves[0]["train/loss"] == curves[1]["train/loss"]
    assert not torch.equal(weights(bench, owner, "warmup")[f"{FFN}.w_in"], got[f"{FFN}.w_in"])


def test_another_run_keeps_the_experts_that_ssd_trained_together(tmp_path: Path) -> None:
    arms = {
        "ssd": {"method": "ssd"},
        "routed": {"method": "posthoc", "parent_arm": "ssd", "moe": {"posthoc_router": "mass_mlp", "router_steps": 2}},
        "coarser": {"method": "posthoc", "parent_arm": "ssd", "moe": {"experts": 2, "top_k": 1}},
    }
    bench = Bench(tmp_path, arms=arms)
    for arm in arms:
        bench.phases(arm)
    size = bench.runs["ssd"].model.d_ff // bench.runs["ssd"].moe.experts
    found = {arm: weights(bench, arm) for arm in arms}
    for name in (name for name in found["ssd"] if name.endswith("neuron_ids")):
        trained, kept = ({frozenset(one.tolist()) for one in found[arm][name].split(size)} for arm in ("ssd", "routed"))
        assert trained == kept
        assert sorted(found["coarser"][name].tolist()) == list(range(len(found["ssd"][name])))


def test_matched_flops_are_those_of_the_other_arm_but_for_less_than_a_step(tmp_path: Path) -> None:
    arms = {
        "ssd": {"method": "ssd"},
        "stopped": {"method": "dense", "match_flops_of_arm": "ssd"},
        "smaller": {"method": "dense", "match_flops_of_arm": "ssd", "model": {"d_ff": 16}},
    }
    bench = Bench(tmp_path, arms=arms)
    spent = bench.phases("ssd")[-1].total
    stopped, smaller = bench.phases("stopped")[-1].total, bench.phases("smaller")[-1].total
    assert stopped.steps < spent.steps < smaller.steps
    for arm, total in (("stopped", stopped), ("smaller", smaller)):
        costs, blocks = step_costs(bench, arm)
        assert 0 <= spent.flops - total.flops < blocks * costs.dense()
    # The learning rate has run its whole course all the same.
    rates = [value for _, value in read_metrics(bench.dir("stopped") / "metrics.jsonl")["train/lr"]]
    assert rates[-1] == pytest.approx(0.1 * 1e-2)


def test_smoe_dropout_freezes_its_router_lets_k_grow_and_pays_for_what_it_runs(tmp_path: Path) -> None:
    moe = {"experts": 4, "top_k": 2, "router": "random", "k_schedule": {"kind": "linear", "start": 1, "end": 4}}
    bench = Bench(tmp_path, arms={"smoe": {"method": "sparse", "moe": moe}})
    bench.phases("smoe")
    before, after = weights(bench, "smoe", "moefy"), weights(bench, "smoe")
    routers = [name for name in before if ROUTER in name]
    assert len(routers) == 2
    assert all(torch.equal(before[name], after[name]) for name in routers)
    assert not torch.equal(before[f"{FFN}.w_in"], after[f"{FFN}.w_in"])
    ks = read_metrics(bench.dir("smoe") / "metrics.jsonl")["experts/top_k"]
    assert [k for _, k in ks] == sorted(k for _, k in ks)
    assert (ks[0][1], ks[-1][1]) == (1, 4)
    costs, blocks = step_costs(bench, "smoe")
    every_k = [round(1 + 3 * step / 39) for step in range(40)]
    expected = blocks * sum(costs.sparse(bench.runs["smoe"].moe, k) for k in every_k)
    assert read_chain(bench.dir("smoe"), "sparse")[-1].flops == pytest.approx(expected, rel=0.01)


def test_every_so_many_steps_all_experts_run_and_are_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, ran = Pretraining._losses, []

    def losses(self: Pretraining, batch: Batch) -> tuple[Tensor, Tensor | None]:
        ffn = self.model.ffns[0]
        ran.append(ffn.experts if ffn.mode == "dense" else ffn.top_k)
        return loss(self, batch)

    monkeypatch.setattr(Pretraining, "_losses", losses)
    moe = {"experts": 4, "top_k": 1, "router": "random", "k_schedule": {"all_every": 4}}
    bench = Bench(tmp_path, arms={"sparse": {"method": "sparse", "moe": moe}})
    bench.phases("sparse")
    assert ran == [1 if step % 4 else 4 for step in range(40)]
    # What is logged of the experts' load is of the schedule's k after every step.
    assert {k for _, k in read_metrics(bench.dir("sparse") / "metrics.jsonl")["experts/top_k"]} == {1}
    costs, blocks = step_costs(bench, "sparse")
    expected = blocks * sum(costs.sparse(bench.runs["sparse"].moe, 1 if step % 4 else 4) for step in range(40))
    assert read_chain(bench.dir("sparse"), "sparse")[-1].flops == pytest.approx(expected)


def test_the_last_dense_phase_may_have_sparse_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, validate, ran, validated = Pretraining._losses, Pretraining.validation_step, [], []

    def losses(self: Pretraining, batch: Batch) -> tuple[Tensor, Tensor | None]:
        ran.append(self.model.ffns[0].mode)
        return loss(self, batch)

    def validation_step(self: Pretraining, *arguments: Any) -> None:
        validated.append((self.global_step, self.model.ffns[0].mode))
        validate(self, *arguments)

    monkeypatch.setattr(Pretraining, "_losses", losses)
    monkeypatch.setattr(Pretraining, "validation_step", validation_step)
    switching = {"switch_points": [8, 12, 16, 28], "final_sparse_every": 4}
    bench = Bench(tmp_path, arms={"ssd": {"method": "ssd", "switching": switching, "training": {"validate_every": 3}}})
    chain = bench.phases("ssd")
    sparse = {*range(8, 12), *range(16, 28), 28, 32, 36}
    assert ran == ["sparse" if step in sparse else "dense" for step in range(40)]
    # After step 33, which was sparse, too.
    assert (33, "dense") in validated
    assert all(mode == "dense" for step, mode in validated if step > 28)
    costs, blocks = step_costs(bench, "ssd")
    moe, last = bench.runs["ssd"].moe, [record for record in chain if record.steps][-1]
    assert last.flops == pytest.approx(blocks * (3 * costs.sparse(moe, moe.top_k) + 9 * costs.dense()))


def test_a_validation_after_a_step_with_all_experts_is_of_the_schedules_k(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, ks = Pretraining.validation_step, []

    def validation_step(self: Pretraining, *arguments: Any) -> None:
        ks.append(self.model.ffns[0].top_k)
        validate(self, *arguments)

    monkeypatch.setattr(Pretraining, "validation_step", validation_step)
    moe = {"experts": 4, "top_k": 1, "router": "random", "k_schedule": {"all_every": 3}}
    # Steps 9, 18, 27 and 36 from 0 on run all experts; a validation follows the tenth.
    Bench(tmp_path, arms={"sparse": {"method": "sparse", "moe": moe}}).phases("sparse")
    assert set(ks) == {1}


def test_a_learned_gate_is_trained_with_the_model(tmp_path: Path) -> None:
    bench = Bench(tmp_path, arms={"gate": {"method": "sparse", "moe": {"router": "gate"}}})
    bench.phases("gate")
    before, after = weights(bench, "gate", "moefy"), weights(bench, "gate")
    assert not torch.equal(before[f"{FFN}.router.gate"], after[f"{FFN}.router.gate"])
    losses = [value for _, value in read_metrics(bench.dir("gate") / "metrics.jsonl")["validation/loss"]]
    assert losses[-1] < losses[0] - 0.3


def test_upcycling_begins_where_the_dense_model_ended_and_counts_its_copies(tmp_path: Path) -> None:
    moe = {"router": "gate", "experts": 4, "top_k": 2}
    arms = {
        "dense": {"method": "dense"},
        "up": {"method": "upcycle", "parent_arm": "dense", "moe": moe, "training": {"steps": 20}},
    }
    bench = Bench(tmp_path, arms=arms)
    dense = evaluated(bench, "dense")
    bench.phases("up", "moefy")
    copied = weights(bench, "up", "moefy")[f"{FFN}.w_in"]
    source = weights(bench, "dense")[f"{FFN}.w_in"]
    assert torch.equal(copied, torch.cat([source] * 4))
    points = bench.phases("up")
    validated = read_metrics(bench.dir("up") / "metrics.jsonl")["validation/loss"]
    assert validated[-1][1] < dense["loss_dense"] + 0.3
    costs, blocks = step_costs(bench, "up")
    # Two copies for a token are twice the FFN, and the gate comes on top.
    expected = blocks * 20 * (3 * (costs.rest + 2 * costs.ffn) + 3 * costs.scores)
    assert points[-1].flops == pytest.approx(expected)
    assert points[-1].total.flops == pytest.approx(expected + bench.phases("dense")[-1].total.flops)
    # It reads on where the dense run stopped.
    assert points[-1].total.tokens == (40 + 20) * 4 * 16


def test_a_dense_model_cut_into_experts_trains_on(tmp_path: Path) -> None:
    arms = {
        "dense": {"method": "dense"},
        "cut": {"method": "sparse", "parent_arm": "dense", "moe": {"router": "gate", "construction": "kmeans"}},
    }
    bench = Bench(tmp_path, arms=arms)
    bench.phases("dense")
    record = bench.phases("cut")[-1]
    assert (record.total.steps, record.total.sparse_steps) == (80, 40)
    source, cut = weights(bench, "dense")[f"{FFN}.b_in"], weights(bench, "cut", "moefy")[f"{FFN}.b_in"]
    assert torch.equal(source.sort().values, cut.sort().values)


@pytest.mark.parametrize("kind", ["mass_mlp", "norm_mlp", "centers"])
def test_router_training_touches_no_other_weight_and_learns(tmp_path: Path, kind: str) -> None:
    moe = {"experts": 8, "top_k": 2, "posthoc_router": kind, "router_steps": 120, "router_lr": 1e-2}
    bench = Bench(tmp_path, moe=moe, arms={"ssd": {"method": "ssd"}})
    chain = bench.phases("ssd")
    assert [record.mode for record in chain[-2:]] == ["moefy", "router"]
    before, after = weights(bench, "ssd", "sparse_phases"), weights(bench, "ssd")
    kept = [name for name in after if ROUTER not in name]
    assert kept == [name for name in before if ROUTER not in name]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    losses = [value for _, value in read_metrics(bench.dir("ssd") / "metrics.jsonl")["router/loss"]]
    assert losses[-1] < losses[0]
    assert chain[-1].total.steps == chain[-2].total.steps
    assert chain[-1].flops > 0
    assert evaluated(bench, "ssd")["router"] == kind


@pytest.mark.parametrize("kind", ["norm_mlp", "centers"])
def test_routers_are_trained_in_the_precision_of_the_run(tmp_path: Path, kind: str) -> None:
    moe = {"experts": 8, "top_k": 2, "posthoc_router": kind, "router_steps": 120, "router_lr": 1e-2}
    routed = {"method": "posthoc", "parent_arm": "dense", "moe": moe}
    arms = {"dense": {"method": "dense"}, "fp32": routed, "bf16": {**routed, "training": {"precision": "bf16"}}}
    bench = Bench(tmp_path, arms=arms)
    for arm in arms:
        bench.phases(arm)
    exact, rounded = (weights(bench, arm) for arm in ("fp32", "bf16"))
    for name in (name for name in exact if ROUTER in name):
        assert rounded[name].dtype == torch.float32
        error = (rounded[name] - exact[name]).norm() / exact[name].norm()
        assert 0 < error < 0.05, name
    assert evaluated(bench, "bf16")["loss_sparse"] == pytest.approx(evaluated(bench, "fp32")["loss_sparse"], rel=1e-3)


def test_moments_left_behind_are_the_only_difference_that_permute_optimizer_makes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, arms={"ssd": {"method": "ssd", "grid": {"moe.permute_optimizer": [True, False]}}})
    moved, left = bench.runs
    for arm in bench.runs:
        bench.phases(arm, "moefy")
    a, b = (checkpoint(bench, arm, "moefy") for arm in (moved, left))
    before = checkpoint(bench, left, "warmup")
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    first, second, third = (one["optimizer_states"][0]["state"] for one in (a, b, before))
    assert all(torch.equal(second[i]["exp_avg"], third[i]["exp_avg"]) for i in third)
    assert any(not torch.equal(first[i]["exp_avg"], third[i]["exp_avg"]) for i in third)


def test_phases_change_at_the_steps_given(tmp_path: Path) -> None:
    arms = {"ssd": {"method": "ssd", "switching": {"switch_points": [10, 20, 25, 31]}}}
    chain = Bench(tmp_path, arms=arms).phases("ssd")
    trained = [(record.mode, record.first_step, record.last_step) for record in chain if record.steps]
    assert trained == [
        ("dense", 0, 10), ("sparse", 10, 20), ("dense", 20, 25), ("sparse", 25, 31), ("dense", 31, 40),
    ]  # fmt: skip
    assert [r.ended_by for r in chain if r.steps] == ["switch point"] * 4 + ["budget"]
    assert chain[-1].mode == "moefy"


CONSTRUCTIONS = ("kmeans", "kmeans_activations", "coactivation", "random", "contiguous")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A dense model, trained and measured, with an arm for each construction."""
    posthoc = {
        name: {"method": "posthoc", "parent_arm": "dense", "moe": {"construction": name}} for name in CONSTRUCTIONS
    }
    bench = Bench(tmp_path_factory.mktemp("cut"), arms={"dense": {"method": "dense"}, **posthoc})
    evaluated(bench, "dense")
    return bench


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_every_construction_keeps_the_dense_function(cut: Bench, construction: str) -> None:
    dense, posthoc = read_json(cut.dir("dense") / "evaluation.json"), evaluated(cut, construction)
    assert posthoc["loss_dense"] == pytest.approx(dense["loss_dense"], rel=1e-6)
    ids = weights(cut, construction)[f"{FFN}.neuron_ids"]
    assert torch.equal(ids.sort().values, torch.arange(32))
    assert torch.equal(ids, torch.arange(32)) == (construction == "contiguous")
    source, moved = weights(cut, "dense")[f"{FFN}.w_in"], weights(cut, construction)[f"{FFN}.w_in"]
    assert torch.equal(source[ids], moved)


def test_snapshots_are_the_weights_at_their_steps(tmp_path: Path) -> None:
    training = {"steps": 40, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
                "checkpoint_every": 4, "snapshot_every": 10}  # fmt: skip
    bench = Bench(tmp_path, training=training, arms={"dense": {"method": "dense"}})
    bench.phases("dense")
    found = sorted((bench.dir("dense") / "snapshots").iterdir())
    assert [path.name for path in found] == [f"step-{step:08d}.pt" for step in (10, 20, 30, 40)]
    last = torch.load(found[-1], weights_only=True)["state_dict"]
    expected = weights(bench, "dense")
    assert all(torch.equal(expected[name], last[name]) for name in expected)


def test_who_trains_a_first_phase_for_several_decides_nothing(tmp_path: Path) -> None:
    """An arm may be dropped, or another one put before those that are done."""
    arms = {"a": {"method": "ssd"}, "b": {"method": "ssd", "moe": {"top_k": 1}}}
    bench = Bench(tmp_path, arms=arms)
    for arm in arms:
        bench.phases(arm)
    before = {arm: bench.checkpoint(arm).read_bytes() for arm in arms}
    first = {"0new": {"method": "ssd", "moe": {"top_k": 4}}}
    for changed in ({**first, **arms}, arms, {"b": arms["b"]}):
        config = tiny_experiment(tmp_path, arms=changed)
        bench.stage("configs", config, "--results", bench.results)
        for arm in changed.keys() - first.keys():
            assert all(bench.open(arm).is_done(stage) for stage in bench.open(arm).training_stages)
            bench.phases(arm)
            assert bench.checkpoint(arm).read_bytes() == before[arm]
    # What is not done yet takes over the first phase from whoever has it.
    config = tiny_experiment(tmp_path, arms={**first, **arms})
    bench.stage("configs", config, "--results", bench.results)
    owner, *_ = load_experiment(config).runs()
    assert bench.open("b").config.shares_warmup == owner.name
    bench.stage("train", run_dir(bench.results, owner), "--until", "warmup")
    for folder in ("stages", "phases", "checkpoints"):
        shutil.rmtree(bench.dir("b") / folder)
    bench.phases("b")
    expected = torch.load(io.BytesIO(before["b"]), weights_only=True)["state_dict"]
    found = weights(bench, "b")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
