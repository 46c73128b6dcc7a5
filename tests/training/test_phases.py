"""Real phases of real runs, on a model of a few thousand weights."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ssd_lit.cli import main
from ssd_lit.moe import permutation
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.records import PhaseRecord
from ssd_lit.support.files import read_json
from ssd_lit.support.signals import STATUS
from ssd_lit.tracking.metrics_log import read_metrics
from ssd_lit.training import checkpointing
from tests.conftest import Bench, tiny_experiment
from tests.forked import Forked, run_forked

pytestmark = pytest.mark.whole_run

TIMES = {"train/tokens_per_second", "train/seconds"}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's model and optimiser, by name."""
    content = torch.load(checkpoint, weights_only=True)
    flat = dict(content["state_dict"])
    for i, state in content["optimizer_states"][0]["state"].items():
        flat |= {f"{i}/{name}": value for name, value in state.items()}
    return flat


def same(a: Path, b: Path) -> bool:
    expected, got = weights(a), weights(b)
    return expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    return {name: curve for name, curve in read_metrics(run_dir / "metrics.jsonl").items() if name not in TIMES}


def kill_when(
    process: Forked | subprocess.Popen[str],
    reached: Path,
    least_step: int,
    number: int = signal.SIGKILL,
    *,
    alone: bool = False,
) -> tuple[int | None, str]:
    """Kill a process once it has logged a step of at least that number; its status and what it said.

    The signal goes to all its processes, as when a machine goes down, a scheduler stops a job or somebody types Ctrl-C;
    or to the first one `alone`.
    """
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if reached.exists() and any(f'"step": {s},' in reached.read_text() for s in range(least_step, least_step + 9)):
            break
        time.sleep(0.002)
    assert process.poll() is None, "the run ended before it could be killed"
    if alone:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    # Until all that could write there have ended.
    _, told = process.communicate(timeout=120)
    return process.returncode, told


def is_gone_within(seconds: float, group: int) -> bool:
    """Whether all processes of a group end in that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


LONGER = {"steps": 240, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
          "checkpoint_every": 4}  # fmt: skip
# Long enough to be killed, however soon the pattern is stable.
LONG_PHASES = {"tau": 0.9, "check_every": 4, "sparse_fraction": 0.4, "warmup_min_steps": 60, "warmup_max_steps": 60,
               "sparse_steps": 48, "dense_min_steps": 2, "dense_max_steps": 4, "final_dense_steps": 60}  # fmt: skip
SSD = {"ssd": {"method": "ssd"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """An ssd run of long phases, from its first step to its final model in one process."""
    bench = Bench(tmp_path_factory.mktemp("whole"), training=LONGER, switching=LONG_PHASES, arms=SSD)
    bench.phases("ssd")
    return bench


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The same of brief phases, for tests that need not meet a process at work."""
    bench = Bench(tmp_path_factory.mktemp("brief"), arms=SSD)
    bench.phases("ssd")
    return bench


def test_a_run_killed_in_every_kind_of_phase_ends_bit_for_bit_as_one_that_was_not(whole: Bench, tmp_path: Path) -> None:
    broken = Bench(tmp_path, training=LONGER, switching=LONG_PHASES, arms=SSD)
    run = broken.dir("ssd")
    command, rolling = ["train", run, "--threads", "1"], run / "work/rolling.ckpt"
    # In the warm-up, the first sparse phase, and the last dense one.
    for step, asked in ((12, signal.SIGTERM), (72, signal.SIGUSR1), (190, signal.SIGINT)):
        kill_when(Forked(*command), run / "metrics.jsonl", step)
        assert rolling.exists() or (run / "work/previous.ckpt").exists()
        # Asked to stop, it saves the step that it stands at, whichever it is.
        status, told = kill_when(Forked(*command), run / "metrics.jsonl", step + 12, asked, alone=True)
        assert status == STATUS
        (stopped,) = re.findall(rf"stopped by {asked.name} after step (\d+), which is saved", told)
        assert torch.load(rolling, weights_only=True)["global_step"] == int(stopped) >= step + 12
    assert same(whole.checkpoint("ssd"), broken.checkpoint("ssd"))
    assert curves(whole.dir("ssd")) == curves(run)
    # When an interrupted phase began as a whole is not known.
    origins = {record.name: record.provenance for record in broken.phases("ssd")}
    assert {name for name, origin in origins.items() if origin["began"] is None} == {
        "00-dense",
        "02-sparse",
        "06-dense",
    }


