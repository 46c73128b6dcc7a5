"""The workflow for real: the shipped quick experiment from text to report, and what is done again when."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from shlex import quote
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient

from ssd_lit.cli import main
from ssd_lit.config import load_experiment
from ssd_lit.paths import data_dir
from ssd_lit.report.figures import figures_of
from ssd_lit.report.figures.style import arm_styles
from ssd_lit.report.results import load_results
from ssd_lit.support.files import read_json
from ssd_lit.tracking.store import tracking_uri
from tests.conftest import tiny_experiment
from tests.stress.same_results import run_differences
from tests.workflow.running import ENVIRONMENT, ROOT, command, snakemake

pytestmark = pytest.mark.whole_run


def test_the_quick_experiment_reaches_its_report(quick: Path) -> None:
    here = quick / "quick"
    with (here / "summary.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["dense", "ssd", "sparse", "posthoc"]
    assert all(int(row["steps"]) == 120 for row in rows.values())
    assert float(rows["ssd"]["sparse_fraction"]) == pytest.approx(0.4, abs=0.01)
    assert (
        float(rows["sparse"]["train_flops"]) < float(rows["ssd"]["train_flops"]) < float(rows["dense"]["train_flops"])
    )
    # Text, not noise: well below the uniform guess of 512 entries.
    assert all(float(row["val_ppl_dense"]) < 300 for row in rows.values())
    html = (here / "report.html").read_text(encoding="utf-8")
    assert all(f"{arm}-seed0" in html for arm in rows)
    names = figures_of(load_experiment(here / "experiment.yaml"))
    drawn = {path.name for path in (here / "figures").iterdir() if not path.name.startswith(".")}
    assert drawn == {f"{name}.{kind}" for name in names for kind in ("svg", "png", "csv")}
    for run in (here / "runs").iterdir():
        assert list((run / "logs").iterdir())
        assert list((run / "benchmarks").iterdir())


def test_mlflow_holds_one_run_for_each_run_with_all_its_points(quick: Path) -> None:
    client = MlflowClient(tracking_uri(quick))
    experiment = client.get_experiment_by_name("quick")
    runs = [r for r in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" not in r.data.tags]
    # Nothing else stands in the charts' legends: the report and the stages are children.
    assert sorted(r.info.run_name for r in runs) == ["dense-seed0", "posthoc-seed0", "sparse-seed0", "ssd-seed0"]
    (ssd,) = [r for r in runs if r.info.run_name == "ssd-seed0"]
    recorded = [json.loads(line) for line in (quick / "quick/runs/ssd-seed0/metrics.jsonl").read_text().splitlines()]
    expected = sorted((p["step"], p["values"]["train/loss"]) for p in recorded if "train/loss" in p["values"])
    assert sorted((m.step, m.value) for m in client.get_metric_history(ssd.info.run_id, "train/loss")) == expected
    assert expected[-1][0] == 120
    evaluation = read_json(quick / "quick/runs/ssd-seed0/evaluation.json")
    assert ssd.data.metrics["eval/loss_sparse"] == evaluation["loss_sparse"]
    assert any(name.startswith("system/") for name in ssd.data.metrics)


def test_mlflow_shows_losses_first_and_what_a_run_is(quick: Path) -> None:
    client = MlflowClient(tracking_uri(quick))
    experiment = client.get_experiment_by_name("quick")
    config = load_experiment(quick / "quick/experiment.yaml")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert experiment.tags["mlflow.note.content"] == config.description

    # By default MLflow sorts sections and charts by name.
    names = sorted({name for run in config.runs() for name in runs[run.name].data.metrics if "/" in name})
    behind = [name for name in names if name.startswith("watch/")]
    assert any("activation" in name for name in behind)
    assert not any(name.startswith("activation") for name in names)
    front = [name for name in names if not name.startswith(("watch/", "system/"))]
    assert max(front) < min(behind)
    assert "loss" in front[0]
    assert [name for name in front if not name.startswith("eval/")] == [
        "train/loss", "validation/loss", "validation/perplexity"
    ]  # fmt: skip

    # The view that the links name: every loss over every cost, at whose steps both are recorded.
    view = json.loads(experiment.tags["mlflow.sharedViewState.losses"])
    axes = [(chart["metricKey"], chart["selectedXAxisMetricKey"]) for chart in view["compareRunCharts"]]
    costs = ["", *(f"watch/train/{name}" for name in ("tokens", "flops", "seconds"))]
    assert axes[:8] == [(f"validation/{loss}", cost) for loss in ("loss", "perplexity") for cost in costs]
    for arm in ("dense", "ssd", "sparse"):
        steps = {
            name: {m.step for m in client.get_metric_history(runs[f"{arm}-seed0"].info.run_id, name)}
            for name in ("validation/loss", *costs[1:])
        }
        assert len(steps["validation/loss"]) > 1
        assert all(steps["validation/loss"] <= steps[cost] for cost in costs[1:])

    colours = {arm: style.colour for arm, style in arm_styles(load_results(quick / "quick", config.runs())).items()}
    evaluated = read_json(quick / "quick/runs/ssd-seed0/evaluation.json")
    for run in config.runs():
        tags = runs[run.name].data.tags
        assert tags["mlflow.runColor"] == colours[run.arm]
        assert tags["mlflow.note.content"].startswith(f"{run.label}: method {run.method}, seed 0. {config.description}")
        assert tags["mlflow.source.name"] == "ssd-lit"
        assert tags["mlflow.source.git.commit"] == tags["git_commit"].removesuffix("-dirty")
        assert tags["mlflow.user"]
    ssd = runs["ssd-seed0"].info.run_id
    assert {"config.yaml", "evaluation.json", "over_k.json"} <= {f.path for f in client.list_artifacts(ssd)}
    over_k = {(m.step, m.value) for m in client.get_metric_history(ssd, "eval/over_k/loss")}
    assert over_k == {(point["top_k"], point["loss"]) for point in evaluated["curve"]}
    recall = [m.value for m in client.get_metric_history(ssd, "eval/over_layers/routing_recall")]
    assert recall == evaluated["routing_recall"]
    assert logged_table(client, ssd, "over_k.json")["loss"] == [point["loss"] for point in evaluated["curve"]]
    report = runs["report"].info.run_id
    assert "report.html" in {f.path for f in client.list_artifacts(report)}
    with (quick / "quick/arms.csv").open() as file:
        assert logged_table(client, report, "arms.json")["arm"] == [row["arm"] for row in csv.DictReader(file)]


def logged_table(client: MlflowClient, run: str, name: str) -> dict[str, list[Any]]:
    """The columns of a table; `load_table` would ask the process's own store instead of the client's."""
    table = json.loads(Path(client.download_artifacts(run, name)).read_text())
    return dict(zip(table["columns"], map(list, zip(*table["data"], strict=True)), strict=True))


def test_the_end_of_a_run_and_the_report_link_the_charts(quick: Path) -> None:
    identity = MlflowClient(tracking_uri(quick)).get_experiment_by_name("quick").experiment_id
    link = f"/#/experiments/{identity}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    for path in ("runs/ssd-seed0/logs/evaluate.log", "logs/report.log"):
        assert f"charts at http://127.0.0.1:5000{link}" in (quick / "quick" / path).read_text()
    assert link.replace("&", "&amp;") in (quick / "quick/report.html").read_text(encoding="utf-8")


def test_a_second_call_finds_nothing_to_do_and_one_stage_can_be_asked_for(quick: Path) -> None:
    assert "Nothing to be done" in snakemake("quick", quick)
    planned = snakemake("quick", quick, "-n", "--forcerun", "evaluate")
    assert "evaluate" in planned
    assert "rule dense" not in planned
    weights = quick / "quick/runs/dense-seed0/checkpoints/dense.ckpt"
    before = weights.stat().st_mtime_ns
    (quick / "quick/summary.csv").unlink()
    snakemake("quick", quick, str(quick / "quick/summary.csv"))
    assert (quick / "quick/summary.csv").exists()
    assert weights.stat().st_mtime_ns == before


def test_planning_writes_nothing(tmp_path: Path) -> None:
    config, results = tiny_experiment(tmp_path), tmp_path / "results"
    assert "sparse_phases" in snakemake(config, results, "-n")
    assert not results.exists()


def test_a_place_of_any_name_will_do_and_the_log_of_an_earlier_try_is_kept(tmp_path: Path) -> None:
    config, results = tiny_experiment(tmp_path), tmp_path / "it's here & (there)[1]#2" / "re sults"
    known = set(ROOT.iterdir())
    (data,) = load_experiment(config).runs()[:1]
    tokens = data_dir(results, data.data)
    told = snakemake(config, results, str(tokens / "tokens/index.json"))
    assert f"ssd-lit ui --results {quote(str(results))}" in told
    snakemake(config, results, str(tokens / "tokens/index.json"), "--forcerun", "encode")
    assert (tokens / "logs/encode.log").read_text().count("begins") == 2
    assert set(ROOT.iterdir()) == known


def test_what_is_lost_or_of_other_settings_is_planned_and_nothing_else(quick: Path, tmp_path: Path) -> None:
    ssd, dense = (quick / f"quick/runs/{name}-seed0" for name in ("ssd", "dense"))
    weights = ssd / "checkpoints/sparse_phases.ckpt"
    shutil.move(weights, tmp_path / "kept.ckpt")
    assert planned(quick) == {"sparse_phases ssd", "evaluate ssd"}
    shutil.move(tmp_path / "kept.ckpt", weights)
    # Nobody needs what a later stage was made from.
    shutil.move(ssd / "checkpoints/warmup.ckpt", tmp_path / "kept.ckpt")
    assert planned(quick) == set()
    shutil.move(tmp_path / "kept.ckpt", ssd / "checkpoints/warmup.ckpt")
    other = tmp_path / "other.yaml"
    changes = {"arms": {"sparse": {"optim": {"lr": 5e-3}}}}
    other.write_text(yaml.safe_dump({"base": str(ROOT / "configs/quick.yaml"), **changes}), encoding="utf-8")
    assert planned(quick, other) == {"moefy sparse", "sparse_phases sparse", "evaluate sparse"}
    assert planned(quick) == set()
    assert (dense / "evaluation.json").exists()


@pytest.mark.parametrize("jobs", ["stages", "runs"])
def test_what_an_ended_call_left_undone_is_planned_by_the_next(quick: Path, tmp_path: Path, jobs: str) -> None:
    results = tmp_path / "copy"
    shutil.copytree(quick, results)
    # As Snakemake leaves it when it began a job anew that did not come to its end.
    (results / "quick/runs/ssd-seed0/evaluation.json").unlink()
    assert planned(results, jobs=jobs) == {"evaluate ssd" if jobs == "stages" else "run ssd"}
    told = snakemake("quick", results, "-n", jobs=jobs)
    assert all(f"rule {rule}:" in told for rule in ("summarise", "figures", "write_report"))


@pytest.mark.parametrize("jobs", ["stages", "runs"])
def test_other_settings_are_planned_after_their_files_are_written(quick: Path, tmp_path: Path, jobs: str) -> None:
    results, other = tmp_path / "copy", tmp_path / "other.yaml"
    shutil.copytree(quick, results)
    shutil.rmtree(results / "quick/figures")
    text = {"base": str(ROOT / "configs/quick.yaml"), "arms": {"dense": {"training": {"steps": 100}}}}
    other.write_text(yaml.safe_dump(text), encoding="utf-8")
    main(["configs", str(other), "--results", str(results)])
    dense = {"dense dense", "evaluate dense"} if jobs == "stages" else {"run dense"}
    assert dense <= planned(results, other, jobs=jobs)


def test_what_decides_no_weights_trains_nothing_anew(quick: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    for changes in (
        {"arms": {"ssd": {"label": "Ours"}}},
        {"training": {"checkpoint_every": 20, "workers": 1}},
    ):
        other.write_text(yaml.safe_dump({"base": str(ROOT / "configs/quick.yaml"), **changes}), encoding="utf-8")
        assert planned(quick, other) == set()
    # Dense training and a Mixture of Experts from scratch read no schedule of phases.
    text = {"base": str(ROOT / "configs/quick.yaml"), "switching": {"sparse_fraction": 0.3}}
    other.write_text(yaml.safe_dump(text), encoding="utf-8")
    assert {stage.split()[1] for stage in planned(quick, other)} == {"ssd"}


def planned(results: Path, experiment: str | Path = "quick", jobs: str = "stages") -> set[str]:
    """The stages of runs that would be done, as RULE ARM."""
    told = snakemake(experiment, results, "-n", jobs=jobs)
    return {
        f"{rule} {arm}"
        for rule, arm in re.findall(r"^rule (\w+):\n(?:    .*\n)*?    wildcards: run=(\w+)-seed0", told, re.M)
    }


def test_a_copy_with_other_dates_trains_nothing_and_a_forced_stage_gives_the_same(quick: Path, tmp_path: Path) -> None:
    results = tmp_path / "copy"
    shutil.copytree(quick, results, copy_function=shutil.copyfile)
    checkpoints = sorted(results.rglob("*.ckpt"))
    before = {path: path.stat().st_mtime_ns for path in checkpoints}
    run = results / "quick/runs/ssd-seed0"
    assert "rule sparse_phases" in snakemake("quick", results, str(run / "evaluation.json"))
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == before
    snakemake("quick", results, str(run / "stages/sparse_phases.json"), "--forcerun", "sparse_phases")
    anew = {path for path in checkpoints if path.stat().st_mtime_ns != before[path]}
    assert anew == {run / "checkpoints/sparse_phases.ckpt"}
    a, b = (torch.load(r / "quick/runs/ssd-seed0/checkpoints/sparse_phases.ckpt", weights_only=True)["state_dict"]
            for r in (quick, results))  # fmt: skip
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_by_the_command_line_alone_is_the_one_of_the_workflow(quick: Path, tmp_path: Path) -> None:
    results = tmp_path / "by_hand"
    assert main(["configs", str(ROOT / "configs/quick.yaml"), "--results", str(results)]) == 0
    shutil.copytree(quick / "data", results / "data", dirs_exist_ok=True)
    run = results / "quick/runs/ssd-seed0"
    subprocess.run([sys.executable, "-m", "ssd_lit", "train", str(run)], env=ENVIRONMENT, check=True)
    assert list(run_differences(quick / "quick/runs/ssd-seed0", run)) == []


def test_snakemake_makes_its_own_archive(quick: Path, tmp_path: Path) -> None:
    snakemake("quick", quick, "--report", str(tmp_path / "archive.html"))
    assert "Activation pattern similarity" in (tmp_path / "archive.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("mistake", ["d_ff 32 is not divisible by moe.experts 5", "no text in"])
def test_a_mistake_stops_the_workflow_in_two_lines(tmp_path: Path, mistake: str) -> None:
    if mistake == "no text in":
        config = tiny_experiment(tmp_path)
        (tmp_path / "text.txt").write_text(" \n\n")
    else:
        config = tiny_experiment(tmp_path, moe={"experts": 5, "top_k": 2})
    done = subprocess.run(
        command(config, tmp_path / "results"), cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, check=False
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "profile" not in line]
    assert len(told) <= 2
    assert mistake in done.stderr
    assert not (tmp_path / "results").exists()
