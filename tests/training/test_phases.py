"""Real phases of real runs, on a model of a few thousand weights."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ssd_lit.layout import PhaseRecord

from ssd_lit.cli import main
from ssd_lit.files import read_json
from ssd_lit.points import read_points
from ssd_lit.stopping import STATUS
from tests.conftest import Bench, tiny_experiment

PROGRAM = str(Path(sys.executable).with_name("ssd-lit"))
TIMES = {"train/tokens_per_second", "train/seconds"}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    content = torch.load(checkpoint, weights_only=True)
    flat = dict(content["state_dict"])
    for i, state in content["optimizer_states"][0]["state"].items():
        flat |= {f"{i}/{name}": value for name, value in state.items()}
    return flat


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    return {name: curve for name, curve in read_points(run_dir / "metrics.jsonl").items() if name not in TIMES}


def kill_when(command: list[str], reached: Path, least_step: int, number: int = signal.SIGKILL) -> tuple[int, str]:
    """Start the command, and kill it once it has logged a step of at least that number; its status and what it said.

    SIGKILL goes to all its processes, as when a machine goes down; any other signal to the first one alone.
    """
    process = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if reached.exists() and any(f'"step": {s},' in reached.read_text() for s in range(least_step, least_step + 9)):
            break
        time.sleep(0.002)
    assert process.poll() is None, "the phase ended before it could be killed"
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    # Until all that could write there have ended.
    _, told = process.communicate(timeout=120)
    return process.returncode, told


def test_a_run_killed_in_every_kind_of_phase_ends_bit_for_bit_as_one_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    longer = {"steps": 240, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
              "checkpoint_every": 4}  # fmt: skip
    # Long enough to be killed, however soon the pattern is stable.
    switching = {"tau": 0.9, "check_every": 4, "sparse_share": 0.4, "warmup_min_steps": 60, "warmup_max_steps": 60,
                 "sparse_steps": 96, "dense_min_steps": 2, "dense_max_steps": 4, "final_dense_steps": 60}  # fmt: skip
    whole = Bench(tmp_path / "a", training=longer, switching=switching)
    broken = Bench(tmp_path / "b", training=longer, switching=switching)
    whole.phases("ssd")

    run = broken.dir("ssd")
    for index, name, asked in ((0, "00-dense", signal.SIGTERM), (2, "02-sparse", signal.SIGUSR1)):
        first = broken.phases("ssd", stop_after=index)[-1].total.steps if index else 0
        command, rolling = [PROGRAM, "train", str(run), name, "--threads", "1"], run / "work" / name / "rolling.ckpt"
        kill_when(command, run / "metrics.jsonl", first + 12)
        assert rolling.exists()
        # Asked to stop, it saves the step that it stands at, whichever it is.
        status, told = kill_when(command, run / "metrics.jsonl", first + 24, asked)
        assert status == STATUS
        (step,) = re.findall(rf"stopped by {asked.name} after step (\d+), which is saved", told)
        assert torch.load(rolling, weights_only=True)["global_step"] == int(step) >= first + 24
        assert not (run / "phases" / name / "phase.json").exists()

    expected, got = weights(whole.last_checkpoint("ssd")), weights(broken.last_checkpoint("ssd"))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert curves(whole.dir("ssd")) == curves(run)
    assert not any((run / "work").glob("*/rolling.ckpt"))


def test_a_run_killed_before_its_first_checkpoint_stays_one_run(tmp_path: Path) -> None:
    training = {"steps": 200, "batch_size": 4, "log_every": 3, "validate_every": 300, "validation_blocks": 6,
                "checkpoint_every": 300}  # fmt: skip
    bench = Bench(tmp_path, training=training, arms={"sparse": {"method": "sparse"}})
    bench.phases("sparse", stop_after=1)
    run = bench.dir("sparse")
    kill_when([PROGRAM, "train", str(run), "01-sparse", "--threads", "1"], run / "metrics.jsonl", 21)
    assert not (run / "work/01-sparse/rolling.ckpt").exists()
    before = read_json(run / "mlflow.json")
    bench.phases("sparse")
    after = read_json(run / "mlflow.json")
    assert after["key"] == before["key"]
    assert before["run_id"] in (None, after["run_id"])
    assert "00-moefy" in after["stages"]
    steps = [step for step, _ in read_points(run / "metrics.jsonl")["train/loss"]]
    assert steps == [*range(3, 200, 3), 200]


def test_a_phase_that_is_done_need_not_train_again_until_the_next_stage_begins(bench: Bench) -> None:
    """Killed before Snakemake knows that a phase is done, the workflow removes its outputs and asks for it again."""
    run = bench.dir("dense")
    bench.phases("dense")
    book = read_json(run / "mlflow.json")
    before, points = weights(bench.last_checkpoint("dense")), (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "phases/00-dense")
    bench.phases("dense")
    after = weights(bench.last_checkpoint("dense"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (run / "metrics.jsonl").read_bytes() == points
    assert read_json(run / "mlflow.json") == book
    bench.stage("evaluate", run)
    assert not (run / "work").exists()


def test_a_config_changed_after_an_interruption_starts_the_phase_anew(tmp_path: Path) -> None:
    training = {"steps": 200, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
                "checkpoint_every": 4}  # fmt: skip
    arms = {"dense": {"method": "dense"}}
    (tmp_path / "changed").mkdir()
    (tmp_path / "whole").mkdir()
    bench = Bench(tmp_path / "changed", training=training, arms=arms)
    run = bench.dir("dense")
    kill_when([PROGRAM, "train", str(run), "00-dense", "--threads", "1"], run / "metrics.jsonl", 21)
    assert (run / "work/00-dense/rolling.ckpt").exists()
    other = {"training": {**training, "steps": 40}, "optim": {"lr": 5e-3, "warmup_steps": 3}, "arms": arms}
    changed = tiny_experiment(tmp_path / "changed", **other)
    bench.stage("configs", changed, "--results", bench.results)
    bench.phases("dense")
    whole = Bench(tmp_path / "whole", **other)
    expected, got = weights(whole.last_checkpoint("dense")), weights(bench.last_checkpoint("dense"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert curves(whole.dir("dense")) == curves(run)


def test_two_processes_train_the_same_run_as_one(tmp_path: Path) -> None:
    """Sums of gradients and of losses round differently, and no more; a cluster that gives one task does not matter.

    Asked to stop, both save and end together.
    """
    cluster = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
               "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job", "SLURM_NODELIST": "localhost"}  # fmt: skip
    model = {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32, "dropout": 0.0}
    arms = {name: {"method": name} for name in ("dense", "sparse")}
    found = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        training = {"steps": 24, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 7,
                    "checkpoint_every": 4, "devices": devices}  # fmt: skip
        bench = Bench(folder, training=training, model=model, arms=arms)
        for arm, phase in (("dense", "00-dense"), ("sparse", "01-sparse")):
            bench.phases(arm, stop_after=int(phase[:2]))
            run = bench.dir(arm)
            if (devices, arm) == (2, "dense"):
                command = [PROGRAM, "train", str(run), phase, "--threads", "2"]
                status, told = kill_when(command, run / "metrics.jsonl", 3, signal.SIGTERM)
                assert status == STATUS
                assert "stopped by SIGTERM after step" in told
            done = subprocess.run(
                [PROGRAM, "train", str(run), phase, "--threads", "2"], env={**os.environ, **cluster},
                check=True, timeout=300, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert done.stderr.count("begins") == devices
            record = PhaseRecord.read(run / "phases" / phase / "phase.json")
            found[devices, arm] = record, curves(run)
    for arm in arms:
        (record, expected), (other, got) = found[1, arm], found[2, arm]
        assert (record.steps, record.tokens, record.flops) == (other.steps, other.tokens, other.flops)
        assert expected.keys() == got.keys()
        for name in ("train/loss", "train/lr", "train/flops", "validation/loss", "activation/active_ratio/layer_01"):
            assert [step for step, _ in expected[name]] == [step for step, _ in got[name]]
            torch.testing.assert_close(
                torch.tensor([v for _, v in got[name]]), torch.tensor([v for _, v in expected[name]]),
                rtol=1e-4, atol=1e-4,
            )  # fmt: skip
    similarity = [found[devices, "dense"][0].similarity for devices in (1, 2)]
    assert similarity[0]
    assert similarity[0] == similarity[1]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """For tests that look only: what one of them has trained, the next finds done."""
    return Bench(tmp_path_factory.mktemp("kept"))


def test_ssd_runs_its_schedule_and_counts_what_it_spends(kept: Bench) -> None:
    chain = kept.phases("ssd")
    modes = [record.mode for record in chain]
    assert modes[:4] == ["dense", "moefy", "sparse", "dense"]
    assert modes[-2:] == ["dense", "moefy"]
    total = chain[-1].total
    assert total.steps == 40
    assert total.sparse_steps == sum(r.steps for r in chain if r.mode == "sparse") == 16
    assert total.tokens == 40 * 4 * 16
    assert chain[-1].ended_by == "moefied"
    dense = kept.phases("dense")
    assert dense[0].ended_by == "budget"
    # A sparse step costs less, a dense step the same.
    assert total.flops < dense[0].total.flops
    per_dense_step = dense[0].flops / 40
    for record in chain:
        if record.mode == "dense":
            assert record.flops == record.steps * per_dense_step
    points = read_points(kept.dir("ssd") / "metrics.jsonl")
    assert points["train/flops"][-1] == (40, total.flops)
    assert points["validation/loss"][-1][0] == 40
    assert {"activation/active_ratio/layer_01", "experts/load_entropy/layer_01", "activation/similarity"} <= set(points)
    # A moment is compared with an earlier one, never with itself.
    checks = [step for record in chain for step, _ in record.similarity]
    assert checks == sorted(set(checks))


def test_moefication_of_a_checkpoint_moves_neurons_and_keeps_the_function(kept: Bench) -> None:
    phases = kept.dir("ssd") / "phases"
    chain = kept.phases("ssd", stop_after=2)
    before, after = (torch.load(phases / r.name / "last.ckpt", weights_only=True)["state_dict"] for r in chain)
    name = "model.backbone.transformer.h.0.mlp"
    x = torch.randn(9, 16, dtype=torch.double)
    y = [
        torch.relu(x @ s[f"{name}.w_in"].double().T + s[f"{name}.b_in"].double()) @ s[f"{name}.w_out"].double()
        for s in (before, after)
    ]
    assert not torch.equal(before[f"{name}.w_in"], after[f"{name}.w_in"])
    torch.testing.assert_close(y[0], y[1], rtol=0, atol=1e-12)


def test_posthoc_reuses_the_dense_model_and_what_it_cost(kept: Bench) -> None:
    dense = kept.phases("dense")
    (record,) = kept.phases("posthoc")
    assert (record.steps, record.total.steps, record.total.flops) == (0, 40, dense[-1].total.flops)
    a, b = (torch.load(kept.last_checkpoint(arm), weights_only=True)["state_dict"] for arm in ("dense", "posthoc"))
    name = "model.backbone.transformer.h.1.mlp.b_in"
    assert torch.equal(a[name].sort().values, b[name].sort().values)
    assert torch.equal(a["model.backbone.transformer.wte.weight"], b["model.backbone.transformer.wte.weight"])


def test_training_lowers_the_loss_in_both_modes(kept: Bench) -> None:
    for arm in ("dense", "sparse"):
        kept.phases(arm)
        losses = [value for _, value in read_points(kept.dir(arm) / "metrics.jsonl")["validation/loss"]]
        assert losses[-1] < losses[0] - 0.3


def test_a_phase_that_is_done_stays_and_one_out_of_turn_is_refused(bench: Bench, capsys) -> None:  # type: ignore[no-untyped-def]
    from ssd_lit.cli import main

    bench.phases("ssd", stop_after=1)
    checkpoint = bench.dir("ssd") / "phases/00-dense/last.ckpt"
    before = checkpoint.stat().st_mtime_ns
    bench.stage("train", bench.dir("ssd"), "00-dense")
    assert checkpoint.stat().st_mtime_ns == before
    assert main(["train", str(bench.dir("ssd")), "01-dense"]) == 1
    assert "goes on with 01-moefy" in capsys.readouterr().err


def test_bf16_and_dropout_train(tmp_path: Path) -> None:
    training = {"steps": 12, "batch_size": 4, "precision": "bf16", "log_every": 3, "validate_every": 6,
                "validation_blocks": 4, "checkpoint_every": 4}  # fmt: skip
    bench = Bench(tmp_path, training=training, arms={"sparse": {"method": "sparse"}})
    assert bench.phases("sparse")[-1].total.steps == 12


def test_neither_workers_nor_cores_decide_what_is_trained_but_threads_do(tmp_path: Path) -> None:
    """Threads are a setting of the run, so a stage that is not told otherwise takes as many, on any machine."""
    training = {"steps": 12, "batch_size": 4, "log_every": 3, "validate_every": 6, "validation_blocks": 4}
    found, used = {}, {}
    for name, changes in (("plain", {}), ("workers", {"workers": 2}), ("threads", {"threads": 2})):
        (tmp_path / name).mkdir()
        arms = {"dense": {"method": "dense"}}
        bench = Bench(tmp_path / name, training={**training, **changes}, arms=arms)
        # As a person or the workflow calls it: without a number of threads.
        assert main(["train", str(bench.dir("dense")), "00-dense"]) == 0
        found[name] = weights(bench.last_checkpoint("dense"))
        used[name] = PhaseRecord.read(bench.dir("dense") / "phases/00-dense/phase.json").provenance["threads"]
    assert used == {"plain": 1, "workers": 1, "threads": 2}
    assert all(torch.equal(found["plain"][name], found["workers"][name]) for name in found["plain"])


def test_a_deterministic_training_gives_the_same_bits_on_several_threads(tmp_path: Path) -> None:
    """Compiled for two threads, gradients of the embedding are added up in any order if nothing is said."""
    training = {
        "steps": 8, "batch_size": 64, "log_every": 4, "validate_every": 8, "validation_blocks": 4,
        "compile": True, "threads": 2, "deterministic": True,
    }  # fmt: skip
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        bench = Bench(tmp_path / name, training=training, arms={"dense": {"method": "dense"}})
        assert main(["train", str(bench.dir("dense")), "00-dense"]) == 0
        found.append(weights(bench.last_checkpoint("dense")))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
