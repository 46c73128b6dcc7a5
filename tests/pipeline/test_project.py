"""`ssd-lit init`, `list` and `plan`: a project of one's own, and what an experiment will take."""

from pathlib import Path

import pytest
import yaml

from ssd_lit.cli import main
from ssd_lit.config import load_experiment
from ssd_lit.data.sources import files_of
from ssd_lit.pipeline.forecast import Outlook
from ssd_lit.pipeline.plan import experiment_of
from ssd_lit.support.shipped import CONFIGS
from tests.conftest import Bench, tiny_experiment, write_text_files

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_a_project_is_an_experiment_that_reads_the_text_named(tmp_path: Path, size: str, capsys: Captured) -> None:
    write_text_files(tmp_path)
    project = tmp_path / "My Project"
    assert main(["init", str(project), "--text", str(tmp_path / "text.txt"), "--size", size]) == 0
    assert "ssd-lit plan experiment.yaml" in capsys.readouterr().out
    assert {path.name for path in project.iterdir()} == {
        ".gitignore", "Makefile", "Snakefile", "experiment.yaml", "profiles",
    }  # fmt: skip
    experiment = load_experiment(project / "experiment.yaml")
    assert experiment.experiment == "my_project"
    assert [source.model_dump() for source in experiment.data.sources] == [
        {"kind": "files", "paths": [str(tmp_path / "text.txt")], "text_key": "text"}
    ]
    assert [run.method for run in experiment.runs()] == ["dense", "ssd", "posthoc"]


