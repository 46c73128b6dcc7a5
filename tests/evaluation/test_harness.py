"""EleutherAI's harness scores models with experts, on tasks from local files, and its scores reach table and report."""

import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'ssd-lit[harness]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry

from ssd_lit.evaluation.downstream import means
from ssd_lit.evaluation.harness import FolderLM
from ssd_lit.support.files import read_json_checked
from tests.conftest import Bench

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{file}"}}}}
output_type: multiple_choice
validation_split: train
doc_to_text: ""
doc_to_target: 0
target_delimiter: ""
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
NAMES = ("order", "words")
ARMS: dict[str, Any] = {"ssd": {"method": "ssd"}}
ROUTED = {"method": "posthoc", "parent_arm": "ssd", "moe": {"posthoc_router": "centers", "router_steps": 3}}
SMALL: dict[str, Any] = {
    "training": {
        "steps": 16, "batch_size": 4, "log_every": 4, "validate_every": 8, "validation_blocks": 6,
        "checkpoint_every": 8,
    },
    "switching": {"switch_points": [4, 12]},
}  # fmt: skip


def write_tasks(folder: Path) -> Path:
    """Two tasks in BLiMP's form, of twelve pairs each."""
    draw = random.Random(0)
    words = ["the", "old", "over", "and", "a", "bird", "in", "tall", "by"]
    (folder / "tasks").mkdir()
    (folder / "pairs").mkdir()
    for name in NAMES:
        pairs = []
        for _ in range(12):
            good = draw.sample(words, 3)
            bad = good[::-1] if name == "order" else draw.sample(words, 3)
            pairs.append({"sentence_good": " ".join(good), "sentence_bad": " ".join(bad), "field": "syntax"})
        file = folder / "pairs" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, file=file))
    return folder / "tasks"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, dict[str, Any]]:
    """A run whose final model was scored on both tasks, by the harness and by our own scoring of such pairs."""
    folder = tmp_path_factory.mktemp("harness")
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    downstream = {
        "harness": {"tasks": list(NAMES), "folder": str(write_tasks(folder))},
        "blimp": {"file": str(folder / "pairs")},
    }
    bench = Bench(folder, arms=ARMS, downstream=downstream, **SMALL)
    bench.phases("ssd")
    bench.stage("downstream", bench.dir("ssd"))
    patch.undo()
    return bench, read_json_checked(bench.dir("ssd") / "downstream/downstream.json")


def test_the_harness_agrees_with_our_own_scores_in_both_modes(done: tuple[Bench, dict[str, Any]]) -> None:
    _, content = done
    ours = {(one["mode"], one["set"]): one["accuracy"] for one in content["blimp"]["scores"]}
    scores = content["harness"]["scores"]
    assert {(one["mode"], one["task"]): one["value"] for one in scores if one["metric"] == "acc"} == ours
    assert len(ours) == 4
    assert all(one["samples"] == 12 for one in scores)
    told = means(content)
    assert told["downstream/harness/order/acc_sparse"] == ours["sparse", "order"]


def test_its_scores_stand_in_the_table(done: tuple[Bench, dict[str, Any]]) -> None:
    bench, content = done
    bench.stage("evaluate", bench.dir("ssd"))
    bench.stage("summarise", bench.dir("ssd").parents[1])
    table = pd.read_csv(bench.dir("ssd").parents[1] / "downstream.csv")
    rows = table[table["benchmark"] == "harness"]
    found = {(row.mode, row.task, row.metric): row.value for row in rows.itertuples()}
    assert found == {(one["mode"], one["task"], one["metric"]): one["value"] for one in content["harness"]["scores"]}


def test_dynamic_k_is_an_argument_and_its_mean_k_is_recorded(tmp_path: Path) -> None:
    bench = Bench(tmp_path, arms=ARMS | {"routed": ROUTED}, **SMALL)
    bench.phases("ssd")
    bench.phases("routed")
    bench.stage("export", bench.dir("routed"), "--out", tmp_path / "out")
    found = {}
    for threshold in (0.0, 1.0):
        arguments = f"path={tmp_path / 'out'},mode=sparse,threshold={threshold}"
        scorer = FolderLM.create_from_arg_string(arguments, {"device": "cpu"})
        scorer.loglikelihood([Instance("loglikelihood", {}, ("the old", " bird"), 0)])
        found[threshold] = scorer.get_model_info()["mean_k"]
    assert found == {0.0: bench.runs["routed"].moe.experts, 1.0: 1}


def test_the_command_line_of_the_harness_knows_our_model_type(
    done: tuple[Bench, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, content = done
    bench.stage("export", bench.dir("ssd"), "--out", tmp_path / "out")
    tasks = bench.results.parent / "tasks"
    expected = {(one["mode"], one["task"]): one["value"] for one in content["harness"]["scores"]}
    moe = bench.runs["ssd"].moe
    arguments = ["run", "--model", "ssd_lit", "--model_args", f"path={tmp_path / 'out'},mode=sparse,top_k={moe.top_k}",
                 "--include_path", tasks, "--tasks", *NAMES, "--device", "cpu",
                 "--output_path", tmp_path / "told"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # As `python -m` does, but with lm_eval, which takes long, imported already.
    monkeypatch.delitem(model_registry._objs, "ssd_lit")
    monkeypatch.delitem(sys.modules, "ssd_lit.evaluation.harness")
    runpy.run_module("ssd_lit.evaluation.harness", run_name="__main__")
    (written,) = (tmp_path / "told").rglob("results*.json")
    results = json.loads(written.read_text())["results"]
    assert {task: results[task]["acc,none"] for task in NAMES} == {task: expected["sparse", task] for task in NAMES}
