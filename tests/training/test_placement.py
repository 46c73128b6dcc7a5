"""How the work of a run is spread changes rounding only: pieces of a batch, devices, machines, shards."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_lit.pipeline.verify import verify
from ssd_lit.training.checkpoint import check_checkpoint, read_checkpoint
from tests.conftest import Bench
from tests.forked import Forked
from tests.training.test_phases import curves, kill_when

pytestmark = pytest.mark.whole_run

MODEL = {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32, "dropout": 0.0}
SWITCHING = {"tau": 0.9, "check_every": 4, "sparse_fraction": 0.4, "warmup_min_steps": 4, "warmup_max_steps": 8,
             "sparse_steps": 6, "dense_min_steps": 2, "dense_max_steps": 4, "final_dense_steps": 8}  # fmt: skip
TRAINING = {"steps": 32, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 8,
            "checkpoint_every": 4}  # fmt: skip
ARMS = {
    "ssd": {"method": "ssd"}, "gate": {"method": "sparse", "moe": {"router": "gate", "balance_weight": 0.5}},
    # Another tau: else the two would share their warm-up.
    "routed": {"method": "ssd", "moe": {"posthoc_router": "centers", "router_steps": 20}, "switching": {"tau": 0.95}},
}  # fmt: skip
CURVES = ("train/loss", "train/lr", "train/flops", "validation/loss", "activation/active_ratio/layer_01")


def bench(folder: Path, **training: Any) -> Bench:
    folder.mkdir()
    return Bench(folder, training={**TRAINING, **training}, model=MODEL, switching=SWITCHING, arms=ARMS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One process that computes whole batches."""
    return bench(tmp_path_factory.mktemp("plain") / "bench")


def assert_alike(plain: Bench, other: Bench, arm: str) -> None:
    """The same phases, curves and weights, but for rounding."""
    expected, got = plain.phases(arm), other.open(arm).phases()
    assert [(r.mode, r.steps, r.tokens, r.flops) for r in expected] == [
        (r.mode, r.steps, r.tokens, r.flops) for r in got
    ]
    assert [r.similarity for r in expected] == [r.similarity for r in got]
    lines, again = curves(plain.dir(arm)), curves(other.dir(arm))
    assert lines.keys() == again.keys()
    for name in (*CURVES, *(["experts/load_entropy/layer_01"] if arm == "gate" else [])):
        assert [step for step, _ in lines[name]] == [step for step, _ in again[name]]
        torch.testing.assert_close(
            torch.tensor([v for _, v in again[name]]), torch.tensor([v for _, v in lines[name]]), rtol=2e-4, atol=2e-4
        )
    stage = plain.open(arm).training_stages[-1]
    before = read_checkpoint(plain.open(arm).checkpoint(stage))["state_dict"]
    after = read_checkpoint(other.open(arm).checkpoint(stage))["state_dict"]
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("arm", ARMS)
def test_pieces_of_a_batch_and_activations_computed_again_change_nothing(
    plain: Bench, tmp_path: Path, arm: str
) -> None:
    """The load-balancing loss of a learned router is that of the whole batch, not the mean of those of its pieces.

    A router is trained behind the model in pieces too.
    """
    pieces = bench(tmp_path / "pieces", micro_batch_size=2, activation_checkpointing=True)
    pieces.phases(arm)
    assert_alike(plain, pieces, arm)


def nodes(run: Path) -> list[subprocess.Popen[str]]:
    """Two machines, by torchrun on this one: each starts two processes of the run's training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
        "--master-addr", "127.0.0.1", "--master-port", str(port),
    ]  # fmt: skip
    return [
        subprocess.Popen(
            [*command, "--node-rank", str(rank), "-m", "ssd_lit", "train", str(run), "--threads", "2"],
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip


def test_two_machines_train_a_divided_model_and_two_devices_go_on_with_it(plain: Bench, tmp_path: Path) -> None:
    """Through warm-up, MoEfication, sparse phase and stops; only the first of four processes records and prints."""
    divided = bench(tmp_path / "divided", nodes=2, devices=2, shard=True, keep_phases=True)
    run = divided.dir("ssd")
    first, second = nodes(run)
    _, told = kill_when(first, run / "metrics.jsonl", 14, signal.SIGTERM)
    _, beside = second.communicate(timeout=60)
    assert re.search(r"stopped by SIGTERM after step \d+, which is saved", told)
    assert "ssd-lit train" not in beside
    assert (run / "work/rolling.ckpt").is_dir()
    check_checkpoint(run / "work/rolling.ckpt")
    stopped = read_checkpoint(run / "work/rolling.ckpt")["global_step"]
    assert stopped >= 14

    process = Forked("train", run, "training.nodes=1", "--threads", "2")
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert told.count("begins") == 1
    assert (run / "evaluation.json").exists()
    assert_alike(plain, divided, "ssd")
    lines: list[str] = []
    verify(run, lines.append)
    # But for the number of nodes, which was changed by hand, and tables that nobody has made yet.
    expected = ("ssd-seed0 config.yaml", "ssd-seed0 summary.csv")
    assert [line for line in lines if line.startswith("MISMATCH") and not line[10:].startswith(expected)] == []
    shard = next((run / "phases/00-dense/weights.ckpt").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"damaged \(the checksum of {shard.name} does not fit"):
        check_checkpoint(shard.parent)