def test_what_a_project_cannot_be_made_of_is_told(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.pdf").touch()
    for arguments, message in (
        (["full"], "full: exists already; give a new folder"),
        (["new", "--text", "nothing.txt"], "--text nothing.txt: no such file or folder"),
        (["new", "--text", str(tmp_path / "full/a.pdf")], "unknown kind of file"),
    ):
        assert main(["init", str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_experiments_are_found_by_name_here_first_and_then_as_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    assert experiment_of({"experiment": "quick"}).experiment == "quick"
    (tmp_path / "configs").mkdir()
    own = {"experiment": "mine", "base": "quick.yaml", "description": "Is it mine? Yes.", "seeds": [0, 1]}
    (tmp_path / "configs/own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    assert experiment_of({"experiment": "own"}).data == load_experiment(CONFIGS / "quick.yaml").data
    assert main(["list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["own", "8", "Is", "it", "mine?"] in lines
    assert ["methods", "45"] in [line[:2] for line in lines]
    assert not any(line[0].startswith("sizes") for line in lines)


@pytest.mark.parametrize(
    "mistake", ["seeds: 3", "arms: {a: {method: ssd, grid: {moe.top_k: 3}}}", "arms: {a: {grid: }}"]
)
def test_a_mistake_in_one_experiment_hides_no_other(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    content = {"experiment": "mine", "arms": {"a": {"method": "ssd"}}, **yaml.safe_load(mistake)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["list"]) == 0
    assert "default" in capsys.readouterr().out


def test_a_project_in_a_place_of_any_name_is_planned(tmp_path: Path, capsys: Captured) -> None:
    text = tmp_path / "a[1].txt"
    text.write_text("Some words. " * 50, encoding="utf-8")
    assert main(["init", str(tmp_path / "my proj"), "--text", str(text)]) == 0
    assert f"cd '{tmp_path / 'my proj'}'" in capsys.readouterr().out
    assert load_experiment(tmp_path / "my proj/experiment.yaml").data.sources
    assert files_of(load_experiment(tmp_path / "my proj/experiment.yaml").data.sources[0]) == [text]


def test_a_plan_says_what_the_records_say_later(tmp_path: Path) -> None:
    """Steps, tokens and FLOPs of every arm, where phases end at fixed steps."""
    arms = {
        "dense": {"method": "dense"},
        "ssd": {"method": "ssd", "switching": {"switch_points": [12, 28]}},
        "sparse": {"method": "sparse", "moe": {"k_schedule": {"kind": "linear", "start": 1, "end": 4}}},
        "matched": {"method": "dense", "match_flops_of_arm": "ssd"},
        **{
            router: {"method": "posthoc", "parent_arm": "dense", "moe": {"posthoc_router": router, "router_steps": 3}}
            for router in ("centers", "mass_mlp", "norm_mlp")
        },
    }
    before = Outlook(load_experiment(tiny_experiment(tmp_path, arms=arms)), tmp_path / "results")
    assert before.train_tokens is not None
    guessed, counted = before.train_tokens
    assert not counted
    bench = Bench(tmp_path, arms=arms)
    after = Outlook(load_experiment(tmp_path / "tiny.yaml"), bench.results)
    assert after.train_tokens is not None
    tokens, counted = after.train_tokens
    assert counted
    assert tokens / 3 < guessed < 3 * tokens
    for arm in arms:
        trained = bench.phases(arm)
        planned = after.runs[f"{arm}-seed0"]
        assert [(p.mode, p.steps, p.tokens) for p in planned.phases] == [(p.mode, p.steps, p.tokens) for p in trained]
        assert planned.total.flops == pytest.approx(sum(phase.flops for phase in trained))
        assert before.parameters(planned.config) > 0


def test_a_plan_counts_what_runs_share_once_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_experiment(tmp_path, arms={"ssd": {"method": "ssd", "grid": {"moe.top_k": [1, 2]}}})
    there = sorted(tmp_path.rglob("*"))
    assert main(["plan", "tiny.yaml", "--steps", "1", "training.batch_size=8"]) == 0
    out = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == there
    assert "\x1b" not in out
    assert "ssd.top_k_1-seed0" in out
    assert "Training: " in out
    first, second = Outlook(load_experiment(Path("tiny.yaml")), Path("results")).runs.values()
    assert (first.shared_steps, second.shared_steps) == (0, 12)
    assert second.flops < second.total.flops
    assert sum(second.steps.values()) == second.total.steps - 12
    assert main(["plan", "tiny.yaml", "training.stpes=8"]) == 1
    assert "did you mean 'steps'?" in capsys.readouterr().err


def test_lengths_of_phases_follow_the_steps(tmp_path: Path) -> None:
    path = tiny_experiment(tmp_path, switching={}, arms={"ssd": {"method": "ssd"}})

    def switching(**changes: object) -> dict[str, object]:
        return load_experiment(path, changes).runs()[0].switching.model_dump()

    long = switching(training={"steps": 1000})
    assert (long["warmup_max_steps"], long["sparse_steps"], long["final_dense_steps"]) == (200, 62, 200)
    assert switching(training={"steps": 5000})["warmup_max_steps"] == 1000
    # A ceiling that is given lowers the floor, and the other way round.
    short = switching(training={"steps": 1000}, switching={"warmup_max_steps": 30, "dense_min_steps": 50})
    assert (short["warmup_min_steps"], short["dense_max_steps"]) == (30, 50)


@pytest.mark.parametrize("steps", [600, 4600, 100_000])
@pytest.mark.parametrize("fraction", [None, 0.3, 0.5, 0.7, 0.85])
def test_as_many_steps_are_sparse_as_asked_and_half_by_default(
    tmp_path: Path, steps: int, fraction: float | None
) -> None:
    given = {} if fraction is None else {"sparse_fraction": fraction}
    path = tiny_experiment(tmp_path, switching=given, arms={"ssd": {"method": "ssd"}})
    (run,) = Outlook(load_experiment(path, {"training": {"steps": steps}}), tmp_path).runs.values()
    assert run.total.sparse_steps == pytest.approx(steps * (fraction or 0.5), rel=0.1)
    assert run.phases[-2].mode == "dense"


def test_a_plan_tells_of_a_fraction_that_its_phases_leave_no_room_for(tmp_path: Path, capsys: Captured) -> None:
    switching = {"sparse_fraction": 0.7, "final_dense_steps": 20, "warmup_max_steps": 8}
    path = tiny_experiment(tmp_path, switching=switching, arms={"ssd": {"method": "ssd"}})
    assert main(["plan", str(path), "--steps", "0", "--results", str(tmp_path)]) == 0
    assert "ssd: switching.sparse_fraction 0.7, but its phases leave room for" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["2024-05-01", "2024", "on", "null", "1e5", "data", "mlruns", "Plain"])
def test_a_project_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert main(["init", str(tmp_path / name)]) == 0
    (tmp_path / name / "text/a.txt").write_text("some text")
    experiment = load_experiment(tmp_path / name / "experiment.yaml")
    assert experiment.experiment.replace("_experiment", "") == name.lower().replace("-", "_")
