"""The command line: its help, near matches and completion; settings changed by it; what it imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ssd_lit
from ssd_lit.cli import app, main
from ssd_lit.config import load_run
from ssd_lit.stages import ALL_STAGES
from ssd_lit.support.files import read_json_checked
from tests.conftest import Bench, tiny_experiment
from tests.workflow.running import ENVIRONMENT, ROOT, command

COMMANDS = [
    "init", "list", "plan", "configs", "prepare", "tokenizer", "encode", "train", "status", "evaluate", "analyse",
    "downstream", "moefy", "summarise", "figures", "report", "verify", "store", "send", "export", "generate", "ui",
    "schema",
]  # fmt: skip


PRINTED = {"init", "list", "plan", "status"}
"""Those that print what they are asked for, and are no stages."""


def test_every_command_has_help_and_stages_take_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert [one.name for one in app.registered_commands] == COMMANDS
    for name in COMMANDS:
        assert f"\n  {name} " in listed
        assert main([name, "--help"]) == 0
        assert ("--threads" in capsys.readouterr().out) == (name not in PRINTED)
    assert main(["train", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert ", ".join(ALL_STAGES) in told
    assert "what was made from other settings is made anew" in told


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ssd-lit {ssd_lit.__version__}\n"


def test_commands_and_options_are_completed() -> None:
    def completed(words: str) -> set[str]:
        variables = {"_SSD_LIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(
            [sys.executable, "-m", "ssd_lit"],
            env={**ENVIRONMENT, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return set(done.stdout.split())

    assert completed("ssd-lit ex") == {"export"}
    assert completed("ssd-lit train --u") == {"--until"}


def test_help_imports_nothing_that_takes_seconds() -> None:
    heavy = ["torch", "lightning", "mlflow", "transformers", "pandas", "matplotlib", "sklearn", "rich", "tokenizers"]
    code = f"import sys; from ssd_lit.cli import main; main(['--help']); print(set({heavy}) & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_command_tells_when_it_begins_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_experiment(tmp_path)
    assert main(["configs", str(config), "--results", str(tmp_path / "results")]) == 0
    begun, done = capsys.readouterr().err.splitlines()
    assert begun.endswith(f"ssd-lit configs {config}: begins")
    assert f"ssd-lit configs {config}: done in " in done
    assert done.endswith("4 runs: dense-seed0, posthoc-seed0, sparse-seed0, ssd-seed0")


def test_an_experiment_is_changed_by_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, results = tiny_experiment(tmp_path), tmp_path / "results"

    def configs(*settings: str) -> int:
        return main(["configs", str(config), *settings, "--results", str(results)])

    assert configs("training.steps=50", "arms.ssd.switching.tau=0.5", "arms.sparse=null", "optim.lr=3e-3") == 0
    runs = {path.parent.name: load_run(path) for path in results.glob("tiny/runs/*/config.yaml")}
    assert set(runs) == {"dense-seed0", "ssd-seed0", "posthoc-seed0"}
    assert {run.training.steps for run in runs.values()} == {50}
    assert {run.optim.lr for run in runs.values()} == {3e-3}
    assert runs["ssd-seed0"].switching.tau == 0.5
    capsys.readouterr()
    for setting, message in (
        ("training.stpes=5", "training.stpes: unknown key; did you mean 'steps'?"),
        ("training.steps=many", "training.steps: given 'many'; input should be a valid int"),
        ("model.dropout=2", "model.dropout: given 2; input should be less than 1"),
        ("training.steps", "'training.steps': expected KEY=VALUE"),
        ("training.steps=[1", "training.steps: not valid YAML"),
        ("arms.sdd=null", "arms.sdd: nothing to drop; without it there are: ['dense', 'posthoc', 'sparse', 'ssd']"),
        ("moe.router_lr=0.1", "moe.router_lr: has no effect here: only a moe.posthoc_router"),
    ):
        assert configs(setting) == 1
        assert message in capsys.readouterr().err
    assert configs("seeds=[0]", "seeds=[1]") == 1
    assert "seeds: given more than once" in capsys.readouterr().err


def test_a_run_is_changed_by_settings_and_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"dense": {"method": "dense"}, "posthoc": {"method": "posthoc", "parent_arm": "dense"}}
    bench = Bench(tmp_path, arms=arms)
    folder = bench.dir("dense")
    bench.phases("dense")
    bench.stage("train", folder, "training.steps=10", "--until", "dense")
    assert load_run(folder / "config.yaml").training.steps == 10
    assert read_json_checked(folder / "phases/00-dense/phase.json")["steps"] == 10
    # Once more with the same settings there is nothing to do.
    capsys.readouterr()
    bench.stage("train", folder, "training.steps=10", "--until", "dense")
    assert "done already" in capsys.readouterr().err
    for setting, message in (
        ("training.stpes=5", "config.yaml: training.stpes: unknown key; did you mean 'steps'?"),
        ("data.sequence_length=8", "data: not a section of a run; allowed: model, moe, optim, training, switching"),
        ("moe.top_k=1", "moe.top_k: has no effect here: models of method dense have no experts"),
        ("model=3", "config.yaml: model: given 3; input should be a valid dictionary"),
        ("model.pretrained=none", "config.yaml: model: no config.json in folder 'none'"),
        ("optim.warmup_steps=10", "optim.warmup_steps 10: must be below training.steps 10"),
    ):
        assert main(["train", str(folder), setting]) == 1
        assert message in capsys.readouterr().err
        assert load_run(folder / "config.yaml").training.steps == 10


def test_a_first_phase_that_runs_share_is_not_changed_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, results = tiny_experiment(tmp_path), tmp_path / "results"
    grid = {"method": "ssd", "grid": {"moe.top_k": [1, 2]}}
    config.write_text(yaml.safe_dump({"base": "size.yaml", "arms": {"ssd": grid}}), encoding="utf-8")
    assert main(["configs", str(config), "--results", str(results)]) == 0
    owner, other = (results / f"tiny/runs/ssd.top_k_{k}-seed0" for k in (1, 2))
    assert load_run(other / "config.yaml").shares_warmup == owner.name
    assert main(["train", str(owner), "optim.lr=0.1"]) == 1
    assert f"{other.name} takes over this run's first phase" in capsys.readouterr().err
    assert main(["train", str(other), "moe.top_k=1"]) == 1
    assert "moe.top_k: tells this run from others of its grid" in capsys.readouterr().err
    # There is no text yet to train on, but the settings are written: a first phase of its own, or still the other's.
    assert main(["train", str(other), "switching.sparse_steps=4"]) == 1
    assert load_run(other / "config.yaml").shares_warmup == owner.name
    assert main(["train", str(other), "optim.lr=0.1"]) == 1
    assert load_run(other / "config.yaml").shares_warmup is None
    assert load_run(owner / "config.yaml").optim.lr == 0.01


@pytest.mark.whole_run
def test_snakemake_lays_settings_over_an_experiment(tmp_path: Path) -> None:
    config, results = tiny_experiment(tmp_path), tmp_path / "results"

    def snakemake(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command(config, results, "encode"), *more], cwd=ROOT, env=ENVIRONMENT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip

    done = snakemake("set={training: {steps: 50}, optim: {lr: 3e-3}, arms: {sparse: null, ssd: {label: 'a: b'}}}")
    assert done.returncode == 0, done.stdout
    run = load_run(results / "tiny/runs/ssd-seed0/config.yaml")
    assert (run.training.steps, run.optim.lr, run.label) == (50, 3e-3, "a: b")
    assert not (results / "tiny/runs/sparse-seed0").exists()
    wrong = snakemake("set={training: {stpes: 50}}")
    assert wrong.returncode != 0
    assert "training.stpes: unknown key; did you mean 'steps'?" in wrong.stdout


@pytest.mark.whole_run
def test_an_unknown_key_for_snakemake_is_refused_with_the_nearest(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "snakemake", "-n", "--config", "expriment=quick", f"results={tmp_path / 'results'}"]
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, check=False)
    assert done.returncode != 0
    assert "ssd_lit: --config expriment: unknown key; did you mean 'experiment'?" in done.stderr
