"""What the final models are worth on other tasks: the table of all scores, and what the report shows of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ssd_lit.config import RunConfig
from ssd_lit.data.benchmarks import TASKS
from ssd_lit.report.arms import Measure, cell, measure_of
from ssd_lit.report.formatting import percent
from ssd_lit.report.results import RUN, RunResult
from ssd_lit.support.files import read_json_checked, write_text

METRICS = {"accuracy": "accuracy", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman"}
"""Metrics as they are called in tables."""
COLUMNS = [
    "run",
    "arm",
    "method",
    "seed",
    "benchmark",
    "task",
    "field",
    "mode",
    "tuning_seed",
    *METRICS,
    "metric",
    "value",
]
MODES: dict[str, dict[str, tuple[str, ...]]] = {
    "glue": {"dense": ("dense", "dense"), "dense_to_sparse": ("dense", "sparse"), "sparse": ("sparse", "sparse")},
    "blimp": {"dense": ("dense",), "sparse": ("sparse",)},
    "harness": {"dense": ("dense",), "sparse": ("sparse",)},
}
"""How a model was fine-tuned, if it was, and how it was scored."""
ALL_SETS = "all sets"


Row = tuple[Sequence[str], Sequence[str]]
"""How a model was run, and its scores."""


@dataclass(frozen=True)
class ScoreTable:
    """The rows of each arm by its label, what stands above them, and what a reader must know of them."""

    headings: Sequence[str]
    arms: Sequence[tuple[str, Sequence[Row]]]
    remark: str


def write_downstream(exp_dir: Path, runs: Sequence[RunConfig]) -> Path:
    """Write downstream.csv: one row a run, task, mode and seed of the fine-tuning; of BLiMP one a run, set and mode; of
    the harness one a run, task, mode and metric, whose score is in the column `value`.

    Raises ValueError naming the first file amiss.
    """
    rows = [row for run in runs for row in _rows(run, _read(exp_dir / "runs" / run.name))]
    # Object columns keep a whole number whole where another row has none.
    table = pd.DataFrame(rows, columns=COLUMNS, dtype=object)
    path = exp_dir / "downstream.csv"
    write_text(path, table.to_csv(index=False, lineterminator="\n"))
    return path


def scores(results: Sequence[RunResult], benchmark: str) -> pd.DataFrame:
    """Every score on a benchmark, one a row: run, arm, seed, part, mode, metric, value.

    A part is a task of GLUE or the harness, or a field of BLiMP and all its sets, of which it is the mean.
    """
    rows = [row for result in filter(_tried, results) for row in _rows(result.config, _read(result.folder))]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table = table[table["benchmark"] == benchmark]
    if benchmark == "blimp":
        fields = pd.concat([table.assign(part=ALL_SETS), table[table["field"] != ""].assign(part=table["field"])])
        means = fields.groupby([*RUN, "part", "mode"], sort=False)["accuracy"].mean()
        return means.reset_index(name="value").assign(metric="accuracy")
    if benchmark == "harness":
        return table.assign(part=table["task"])[[*RUN, "part", "mode", "metric", "value"]].astype({"value": float})
    table = (
        table.assign(part=table["task"])
        .drop(columns=["metric", "value"])
        .melt([*RUN, "part", "mode"], list(METRICS), "metric")
    )
    return table.dropna(subset="value").astype({"value": float})


def baselines(results: Sequence[RunResult]) -> dict[tuple[str, str], float]:
    """What the commonest class scores on each task of GLUE, by task and metric."""
    by_task = {task: scored for content in _all(results, "glue") for task, scored in content["baseline"].items()}
    return {(task, metric): value for task, scored in by_task.items() for metric, value in scored.items()}


def parts(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (part, metric) pairs of a table of scores: tasks in their order, or fields as they come."""
    pairs = table[["part", "metric"]].drop_duplicates().itertuples(index=False, name=None)
    tasks, metrics = list(TASKS), list(METRICS)
    return sorted(pairs, key=lambda pair: (tasks.index(pair[0]) if pair[0] in tasks else 0, metrics.index(pair[1])))


def part_name(part: str) -> str:
    """A task or a field as a reader knows it."""
    return TASKS[part].title if part in TASKS else part.replace("_", "-")


