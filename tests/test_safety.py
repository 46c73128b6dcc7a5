"""Nothing that is read is executed, no name leads out of the results, and what is secret stays so."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_lit.cli import main
from ssd_lit.config import ConfigError, load_experiment
from ssd_lit.support.files import write_json_checked
from ssd_lit.tracking.store import masked, serve
from ssd_lit.training.checkpoint import read_checkpoint
from tests.conftest import Bench, tiny_experiment

ROOT = Path(__file__).parents[1]
SECRET = "hunter2@home/x"
KEY = "AKIA-a-key-that-nobody-may-see"


class Touching:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_is_not_executed(tmp_path: Path, zipped: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": Touching(trace)}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        read_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_no_stage_executes_the_checkpoint_that_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rolling checkpoint is passed over, any other is an error. The experiment is a link to another disk."""
    bench = Bench(tmp_path, arms={"ssd": {"method": "ssd"}})
    (bench.results / "tiny").rename(tmp_path / "elsewhere")
    (bench.results / "tiny").symlink_to(tmp_path / "elsewhere")
    bench.phases("ssd")
    run, trace = bench.dir("ssd"), tmp_path / "trace"
    evil, stage = {"state_dict": {}, "callbacks": Touching(trace)}, run / "stages/sparse_phases.json"
    torch.save(evil, run / "checkpoints/sparse_phases.ckpt")
    assert main(["evaluate", str(run)]) == 1
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 1
    stage.unlink()
    assert main(["train", str(run), "--until", "sparse_phases"]) == 1
    (run / "checkpoints/sparse_phases.ckpt").unlink()
    write_json_checked(run / "work/made_from.json", bench.open("ssd").made_from())
    torch.save(evil, run / "work/rolling.ckpt")
    bench.phases("ssd")
    assert "rolling.ckpt" in capsys.readouterr().out
    assert not trace.exists()


def test_nothing_in_the_source_trusts_code_from_elsewhere() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
    for path, text in sources.items():
        assert not re.search(r"trust_remote_code(?!=False)|allow_pickle=True|weights_only=False", text), path
        assert not re.search(r"^\s*(import|from) (pickle|marshal|shelve|dill|joblib)\b", text, re.M), path
        assert not re.search(r"\.extract(all)?\(|unpack_archive|yaml\.(unsafe_)?load\((?!.*Loader=_Loader)", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


@pytest.mark.parametrize(
    "name", ["..", "../out", "/tmp/out", "a/b", "a\\b", "a\0b", ".hidden", "", "a\n", "a b", "x" * 61, "~", "-rf"]
)
@pytest.mark.parametrize("place", ["experiment", "data", "arm"])
def test_a_name_leads_nowhere_but_into_the_results(tmp_path: Path, name: str, place: str) -> None:
    arms = {"dense": {"method": "dense"}}
    source = {"kind": "files", "paths": [str(tmp_path / "text.txt")]}
    config = {
        "experiment": lambda: tiny_experiment(tmp_path, arms=arms, experiment=name),
        "arm": lambda: tiny_experiment(tmp_path, arms={name: arms["dense"]}),
        "data": lambda: tiny_experiment(tmp_path, arms=arms, data={"name": name, "sources": [source]}),
    }[place]()
    with pytest.raises(ConfigError):
        load_experiment(config)
    assert main(["configs", str(config), "--results", str(tmp_path / "results")]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "size.yaml", "tiny.yaml"}


def test_a_cell_of_a_grid_is_one_folder_whatever_its_values_say(tmp_path: Path) -> None:
    arms = {"dense": {"method": "dense", "grid": {"model.pretrained": ["../../out", "/etc"]}}}
    with pytest.raises(ConfigError, match=r"config\.json|no such folder"):
        load_experiment(tiny_experiment(tmp_path, arms=arms))
    arms = {"dense": {"method": "dense", "grid": {"optim.schedule": ["cosine", "wsd"]}}}
    for run in load_experiment(tiny_experiment(tmp_path, arms=arms)).runs():
        assert re.fullmatch(r"[a-z0-9_.]+-seed0", run.name)


@pytest.mark.parametrize("option", ["--until", "--from"])
@pytest.mark.parametrize("name", ["../../x", "00-dense/../..", "0\0-dense", "²-dense", "00"])
def test_a_stage_or_phase_is_called_by_its_name_only(tmp_path: Path, option: str, name: str) -> None:
    bench = Bench(tmp_path, arms={"dense": {"method": "dense"}})
    assert main(["train", str(bench.dir("dense")), option, name]) == 1
    assert not (bench.dir("dense") / "phases").exists()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:hunter2@host:5000/x", "http://user:***@host:5000/x"),
        ("postgresql://user:p@ss/word@db/mlflow", "postgresql://user:***@db/mlflow"),
        ("https://token@host", "https://***@host"),
        ("cannot reach http://u:p@h/a; see http://docs", "cannot reach http://u:***@h/a; see http://docs"),
        ("sqlite:///results/mlflow.db", "sqlite:///results/mlflow.db"),
    ],
)
def test_a_password_in_a_tracking_uri_is_not_shown(uri: str, shown: str) -> None:
    assert masked(uri) == shown


def test_the_ui_binds_to_loopback_and_keeps_the_password_out_of_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:hunter2@db/mlflow")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "")
    command = serve(tmp_path, 5000)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "hunter2" not in " ".join(command)


def test_no_secret_of_the_environment_lands_in_what_a_run_leaves_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a server that cannot be reached, whose errors tell of its address."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:{SECRET}@127.0.0.1:9")
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, KEY)
    training = {"steps": 6, "batch_size": 4, "log_every": 3, "validate_every": 6, "validation_blocks": 4}
    bench = Bench(tmp_path, arms={"dense": {"method": "dense"}}, training=training, optim={"warmup_steps": 1})
    bench.stage("store", bench.results)
    bench.phases("dense")
    bench.stage("evaluate", bench.dir("dense"))
    for stage in ("summarise", "figures", "report"):
        bench.stage(stage, bench.results / "tiny")
    printed = "".join(capfd.readouterr())
    assert "127.0.0.1:9" in printed
    written = [path for path in bench.results.rglob("*") if path.is_file()]
    assert bench.results / "tiny/report.html" in written
    for secret in (SECRET, "hunter2", KEY):
        assert secret not in printed
        assert not [path for path in written if secret.encode() in path.read_bytes()]
