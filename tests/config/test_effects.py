"""Keys that nothing reads are refused where they are given, and nowhere else."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ssd_lit.config import (
    ConfigError,
    Method,
    RunConfig,
    Section,
    dump,
    load_downstream,
    load_experiment,
    load_resolved,
    load_run,
)
from ssd_lit.config.effects import RULES, digest_of
from ssd_lit.config.experiment import Experiment
from ssd_lit.paths import write_configs
from tests.conftest import tiny_experiment

ARMS: dict[str, Any] = {
    "dense": {"method": "dense"},
    "ssd": {"method": "ssd"},
    "sparse": {"method": "sparse"},
    "up": {"method": "upcycle", "parent_arm": "dense", "moe": {"router": "random"}},
    "posthoc": {"method": "posthoc", "parent_arm": "dense"},
}


def experiment(folder: Path, **content: Any) -> Path:
    """The tiny experiment with content of its own."""
    path = tiny_experiment(folder, arms=ARMS).with_name("own.yaml")
    path.write_text(yaml.safe_dump({"base": "tiny.yaml", **content}), encoding="utf-8")
    return path


def of_arm(name: str, **changes: Any) -> dict[str, Any]:
    return {"arms": {name: changes}}


def only(name: str) -> dict[str, Any]:
    """All arms dropped but one, and the dense one that it may start from."""
    return {"arms": {other: None for other in ARMS if other not in (name, "dense")}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {"family": "llama", "dropout": 0.1}},
            "model.dropout: .*llama, mistral, qwen2, qwen3 have no dropout",
        ),
        (of_arm("dense", moe={"top_k": 1}), r"arms\.dense\.moe\.top_k: .*dense have no experts"),
        (of_arm("dense", switching={"tau": 0.5}), r"arms\.dense\.switching\.tau: .*only method ssd switches"),
        (of_arm("sparse", switching={"check_every": 5}), "switching.check_every: .*only dense phases are checked"),
        (of_arm("posthoc", grid={"switching.tau": [0.1, 0.2]}), r"arms\.posthoc\.grid\.switching\.tau: "),
        (of_arm("posthoc", grid={"switching": [{"tau": 0.1}]}), r"arms\.posthoc\.grid\.switching: "),
        (of_arm("sparse", moe={"k_schedule": {"kind": "linear", "stairs": 2}}), "k_schedule.stairs: .*kind step"),
        (of_arm("sparse", moe={"k_schedule": {"start": 2}}), "k_schedule.start: .*constant does not change k"),
        (of_arm("posthoc", moe={"k_schedule": {"kind": "linear"}}), "k_schedule.kind: .*no sparse phase"),
        ({"moe": {"balance_weight": 0.1}}, "moe.balance_weight: .*only moe.router gate"),
        (of_arm("ssd", moe={"router_steps": 5}), "moe.router_steps: .*only a moe.posthoc_router"),
        (of_arm("ssd", moe={"posthoc_router": "centers", "router_hidden": 5}), "router_hidden: .*have an MLP"),
        (of_arm("posthoc", moe={"posthoc_router": "centers", "router": "random"}), "moe.router: .*chooses instead"),
        (of_arm("up", moe={"construction": "random"}), "moe.construction: .*copies of whole FFNs"),
        (of_arm("sparse", moe={"permute_optimizer": False}), "moe.permute_optimizer: .*only in method ssd"),
        ({"moe": {"calibration_blocks": 4}}, "moe.calibration_blocks: .*kmeans_activations and coactivation"),
        ({"optim": {"decay_fraction": 0.1}}, "optim.decay_fraction: .*only optim.schedule wsd"),
        (of_arm("posthoc", optim={"lr": 0.1}), r"arms\.posthoc\.optim\.lr: .*trains nothing but a router"),
        (of_arm("posthoc", training={"steps": 10}), "training.steps: .*takes no training step"),
        (of_arm("dense", match_flops_of_arm="ssd", training={"steps": 10}), "training.steps: .*match_flops_of_arm"),
        ({"training": {"non_finite_limit": 3}}, "training.non_finite_limit: .*non_finite skip"),
        (of_arm("ssd", switching={"switch_points": [10, 20], "tau": 0.5}), "switching.tau: .*switch_points says"),
        ({"evaluation": {"thresholds": [0.5]}}, "evaluation.thresholds: .*only a moe.posthoc_router"),
        ({"analysis": {"experts": [4]}}, "analysis.experts: .*no snapshots"),
        ({"moe": {"backend": "loop"}, **only("dense")}, "moe.backend: .*dense have no experts"),
        ({"switching": {"sparse_steps": 8}, **only("sparse")}, "switching.sparse_steps: .*only method ssd"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"own.yaml: .*{message}"):
        load_experiment(experiment(tmp_path, **content))


@pytest.mark.parametrize(
    "content",
    [
        # Shared by arms of several methods, one of which reads it.
        {"switching": {"tau": 0.5}, "moe": {"top_k": 1, "permute_optimizer": False}, "model": {"dropout": 0.2}},
        # The number of clusters of a dense arm, and how often they are compared.
        of_arm("dense", moe={"experts": 8}, switching={"check_every": 2}),
        of_arm("sparse", moe={"k_schedule": {"kind": "step", "start": 1, "stairs": 2}}),
        of_arm("sparse", moe={"k_schedule": {"end": 1}}),
        # Read in one cell of the grid.
        of_arm("ssd", moe={"router_hidden": 8}, grid={"moe.posthoc_router": [None, "mass_mlp"]}),
        of_arm("ssd", moe={"calibration_blocks": 4, "construction": "coactivation"}),
        {"moe": {"calibration_blocks": 4}, "training": {"snapshot_every": 10}, "analysis": {"experts": [4]}},
        of_arm("posthoc", moe={"posthoc_router": "centers", "router_lr": 0.1}, training={"batch_size": 2}),
        {"optim": {"schedule": "wsd", "decay_fraction": 0.1, "min_lr_fraction": 0.2}},
        of_arm("ssd", switching={"switch_points": [10, 20], "check_every": 5}),
    ],
)
def test_a_key_that_some_run_reads_is_taken(tmp_path: Path, content: dict[str, Any]) -> None:
    load_experiment(experiment(tmp_path, **content))


def test_what_a_base_or_a_resolved_config_says_need_not_be_read(tmp_path: Path) -> None:
    path = experiment(tmp_path, **only("dense"))
    checked = load_experiment(path)
    assert checked.switching
    written = path.with_name("written.yaml")
    written.write_text(dump(checked), encoding="utf-8")
    assert load_experiment(written) == load_resolved(written) == checked
    for run in write_configs(checked, tmp_path):
        assert load_run(tmp_path / "tiny/runs" / run.name / "config.yaml") == run


def test_only_what_is_laid_over_is_looked_at_where_something_is(tmp_path: Path) -> None:
    path = experiment(tmp_path, switching={"tau": 0.5})
    load_experiment(path, {"switching": {"switch_points": [10, 20]}})
    with pytest.raises(ConfigError, match=r"switching\.tau: has no effect here"):
        load_experiment(path, {"switching": {"switch_points": [10, 20], "tau": 0.5}})


def test_every_rule_is_about_a_key_that_there_is() -> None:
    known = {
        f"{name}.{key}"
        for kind in (RunConfig, Experiment)
        for name, field in kind.model_fields.items()
        for section in (field.annotation, *get_args(field.annotation))
        if isinstance(section, type) and issubclass(section, Section)
        for key in section.model_fields
    }
    known |= {f"moe.k_schedule.{key}" for key in ("start", "stairs")}
    known |= {f"data.tokenizer.{key}" for key in ("vocab_size", "train_megabytes")}
    assert {key for rule in RULES for key in rule.keys} <= known
    assert {arm["method"] for arm in ARMS.values()} == set(get_args(Method))


def test_what_models_are_tried_on_must_be_there_before_work_and_may_be_gone_after_it(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    path = experiment(tmp_path, **only("dense"), downstream={"blimp": {"file": str(pairs)}})
    checked = load_experiment(path)
    (tmp_path / "done.yaml").write_text(dump(checked), encoding="utf-8")
    assert checked.downstream is not None
    (tmp_path / "downstream.yaml").write_text(dump(checked.downstream), encoding="utf-8")
    pairs.rmdir()
    assert load_resolved(tmp_path / "done.yaml") == checked
    for reads in (lambda: load_experiment(path), lambda: load_downstream(tmp_path / "downstream.yaml")):
        with pytest.raises(ConfigError, match=rf"downstream\.blimp: no file or folder '{pairs}'"):
            reads()


def test_the_digest_is_of_what_decides_a_runs_numbers(tmp_path: Path) -> None:
    def digests(**content: Any) -> dict[str, str]:
        return {run.arm: digest_of(run) for run in load_experiment(experiment(tmp_path, **content)).runs()}

    before = digests()
    assert len(set(before.values())) == len(ARMS)
    for same in (
        {"arms": {"ssd": {"label": "Ours"}}}, {"training": {"devices": 2}}, {"training": {"checkpoint_every": 7}},
        {"training": {"keep_phases": True}}, {"training": {"non_finite": "skip", "non_finite_limit": 3}},
    ):  # fmt: skip
        assert digests(**same) == before
    # A changed setting is told from the one before by the arms that read it, and by no others.
    for content, arms in (
        ({"switching": {"tau": 0.123}}, {"ssd"}),
        ({"switching": {"final_sparse_every": 3}}, {"ssd"}),
        ({"moe": {"top_k": 1}}, set(ARMS) - {"dense"}),
        ({"optim": {"beta2": 0.9}}, set(ARMS) - {"posthoc"}),
        ({"training": {"devices": 2, "shard": True}}, set(ARMS) - {"posthoc"}),
    ):
        assert {arm for arm, digest in digests(**content).items() if digest != before[arm]} == arms
