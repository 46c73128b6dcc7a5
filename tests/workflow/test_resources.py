"""What jobs ask for, and runs that do not crowd on a GPU. A GPU is simulated by the variable that names it."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ssd_lit.config import load_experiment
from ssd_lit.pipeline.resources import NAMES, launcher, of_job
from ssd_lit.records import PhaseRecord
from tests.conftest import tiny_experiment
from tests.labelled import write_blimp
from tests.workflow.running import ROOT, command, prepared

ARMS = {"a": {"method": "dense"}, "b": {"method": "dense", "optim": {"lr": 5e-3}}}


def call(gpus: str, config: Path, results: Path, *targets: Path, options: tuple[str, ...] = (), share: int = 1) -> str:
    """What snakemake says, on a machine with these GPUs."""
    words = [*command(config, results, *map(str, targets), *options), f"gpu_share={share}"]
    done = subprocess.run(
        words, cwd=ROOT, env={**prepared(), "CUDA_VISIBLE_DEVICES": gpus}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.whole_run
def test_two_runs_on_one_gpu_train_one_after_the_other(tmp_path: Path) -> None:
    config, results = tiny_experiment(tmp_path, arms=ARMS), tmp_path / "results"
    runs = [results / f"tiny/runs/{arm}-seed0" for arm in ARMS]
    call("0", config, results, *(run / "stages/dense.json" for run in runs))
    first, second = sorted(
        (PhaseRecord.read(run / "phases/00-dense/phase.json").provenance for run in runs),
        key=lambda provenance: provenance["began"],
    )
    assert first["ended"] <= second["began"]


@pytest.mark.whole_run
@pytest.mark.parametrize(
    ("gpus", "share", "options", "limit"),
    [("0,1", 4, (), 8), ("0", 1, ("--resources", "gpu=3"), 3), ("", 1, (), None)],
)
def test_the_gpus_of_the_machine_limit_the_jobs_unless_told_otherwise(
    tmp_path: Path, gpus: str, share: int, options: tuple[str, ...], limit: int | None
) -> None:
    config, results = tiny_experiment(tmp_path, arms=ARMS), tmp_path / "results"
    told = call(gpus, config, results, results / ".mlflow-ready", options=("--touch", *options), share=share)
    found = re.search(r"Provided resources: .*gpu\D+(\d+)", told)
    assert (found and int(found[1])) == limit


@pytest.mark.whole_run
@pytest.mark.parametrize("share", [1, 0])
def test_every_rule_that_can_use_a_gpu_asks_for_it(tmp_path: Path, share: int) -> None:
    archive = write_blimp(tmp_path / "BLiMP.zip", {"one": ("syntax", [("a b", "b a")])})
    posthoc = {"method": "posthoc", "parent_arm": "dense", "moe": {"posthoc_router": "mass_mlp"}}
    config = tiny_experiment(
        tmp_path, arms={"dense": {"method": "dense"}, "ssd": {"method": "ssd"}, "posthoc": posthoc}, analysis={},
        downstream={"blimp": {"file": str(archive)}}, training={"steps": 40, "batch_size": 4, "devices": 2},
    )  # fmt: skip
    told = call("", config, tmp_path / "results", options=("-n",), share=share)
    asked = set(re.findall(r"^rule (\w+):\n(?:    .*\n)*?    resources: .*gpu=(\d)", told, re.MULTILINE))
    two, one = {"warmup", "sparse_phases", "dense"}, {"moefy", "route", "evaluate", "analyse", "downstream"}
    assert asked == ({(rule, "2") for rule in two} | {(rule, "1") for rule in one} if share else set())


@pytest.mark.parametrize(
    ("training", "stages", "expected"),
    [
        ({}, ["dense"], {"gpu": 1, "nodes": 1, "cpus_per_task": 1}),
        ({"threads": 6, "workers": 2}, ["dense"], {"gpu": 1, "nodes": 1, "cpus_per_task": 8}),
        ({"devices": 4, "workers": 1}, ["warmup", "moefy"], {"gpu": 4, "nodes": 1, "cpus_per_task": 8}),
        ({"devices": 4}, ["moefy"], {"gpu": 1, "nodes": 1, "cpus_per_task": 1}),
        ({"devices": 4, "nodes": 2}, ["evaluate"], {"gpu": 1, "nodes": 1, "cpus_per_task": 1}),
        ({"devices": 2, "nodes": 2, "threads": 8, "workers": 1}, ["dense"],
         {"gpu": 4, "gres": "gpu:2", "nodes": 2, "tasks_per_node": 2, "cpus_per_task": 5, "mpi": "srun"}),
        ({"nodes": 2}, ["dense"], {"gpu": 2, "gres": "gpu:1", "nodes": 2, "tasks": 2, "tasks_per_gpu": 0,
                                   "cpus_per_task": 1, "mpi": "srun"}),
    ],
)  # fmt: skip
def test_a_job_of_a_cluster_follows_the_config_of_its_run(
    tmp_path: Path, training: dict[str, int], stages: list[str], expected: dict[str, Any]
) -> None:
    sizes = {"steps": 40, "batch_size": 16, **training}
    (run,) = load_experiment(tiny_experiment(tmp_path, arms={"a": ARMS["a"]}, training=sizes)).runs()
    asked = of_job(run, stages, uses_gpu=True, cluster=True)
    assert asked == expected
    assert set(asked) <= set(NAMES)
    assert {"gpu", "gres"}.isdisjoint(of_job(run, stages, uses_gpu=False, cluster=True))
    starts = launcher(asked)
    assert bool(starts) == (asked["nodes"] > 1)
    if starts:
        each = f"--nodes=2 --ntasks-per-node={training.get('devices', 1)} --cpus-per-task={asked['cpus_per_task']} "
        assert starts == f"srun {each}"
