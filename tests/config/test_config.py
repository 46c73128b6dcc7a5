"""Every shipped config is valid; configs are laid over others, and become runs."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ssd_lit.cli import main
from ssd_lit.config import ConfigError, Experiment, dump, load_experiment, load_run, parse_changes, read_changes
from ssd_lit.config.loading import change_run
from ssd_lit.config.yaml_file import read_layers
from ssd_lit.paths import write_configs
from ssd_lit.pipeline.plan import experiment_of
from tests.conftest import Bench

ROOT = Path(__file__).parents[2]
# sizes/ holds what experiments are laid over.
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sizes")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_shipped_configs_are_valid_and_survive_writing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What large runs read is not part of the project. Their text is not looked for, their tasks are.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpora").mkdir()
    for name in ("BLiMP.zip", "glue.tar.xz"):
        (tmp_path / "corpora" / name).touch()
    experiment = load_experiment(path)
    assert experiment.experiment == path.stem + {"small": "_small", "h100": "_h100"}.get(path.parent.name, "")
    again = tmp_path / "again.yaml"
    again.write_text(dump(experiment), encoding="utf-8")
    assert load_experiment(again) == experiment
    for run in write_configs(experiment, tmp_path):
        assert load_run(tmp_path / experiment.experiment / "runs" / run.name / "config.yaml") == run


def test_settings_of_a_measurement_go_when_it_is_not_asked_for(tmp_path: Path) -> None:
    experiment = load_experiment(ROOT / "configs/analysis.yaml")
    write_configs(experiment, tmp_path)
    here = tmp_path / "analysis/runs"
    assert len(list(here.glob("*/analysis.yaml"))) == len(experiment.runs())
    write_configs(experiment.model_copy(update={"analysis": None}), tmp_path)
    assert not list(here.glob("*/analysis.yaml"))
    assert len(list(here.glob("*/evaluation.yaml"))) == len(experiment.runs())


def test_a_config_is_laid_over_its_bases_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("model: {layers: 2, d_ff: 64}\nseeds: [1, 2]\na: 1", encoding="utf-8")
    (tmp_path / "mid.yaml").write_text("base: low.yaml\nmodel: {layers: 3}\nb: {c: 1}", encoding="utf-8")
    (tmp_path / "size.yaml").write_text("seeds: [0]\nb: {d: 2}", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/top.yaml").write_text("base: [../mid.yaml, ../size.yaml]\na: 5", encoding="utf-8")
    assert read_layers(tmp_path / "sub/top.yaml")[0] == {
        "model": {"layers": 3, "d_ff": 64}, "seeds": [0], "a": 5, "b": {"c": 1, "d": 2},
    }  # fmt: skip


def test_null_drops_an_arm_and_other_mappings_of_a_base(tmp_path: Path) -> None:
    base = yaml.safe_load((ROOT / "configs/quick.yaml").read_text(encoding="utf-8"))
    base["optim"]["lr"] = 3e-3
    base["data"]["held_out"] = {"novel": "novel.txt", "news": "news.txt"}
    base["arms"]["ssd"]["grid"] = {"moe.top_k": [1, 2], "optim.lr": [0.1]}
    base["analysis"] = {"tokens": 3}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    path = tmp_path / "top.yaml"

    def over(text: str) -> Experiment:
        path.write_text(f"base: base.yaml\n{text}", encoding="utf-8")
        return load_experiment(path)

    assert set(over("arms: {sparse: null, dense: null, posthoc: null}").arms) == {"ssd"}
    assert over("data: {held_out: {news: null}}").data.held_out == {"novel": "novel.txt"}
    assert over("data: {held_out: null}").data.held_out == {}
    assert list(over("arms: {ssd: {grid: {moe.top_k: null}}}").arms["ssd"].grid) == ["optim.lr"]
    assert over("arms: {ssd: {grid: null}}").arms["ssd"].grid == {}
    assert over("analysis: null").analysis is None
    assert over("data: {max_megabytes: null}").data.max_megabytes is None
    for text, message in (
        ("arms: {sdd: null}", "arms.sdd: nothing to drop; without it there are: ['dense', 'posthoc', 'sparse', 'ssd']"),
        (
            "data: {held_out: {newz: null}}",
            "data.held_out.newz: nothing to drop; without it there are: ['news', 'novel']",
        ),
        ("arms: {ssd: {grid: {moe.topk: null}}}", "arms.ssd.grid.moe.topk: nothing to drop"),
        ("arms: {dense: null}", "arms.posthoc.parent_arm: given 'dense'; allowed: "),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            over(text)


def test_a_base_that_builds_on_its_user_is_told(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("base: other.yaml", encoding="utf-8")
    (tmp_path / "other.yaml").write_text("base: wrong.yaml", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other\.yaml: base: wrong\.yaml builds on itself"):
        load_experiment(tmp_path / "wrong.yaml")


def test_a_grid_becomes_an_arm_for_every_combination(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "configs/quick.yaml").read_text(encoding="utf-8"))
    content["optim"]["lr"] = 3e-3
    content["arms"] = {
        "ssd": {
            "method": "ssd",
            "grid": {
                "moe.top_k": [2, 4],
                "switching": [{"sparse_steps": 10, "dense_min_steps": 2}, {"sparse_steps": 20, "dense_min_steps": 4}],
            },
        }
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    runs = load_experiment(path).runs()
    assert [run.arm for run in runs] == [
        "ssd.top_k_2.sparse_steps_10", "ssd.top_k_2.sparse_steps_20",
        "ssd.top_k_4.sparse_steps_10", "ssd.top_k_4.sparse_steps_20",
    ]  # fmt: skip
    assert runs[0].label == "ssd, top_k 2, sparse_steps 10"
    assert runs[1].grid == {"moe.top_k": 2, "switching.sparse_steps": 20}
    assert [(r.moe.top_k, r.switching.sparse_steps, r.switching.dense_min_steps) for r in runs] == [
        (2, 10, 2), (2, 20, 4), (4, 10, 2), (4, 20, 4),
    ]  # fmt: skip
    # Their first phases are the same one.
    assert [run.shares_warmup for run in runs] == [None, *[runs[0].name] * 3]


def test_empty_text_is_told_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n\n \n", encoding="utf-8")
    content = yaml.safe_load((ROOT / "configs/quick.yaml").read_text(encoding="utf-8"))
    content["data"]["sources"] = [{"kind": "files", "paths": [str(tmp_path / "empty.txt")]}]
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["configs", str(tmp_path / "e.yaml"), "--results", str(tmp_path / "r")]) == 1
    assert "data.sources: no text in" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_text_need_not_be_there_once_its_tokens_are(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench.results.parent
    (folder / "text.txt").unlink()
    bench.stage("configs", folder / "tiny.yaml", "--results", bench.results)
    (bench.data / "tokens/index.json").unlink()
    assert main(["configs", str(folder / "tiny.yaml"), "--results", str(bench.results)]) == 1
    assert "data.sources.0.files: no file matches" in capsys.readouterr().err


def test_an_unchanged_config_is_not_touched(tmp_path: Path) -> None:
    experiment = load_experiment(ROOT / "configs/quick.yaml")
    write_configs(experiment, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.yaml")}
    write_configs(experiment, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.yaml")}


def test_conda_and_pip_users_get_the_same_pins_of_all_that_the_project_asks_for() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"][-1]["pip"]
    assert conda == ["-r requirements.lock"]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in lock if line[:1] != "#"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    # Tests with a service of their own install its extra themselves, and one is for a GPU.
    apart = {"slurm", "server-tests", "browser-tests", "quack"}
    asked = [*project["dependencies"], *(one for name in extras.keys() - apart for one in extras[name])]
    assert {canonicalize_name(Requirement(one).name) for one in asked} <= pinned


def test_settings_are_read_under_the_names_they_had_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quick = yaml.safe_load((ROOT / "configs/quick.yaml").read_text(encoding="utf-8"))
    new, old = tmp_path / "new.yaml", tmp_path / "old.yaml"
    arms = {
        "dense": {"method": "dense", "optim": {"schedule": "wsd", "decay_fraction": 0.3}},
        "ssd": {"method": "ssd", "switching": {"sparse_fraction": 0.3}},
        "routed": {"method": "posthoc", "parent_arm": "ssd", "grid": {"moe.posthoc_router": [None, "mass_mlp"]}},
        "gate": {"method": "sparse", "moe": {"router": "gate"}},
        "matched": {"method": "dense", "match_flops_of_arm": "ssd"},
    }
    new.write_text(yaml.safe_dump({**quick, "arms": arms}), encoding="utf-8")
    text = new.read_text(encoding="utf-8")
    for now, before in (
        ("_fraction", "_share"), ("parent_arm", "start_from"), ("match_flops_of_arm", "match_flops"),
        ("posthoc_router", "trained_router"), ("mass_mlp", "mass"), ("router: gate", "router: learned"),
    ):  # fmt: skip
        assert now in text
        text = text.replace(now, before)
    old.write_text(text, encoding="utf-8")
    assert load_experiment(old) == load_experiment(new)
    assert "start_from: called parent_arm now" in caplog.text
    assert "mass: called mass_mlp now" in caplog.text


def test_settings_on_a_command_line_become_a_mapping() -> None:
    settings = ["training.steps=100", "optim.lr=3e-4", "arms.ssd.grid.moe.top_k=[1, 2]", "arms.a={method: dense}"]
    assert parse_changes(settings) == {
        "training": {"steps": 100}, "optim": {"lr": 3e-4},
        "arms": {"ssd": {"grid": {"moe.top_k": [1, 2]}}, "a": {"method": "dense"}},
    }  # fmt: skip
    for wrong in (["a"], ["a="], ["=1"], ["a..b=1"], [".=1"], ["arms.a.grid.=1"]):
        with pytest.raises(ConfigError, match="expected KEY=VALUE"):
            parse_changes(wrong)
    for twice in (["a=1", "a=2"], ["a=1", "a.b=2"], ["a.b=1", "a=2"]):
        with pytest.raises(ConfigError, match="given more than once"):
            parse_changes(twice)


def test_what_snakemake_makes_of_changes_is_read_as_yaml_is() -> None:
    text = "{a: {b: 100, c: 3e-4, d: null, e: true, f: [1, two]}, g: 'a: b', h: ''}"
    as_strings = yaml.load(text, Loader=yaml.BaseLoader)
    assert as_strings["a"]["b"] == "100"
    expected = {"a": {"b": 100, "c": 3e-4, "d": None, "e": True, "f": [1, "two"]}, "g": "a: b"}
    assert read_changes(as_strings) == {**expected, "h": None}
    assert read_changes(text) == {**expected, "h": ""}
    for wrong in (5, "training", [1], None):
        with pytest.raises(ConfigError, match="expected a mapping"):
            read_changes(wrong)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"expriment": "quick"}, "--config expriment: unknown key; did you mean 'experiment'?"),
        ({"cores": 2}, "--config cores: unknown key; allowed: experiment, results, jobs, gpu_share, set"),
        ({"jobs": "run"}, "jobs: given 'run'; allowed: stages"),
        ({"gpu_share": 0.5}, "gpu_share: given 0.5; allowed: 0 (no run asks for a GPU) to 1024 runs on each GPU"),
        ({"gpu_share": -1}, "gpu_share: given -1; allowed"),
        ({"set": 5}, "set: given 5; expected a mapping such as"),
    ],
)
def test_a_mistake_in_what_snakemake_is_given_is_told(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        experiment_of(config)
    assert message in str(told.value)


def experiment(folder: Path, **changes: object) -> Path:
    """An experiment of a small model and text, with its own arms."""
    quick = ROOT / "configs/quick.yaml"
    arms = yaml.safe_load(quick.read_text(encoding="utf-8"))["arms"]
    base = {"base": str(quick), "arms": dict.fromkeys(arms)}
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", **changes}, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("key", "value"), [("activation", "gelu"), ("heads", 1), ("d_ff", 64), ("layers", 1), ("family", "llama")]
)
def test_an_arm_that_starts_from_anothers_weights_has_its_model(tmp_path: Path, key: str, value: object) -> None:
    dense = {"method": "dense"}
    for method in ("posthoc", "sparse", "upcycle"):
        more = {"moe": {"router": "gate", "top_k": 2}} if method == "upcycle" else {}
        child = {"method": method, "parent_arm": "dense", **more}
        same = experiment(tmp_path, arms={"dense": dense, "child": {**child, "model": {"dropout": 0.1}}})
        assert len(load_experiment(same).runs()) == 2
        other = experiment(tmp_path, arms={"dense": dense, "child": {**child, "model": {key: value}}})
        with pytest.raises(ConfigError, match=rf"arms\.child\.model\.{key}: given {value!r}; arm dense, whose weights"):
            load_experiment(other)


def test_a_nested_section_of_an_arm_is_laid_over_the_experiments(tmp_path: Path) -> None:
    moe = {"experts": 8, "top_k": 4, "k_schedule": {"kind": "linear", "start": 1, "end": 4}}
    sparse: dict[str, object] = {"method": "sparse"}
    found = []
    for arms, changes in (
        ({"a": {**sparse, "moe": {"k_schedule": {"all_every": 4}}}}, {}),
        ({"a": sparse}, {"arms": {"a": {"moe": {"k_schedule": {"all_every": 4}}}}}),
        ({"a": {**sparse, "grid": {"moe.k_schedule.all_every": [4]}}}, {}),
        ({"a": {**sparse, "grid": {"moe": [{"k_schedule": {"all_every": 4}}]}}}, {}),
    ):
        (run,) = load_experiment(experiment(tmp_path, moe=moe, arms=arms), changes).runs()
        found.append(run.moe.k_schedule.model_dump())
    assert found == [{"kind": "linear", "start": 1, "end": 4, "stairs": 4, "all_every": 4}] * 4


def test_a_base_may_drop_what_the_base_before_it_has(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("arms: {a: {method: dense}, b: {method: dense}}", encoding="utf-8")
    (tmp_path / "drop.yaml").write_text("arms: {b: null}", encoding="utf-8")
    (tmp_path / "top.yaml").write_text("base: [one.yaml, drop.yaml]", encoding="utf-8")
    assert read_layers(tmp_path / "top.yaml")[0] == {"arms": {"a": {"method": "dense"}}}
    (tmp_path / "top.yaml").write_text("base: [drop.yaml, one.yaml]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"base: drop\.yaml: arms\.b: nothing to drop"):
        read_layers(tmp_path / "top.yaml")


def test_an_arm_may_have_the_name_of_an_old_setting_but_not_that_of_a_cell(tmp_path: Path) -> None:
    dense = {"method": "dense"}
    matched = {"method": "dense", "match_flops_of_arm": "match_flops"}
    runs = load_experiment(experiment(tmp_path, arms={"match_flops": dense, "m": matched})).runs()
    assert [run.arm for run in runs] == ["match_flops", "m"]
    arms = {"ssd": {"method": "ssd", "grid": {"moe.top_k": [1, 2]}}, "ssd.top_k_2": {"method": "ssd"}}
    with pytest.raises(ConfigError, match=r"'ssd\.top_k_2' is also the name of another arm"):
        load_experiment(experiment(tmp_path, arms=arms))


@pytest.mark.parametrize("changes", [{"training": {"steps": 2000}}, {"switching": {"sparse_fraction": 0.7}}])
def test_lengths_of_phases_follow_the_steps_of_one_run_too(
    tmp_path: Path, changes: dict[str, dict[str, object]]
) -> None:
    content = {"training": {"steps": 400, "batch_size": 4}, "switching": {"tau": 0.5, "check_every": 7}}
    path = experiment(tmp_path, **content, arms={"ssd": {"method": "ssd"}})
    (expected,) = load_experiment(path, changes).runs()
    assert change_run(load_experiment(path).runs()[0], changes, None) == expected


@pytest.mark.parametrize(
    ("moe", "key"),
    [
        ({"top_k": 1}, "moe.top_k"),
        ({"k_schedule": {"kind": "linear"}}, "moe.k_schedule.start"),
        ({"k_schedule": {"end": 1}}, "moe.k_schedule.end"),
    ],
)
def test_a_learned_router_never_chooses_one_expert_alone(tmp_path: Path, moe: dict[str, object], key: str) -> None:
    path = experiment(tmp_path, arms={"gate": {"method": "sparse", "moe": {"router": "gate", "top_k": 2, **moe}}})
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} 1: a learned router"):
        load_experiment(path)