def test_phases_are_on_record_with_device_and_time_one_after_another(whole: Bench) -> None:
    origins = [record.provenance for record in whole.phases("ssd")]
    times = [at for origin in origins for at in (origin["began"], origin["ended"])]
    assert times == sorted(times)
    assert len({(origin["host"], *origin["devices"]) for origin in origins}) == 1
    assert origins[0]["devices"]


def kill_at(call: int, module: ModuleType, name: str, half: Callable[..., None]) -> None:
    """Have this process do half of what a function does, and die, at its so-manieth call."""
    function, calls = getattr(module, name), count(1)

    def work(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            half(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(module, name, work)


def half_permuted(ffn: ExpertFFN, order: torch.Tensor, optimizer: object) -> None:
    # Weights have moved, moments have not.
    with torch.no_grad():
        ffn.w_in.copy_(ffn.w_in[order])


def half_written(content: object, path: Path) -> None:
    path.write_bytes(b"PK half of a checkpoint")


KILLS = {"permuting": (permutation, "permute_neurons", half_permuted), "writing": (checkpointing, "save", half_written)}


def kill_while(where: str, call: int) -> None:
    kill_at(call, *KILLS[where])


# Of two layers: the first MoEfication of the second one, then the second MoEfication.
@pytest.mark.parametrize(("where", "call"), [("permuting", 2), ("permuting", 3), ("writing", 3), ("writing", 9)])
def test_a_run_killed_while_it_switches_or_saves_ends_bit_for_bit_as_one_that_was_not(
    brief: Bench, tmp_path: Path, where: str, call: int
) -> None:
    broken = Bench(tmp_path, arms=SSD)
    run = broken.dir("ssd")
    arguments = ["train", run, "--until", "sparse_phases", "--threads", "1"]
    process = Forked(*arguments, before=partial(kill_while, where, call))
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told[-2000:]
    assert same(brief.checkpoint("ssd"), broken.checkpoint("ssd"))
    assert curves(brief.dir("ssd")) == curves(run)
    assert not list(run.rglob(".*.part"))


def test_a_run_in_pieces_is_the_run_in_one_process(brief: Bench, tmp_path: Path) -> None:
    """Stage by stage, each in a process of its own as the workflow has it, and from every phase that was kept."""
    pieces = Bench(tmp_path, training={**LONGER, "steps": 40, "keep_phases": True}, arms=SSD)
    run = pieces.dir("ssd")
    for stage in ("warmup", "moefy", "sparse_phases"):
        run_forked("train", run, "--until", stage, "--threads", "1")
    for stage in ("warmup", "moefy", "sparse_phases"):
        assert same(brief.checkpoint("ssd", stage), pieces.checkpoint("ssd", stage)), stage
    assert curves(brief.dir("ssd")) == curves(run)
    chain = pieces.phases("ssd")
    assert [record.mode for record in chain] == [
        "dense",
        "moefy",
        "sparse",
        "dense",
        "moefy",
        "sparse",
        "dense",
        "moefy",
    ]
    for record in reversed(chain[1:]):
        pieces.stage("train", run, "--from", record.name, "--until", "sparse_phases")
        assert same(brief.checkpoint("ssd"), pieces.checkpoint("ssd")), record.name
        assert curves(brief.dir("ssd")) == curves(run)


def test_from_a_phase_that_was_not_kept_is_refused(whole: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    before = whole.checkpoint("ssd").read_bytes()
    for start, told in (("05-sparse", "training.keep_phases keeps them"), ("09-dense", "has not reached it")):
        assert main(["train", str(whole.dir("ssd")), "--from", start]) == 1
        assert told in capsys.readouterr().err
    assert whole.checkpoint("ssd").read_bytes() == before


def test_a_stage_whose_result_stands_is_not_done_again_whoever_removed_its_record(
    whole: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that waited in a queue since before its run went on; Snakemake removes the record before it begins."""
    results = tmp_path / "results"
    shutil.copytree(whole.results, results)
    run = results / "tiny/runs/ssd-seed0"
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".json", ".ckpt", ".jsonl")}
    for stage in ("warmup", "moefy", "sparse_phases"):
        (run / f"stages/{stage}.json").unlink()
        capsys.readouterr()
        assert main(["train", str(run), "--until", stage]) == 0
        assert f"{stage}: done already; its record is restored" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_copy_of_a_run_goes_on_without_its_text(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    bench = Bench(tmp_path / "here", arms=SSD)
    bench.phases("ssd", "warmup")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(bench.results, tmp_path / "elsewhere/moved")
    bench.phases("ssd")
    expected = bench.checkpoint("ssd")
    (tmp_path / "here/text.txt").unlink()
    assert main(["train", str(tmp_path / "elsewhere/moved/tiny/runs/ssd-seed0"), "--threads", "1"]) == 0
    assert same(expected, tmp_path / "elsewhere/moved/tiny/runs/ssd-seed0/checkpoints/sparse_phases.ckpt")


def test_a_run_killed_before_its_first_checkpoint_stays_one_run(tmp_path: Path) -> None:
    training = {"steps": 200, "batch_size": 4, "log_every": 3, "validate_every": 300, "validation_blocks": 6,
                "checkpoint_every": 300}  # fmt: skip
    bench = Bench(tmp_path, training=training, arms={"sparse": {"method": "sparse"}})
    bench.phases("sparse", "moefy")
    run = bench.dir("sparse")
    kill_when(Forked("train", run, "--threads", "1"), run / "metrics.jsonl", 21)
    assert not (run / "work/rolling.ckpt").exists()
    before = read_json(run / "mlflow.json")
    bench.phases("sparse")
    after = read_json(run / "mlflow.json")
    assert after["key"] == before["key"]
    assert before["run_id"] in (None, after["run_id"])
    assert "moefy" in after["stages"]
    steps = [step for step, _ in read_metrics(run / "metrics.jsonl")["train/loss"]]
    assert steps == [*range(3, 200, 3), 200]


def test_a_config_changed_after_an_interruption_starts_the_run_anew(tmp_path: Path) -> None:
    training = {"steps": 200, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
                "checkpoint_every": 4}  # fmt: skip
    arms = {"dense": {"method": "dense"}}
    (tmp_path / "changed").mkdir()
    (tmp_path / "alone").mkdir()
    bench = Bench(tmp_path / "changed", training=training, arms=arms)
    run = bench.dir("dense")
    kill_when(Forked("train", run, "--threads", "1"), run / "metrics.jsonl", 21)
    assert list((run / "work").glob("*.ckpt"))
    other = {"training": {**training, "steps": 40}, "optim": {"lr": 5e-3, "warmup_steps": 3}, "arms": arms}
    changed = tiny_experiment(tmp_path / "changed", **other)
    bench.stage("configs", changed, "--results", bench.results)
    bench.phases("dense")
    alone = Bench(tmp_path / "alone", **other)
    assert same(alone.checkpoint("dense"), bench.checkpoint("dense"))
    assert curves(alone.dir("dense")) == curves(run)


def test_from_a_phase_with_other_settings_the_run_is_made_anew(tmp_path: Path) -> None:
    training = {"steps": 40, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
                "checkpoint_every": 50, "keep_phases": True}  # fmt: skip
    arms = {"ssd": {"method": "ssd", "switching": {"switch_points": [8, 12, 16, 28]}}}
    for name in ("changed", "alone"):
        (tmp_path / name).mkdir()
    bench = Bench(tmp_path / "changed", training=training, arms=arms)
    bench.phases("ssd")
    run = bench.dir("ssd")
    # What was kept before the phase is of the other learning rate.
    bench.stage("train", run, "optim.lr=0.0003", "--from", "05-sparse", "--until", "sparse_phases", "--threads", "1")
    alone = Bench(tmp_path / "alone", training=training, arms=arms, optim={"lr": 3e-4, "warmup_steps": 3})
    alone.phases("ssd")
    assert curves(alone.dir("ssd")) == curves(run)


def test_a_run_of_another_method_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    bench = Bench(tmp_path, arms={"one": {"method": "ssd"}})
    bench.phases("one")
    changed = tiny_experiment(tmp_path, arms={"one": {"method": "sparse"}})
    bench.stage("configs", changed, "--results", bench.results)
    run = bench.dir("one")
    assert main(["train", str(run), "--until", "sparse_phases", "--threads", "1"]) == 0
    left = {folder: {path.name for path in (run / folder).iterdir()} for folder in ("phases", "stages", "checkpoints")}
    assert left["phases"] == {"00-moefy", "01-sparse"}
    assert left["stages"] == {"moefy.json", "sparse_phases.json"}
    assert left["checkpoints"] == {"moefy.ckpt", "sparse_phases.ckpt"}


@pytest.mark.parametrize(
    ("number", "workers", "alone"),
    [
        (signal.SIGTERM, 1, False), (signal.SIGTERM, 4, False), (signal.SIGUSR1, 4, False), (signal.SIGINT, 1, False),
        (signal.SIGINT, 4, True), (signal.SIGTERM, 1, True),
    ],
)  # fmt: skip
def test_a_stop_ends_the_data_workers_too(tmp_path: Path, number: signal.Signals, workers: int, alone: bool) -> None:
    training = {**LONGER, "steps": 4000, "workers": workers, "validate_every": 3}
    bench = Bench(tmp_path, training=training, arms={"dense": {"method": "dense"}})
    run = bench.dir("dense")
    process = Forked("train", run, "--threads", "1")
    status, told = kill_when(process, run / "metrics.jsonl", 9, number, alone=alone)
    assert status == STATUS
    assert "Traceback" not in told
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def as_one_task_of_a_cluster() -> None:
    os.environ |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
                   "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job", "SLURM_NODELIST": "localhost"}  # fmt: skip


def test_two_processes_train_the_same_run_as_one(tmp_path: Path) -> None:
    """Sums of gradients and of losses round differently, and no more; a cluster that gives one task does not matter.

    Two compute their parts of a batch in pieces. They decide alike when a phase ends, and group neurons alike. Asked to
    stop, both save and end together (by SIGTERM: tests/training/test_placement.py).
    """
    model = {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32, "dropout": 0.0}
    switching = {"tau": 0.9, "check_every": 4, "sparse_fraction": 0.4, "warmup_min_steps": 4, "warmup_max_steps": 8,
                 "sparse_steps": 6, "dense_min_steps": 2, "dense_max_steps": 4, "final_dense_steps": 8}  # fmt: skip
    found = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        training = {"steps": 32, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 7,
                    "checkpoint_every": 4, "devices": devices, "workers": devices - 1,
                    "micro_batch_size": 4 // devices**2}  # fmt: skip
        bench = Bench(folder, training=training, model=model, switching=switching, arms=SSD)
        run = bench.dir("ssd")
        if devices == 1:
            assert main(["train", str(run), "--threads", "2"]) == 0
        else:
            command = ["train", run, "--threads", "2"]
            for number, alone in ((signal.SIGUSR1, True), (signal.SIGINT, False)):
                logged = curves(run)["train/loss"][-1][0] if (run / "metrics.jsonl").exists() else 0
                process = Forked(*command)
                status, told = kill_when(process, run / "metrics.jsonl", logged + 3, number, alone=alone)
                assert status == STATUS
                assert f"stopped by {number.name} after step" in told
                assert is_gone_within(10, process.pid)
            process = Forked(*command, before=as_one_task_of_a_cluster)
            _, told = process.communicate()
            assert process.returncode == 0, told
            assert told.count("begins") == 1
        assert (run / "evaluation.json").exists()
        found[devices] = bench.phases("ssd"), curves(run), weights(bench.checkpoint("ssd"))
    (chain, expected, one), (other, got, two) = found[1], found[2]
    assert [r.mode for r in chain] == [r.mode for r in other]
    for record, again in zip(chain, other, strict=True):
        assert (record.steps, record.tokens, record.flops) == (again.steps, again.tokens, again.flops)
        assert record.similarity == again.similarity
    assert expected.keys() == got.keys()
    for name in ("train/loss", "train/lr", "train/flops", "validation/loss", "activation/active_ratio/layer_01"):
        assert [step for step, _ in expected[name]] == [step for step, _ in got[name]]
        torch.testing.assert_close(
            torch.tensor([v for _, v in got[name]]), torch.tensor([v for _, v in expected[name]]),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    ids = [name for name in one if name.endswith("neuron_ids")]
    assert all(torch.equal(one[name], two[name]) for name in ids)


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
    points = read_metrics(kept.dir("ssd") / "metrics.jsonl")
    assert points["train/flops"][-1] == (40, total.flops)
    assert points["validation/loss"][-1][0] == 40
    assert {"activation/active_ratio/layer_01", "experts/load_entropy/layer_01", "activation/similarity"} <= set(points)
    # A moment is compared with an earlier one, never with itself.
    checks = [step for record in chain for step, _ in record.similarity]
    assert checks == sorted(set(checks))


def test_moefication_of_a_checkpoint_moves_neurons_and_keeps_the_function(kept: Bench) -> None:
    before, after = (weights(kept.checkpoint("ssd", stage)) for stage in ("warmup", "moefy"))
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
    a, b = (torch.load(kept.checkpoint(arm), weights_only=True)["state_dict"] for arm in ("dense", "posthoc"))
    name = "model.backbone.transformer.h.1.mlp.b_in"
    assert torch.equal(a[name].sort().values, b[name].sort().values)
    assert torch.equal(a["model.backbone.transformer.wte.weight"], b["model.backbone.transformer.wte.weight"])


def test_training_lowers_the_loss_in_both_modes(kept: Bench) -> None:
    for arm in ("dense", "sparse"):
        kept.phases(arm)
        losses = [value for _, value in read_metrics(kept.dir(arm) / "metrics.jsonl")["validation/loss"]]
        assert losses[-1] < losses[0] - 0.3


def test_what_is_done_stays_and_a_stage_that_a_run_does_not_have_is_refused(
    kept: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = kept.checkpoint("ssd", "warmup")
    before = checkpoint.stat().st_mtime_ns
    kept.stage("train", kept.dir("ssd"), "--until", "warmup")
    assert checkpoint.stat().st_mtime_ns == before
    assert "done already" in capsys.readouterr().err
    assert main(["train", str(kept.dir("ssd")), "--until", "dense"]) == 1
    assert "allowed: warmup, moefy, sparse_phases, evaluate" in capsys.readouterr().err


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
        assert main(["train", str(bench.dir("dense")), "--until", "dense"]) == 0
        found[name] = weights(bench.checkpoint("dense"))
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
        assert main(["train", str(bench.dir("dense")), "--until", "dense"]) == 0
        found.append(weights(bench.checkpoint("dense")))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


ROUTED = {"router_steps": 3, "posthoc_router": "centers"}


def test_the_record_of_a_router_is_restored_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {
        "ssd": {"method": "ssd", "moe": ROUTED},
        "posthoc": {"method": "posthoc", "parent_arm": "ssd", "moe": ROUTED},
    }
    bench = Bench(tmp_path, arms=arms)
    for arm in arms:
        bench.phases(arm)
        kept = {path: path.read_bytes() for path in bench.dir(arm).glob("checkpoints/*.ckpt")}
        (bench.dir(arm) / "stages/route.json").unlink()
        capsys.readouterr()
        bench.phases(arm)
        assert "route: done already; its record is restored" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in kept} == kept


def test_experts_that_were_trained_stay_together_behind_a_router_too(tmp_path: Path) -> None:
    arms = {
        "ssd": {"method": "ssd"}, "routed": {"method": "ssd", "moe": ROUTED},
        "one": {"method": "posthoc", "parent_arm": "ssd"}, "other": {"method": "posthoc", "parent_arm": "routed"},
    }  # fmt: skip
    bench = Bench(tmp_path, arms=arms)
    for arm in ("routed", "ssd", "other", "one"):  # the first has the others' first phase
        bench.phases(arm)
    one, other = (torch.load(bench.checkpoint(arm), weights_only=True)["state_dict"] for arm in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_call_that_is_refused_changes_no_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path, arms={"dense": {"method": "dense"}, "ssd": {"method": "ssd"}})
    for arm in ("dense", "ssd"):
        bench.phases(arm)
        before = (bench.dir(arm) / "config.yaml").read_bytes()
        for more, told in (
            (("--until", "nothing"), "has no such stage"),
            (("--from", "nothing"), "has not reached it"),
        ):
            assert main(["train", str(bench.dir(arm)), "optim.lr=0.001", *more]) == 1
            assert told in capsys.readouterr().err
            assert (bench.dir(arm) / "config.yaml").read_bytes() == before
    # With other settings all is made anew, wherever it is to begin.
    bench.stage("train", bench.dir("ssd"), "optim.lr=0.001", "--from", "sparse_phases", "--until", "sparse_phases")
    assert bench.open("ssd").config.optim.lr == 0.001
    assert bench.open("ssd").is_done("sparse_phases")


def test_what_was_trained_with_other_settings_is_neither_exported_nor_measured_nor_built_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"dense": {"method": "dense"}, "posthoc": {"method": "posthoc", "parent_arm": "dense"}}
    bench = Bench(tmp_path, arms=arms)
    bench.phases("dense")
    bench.stage("evaluate", bench.dir("dense"))
    measured = (bench.dir("dense") / "evaluation.json").read_bytes()
    bench.stage("configs", tmp_path / "tiny.yaml", "model.activation=gelu", "--results", bench.results)
    for call in (
        ("export", bench.dir("dense"), "--out", tmp_path / "out"), ("evaluate", bench.dir("dense")),
        ("train", bench.dir("posthoc")),
    ):  # fmt: skip
        assert main(list(map(str, call))) == 1
        assert "dense-seed0: was trained with other settings or data; `ssd-lit train`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert (bench.dir("dense") / "evaluation.json").read_bytes() == measured