def glue_table(results: Sequence[RunResult]) -> ScoreTable | None:
    """GLUE in the report, the commonest class first; None if no run was tried on it."""
    table = scores(results, "glue")
    if table.empty:
        return None
    known, columns = baselines(results), parts(table)
    first: Row = ("-", "-"), [_percent(known[column]) for column in columns]
    headings = [f"{part_name(part)}, {METRICS[metric]}" for part, metric in columns]
    counts = [of_task for content in _all(results, "glue") for of_task in content["examples"].values()]
    remark = _cut([count["cut"] for count in counts], [count["train"] + count["dev"] for count in counts], "examples")
    return ScoreTable(headings, [("Commonest class", [first]), *_arms(results, table, columns, "glue")], remark)


def blimp_table(results: Sequence[RunResult]) -> ScoreTable | None:
    """BLiMP in the report; None if no run was tried on it."""
    table = scores(results, "blimp")
    if table.empty:
        return None
    columns = parts(table)
    sets = [scored for content in _all(results, "blimp") for scored in content["scores"]]
    remark = _cut([scored["cut"] for scored in sets], [scored["pairs"] for scored in sets], "pairs")
    return ScoreTable([part_name(part) for part, _ in columns], _arms(results, table, columns, "blimp"), remark)


def harness_table(results: Sequence[RunResult]) -> ScoreTable | None:
    """The tasks of the harness in the report, as it gives them; None if no run was tried on it."""
    table = scores(results, "harness")
    if table.empty:
        return None
    columns = list(table[["part", "metric"]].drop_duplicates().itertuples(index=False, name=None))
    headings = [f"{task}, {metric}" for task, metric in columns]
    return ScoreTable(headings, _arms(results, table, columns, "harness", "{:.4g}".format), "")


def measure(table: pd.DataFrame, arm: str, mode: str, part: str, metric: str) -> Measure | None:
    """The scores of an arm over all its seeds; None if it has none."""
    rows = table[(table["arm"] == arm) & (table["mode"] == mode) & (table["part"] == part)]
    return measure_of(rows[rows["metric"] == metric]["value"])


def _arms(
    results: Sequence[RunResult],
    table: pd.DataFrame,
    columns: Sequence[tuple[str, str]],
    benchmark: str,
    shown: Callable[[float], str] | None = None,
) -> list[tuple[str, list[Row]]]:
    arms = []
    for arm, label in {result.arm: result.label for result in results}.items():
        rows: list[Row] = []
        for mode, names in MODES[benchmark].items():
            measured = [measure(table, arm, mode, *column) for column in columns]
            if any(measured):
                rows.append((names, [cell(score, shown or _percent) for score in measured]))
        if rows:
            arms.append((label, rows))
    return arms


def _cut(cut: Sequence[int], of: Sequence[int], what: str) -> str:
    """A sentence on texts that were longer than the models read; empty if there were none."""
    if not sum(cut):
        return ""
    return f"{percent(sum(cut) / sum(of))} of the {what} were longer than the model reads, and were cut."


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _tried(result: RunResult) -> bool:
    # What was found stays where an experiment does not ask for it any more.
    files = ("downstream.yaml", "downstream/downstream.json")
    return all((result.folder / name).is_file() for name in files)


def _all(results: Sequence[RunResult], benchmark: str) -> list[dict[str, Any]]:
    """What every run found on the benchmark that was tried on it."""
    contents = [_read(result.folder).get(benchmark) for result in filter(_tried, results)]
    return [content for content in contents if content is not None]


def _read(run_dir: Path) -> dict[str, Any]:
    return read_json_checked(run_dir / "downstream" / "downstream.json")


def _rows(run: RunConfig, content: dict[str, Any]) -> list[dict[str, Any]]:
    """All scores of a run as rows of downstream.csv; a cell that does not apply is left out."""
    names: dict[str, Any] = {"run": run.name, "arm": run.arm, "method": run.method, "seed": run.seed}
    glue = [
        {**scored, "benchmark": "glue", "tuning_seed": scored["seed"], **names}
        for scored in (content["glue"] or {"scores": []})["scores"]
    ]
    blimp = [
        {**scored, "benchmark": "blimp", "task": scored["set"], **names}
        for scored in (content["blimp"] or {"scores": []})["scores"]
    ]
    harness = [
        {**scored, "benchmark": "harness", **names}
        for scored in (content.get("harness") or {"scores": []})["scores"]  # none in results of earlier versions
    ]
    return glue + blimp + harness
