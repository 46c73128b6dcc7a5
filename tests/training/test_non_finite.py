"""Numbers that are not finite: told with step and place, never saved, and left out where a config wants to go on."""

import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_lit.cli import main
from ssd_lit.data.objectives import Batch
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.support import signals
from ssd_lit.tracking.metrics_log import read_metrics
from ssd_lit.training.module import Pretraining
from tests.conftest import Bench

TRAINING = {"steps": 40, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
            "checkpoint_every": 4}  # fmt: skip
DENSE = {"dense": {"method": "dense"}}
BAD = 14
"""The step, counted from 1, that goes wrong: two before it is looked at, and two after the last checkpoint."""


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


@pytest.fixture
def break_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """(steps, what the second FFN's output goes through) -> these steps, counted from 1, go wrong in every run."""

    def arrange(steps: set[int], what: Callable[[Tensor], Tensor]) -> None:
        now = [0]
        forward, posed = ExpertFFN.forward, Pretraining._posed

        def capture_inputs(module: Pretraining, batch: Batch, step: int) -> Batch:
            now[0] = step + 1
            for ffn in module.model.ffns:
                ffn.is_second = ffn is module.model.ffns[1]  # type: ignore[assignment]
            return posed(module, batch, step)

        def broken(ffn: ExpertFFN, x: Tensor) -> Tensor:
            out = forward(ffn, x)
            return what(out) if now[0] in steps and ffn.is_second and ffn.training else out

        monkeypatch.setattr(Pretraining, "_posed", capture_inputs)
        monkeypatch.setattr(ExpertFFN, "forward", broken)

    return arrange


def train(bench: Bench, capsys: pytest.CaptureFixture[str], arm: str = "dense") -> str:
    """Train a run that fails; returns the line that tells why."""
    capsys.readouterr()
    assert main(["train", str(bench.dir(arm)), "--threads", "1"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if ": failed: " in line]
    assert len(lines) == 1
    return lines[0].split(": failed: ")[1]


def all_tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list):
        for one in content.values() if isinstance(content, dict) else content:
            yield from all_tensors(one)


@pytest.mark.parametrize(
    ("what", "settings", "place"),
    [
        (lambda x: x * torch.inf, {}, "first in the output of backbone.transformer.h.1.mlp"),
        # The gradient of what lies behind the FFN is sound: the last of what lies before it is not.
        (
            _NanGradient.apply,
            {"precision": "bf16", "compile": True},
            "first in the gradient of backbone.transformer.h.1.mlp",
        ),
    ],
    ids=["loss", "gradient"],
)
def test_a_run_stops_with_step_place_and_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], break_steps: Any, monkeypatch: pytest.MonkeyPatch,
    what: Callable[[Tensor], Tensor], settings: dict[str, Any], place: str,
) -> None:  # fmt: skip
    # Compilation itself is not under test, only that the step that is run again is not compiled.
    monkeypatch.setattr(torch, "compile", lambda function, **_: torch._dynamo.disable(function))
    bench = Bench(tmp_path, training={**TRAINING, **settings}, arms=DENSE)
    break_steps({BAD}, what)
    told = train(bench, capsys)
    rolling = bench.dir("dense") / "work/rolling.ckpt"
    assert told.startswith(f"dense-seed0 00-dense: step {BAD} is not finite, {place}")
    (step,) = re.findall(rf"last good checkpoint: {re.escape(str(rolling))} \(step (\d+)\)", told)
    assert "lower optim.lr or set training.non_finite: skip" in told
    saved = torch.load(rolling, weights_only=True)
    assert 4 <= saved["global_step"] == int(step) < BAD
    assert all(one.isfinite().all() for one in all_tensors([saved["state_dict"], saved["optimizer_states"]]))
    # Started again as it is, it comes there again.
    assert train(bench, capsys).partition("; last good")[0] == told.partition("; last good")[0]


def test_a_run_that_diverges_tells_where_before_any_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, training=TRAINING, optim={"lr": 1e30, "warmup_steps": 0}, arms=DENSE)
    told = train(bench, capsys)
    assert "step 2 is not finite, first in the output of backbone.transformer" in told
    assert "no checkpoint yet" in told
    assert not list(bench.dir("dense").rglob("*.ckpt"))


@pytest.mark.parametrize(("stopped", "check_every"), [(True, 40), (False, BAD)], ids=["signal", "similarity"])
def test_weights_that_overflowed_are_not_saved_at_a_step_that_is_not_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stopped: bool, check_every: int
) -> None:
    ends = Pretraining.on_train_batch_end

    def overflow(module: Pretraining, *arguments: Any) -> None:
        ends(module, *arguments)
        if module.global_step == BAD - 1:
            module.model.ffns[1].w_in.data[0, 0] = torch.inf
            if stopped:
                monkeypatch.setattr(signals, "pending", lambda: "SIGTERM")

    monkeypatch.setattr(Pretraining, "on_train_batch_end", overflow)
    training = {**TRAINING, "log_every": 10, "checkpoint_every": 30, "validate_every": 30}
    arms = {"dense": {"method": "dense", "switching": {"check_every": check_every}}}
    bench = Bench(tmp_path, training=training, arms=arms)
    told = train(bench, capsys)
    assert told.startswith(f"dense-seed0 00-dense: step {BAD} is not finite, first in the ")
    assert not list(bench.dir("dense").rglob("*.ckpt"))


def test_skip_leaves_out_that_update_and_counts_it(tmp_path: Path, break_steps: Any, caplog: Any) -> None:
    bad = {BAD, 15, 30}
    bench = Bench(tmp_path, training={**TRAINING, "non_finite": "skip"}, arms=DENSE)
    break_steps(bad, lambda x: x * torch.inf)
    bench.phases("dense")
    points = read_metrics(bench.dir("dense") / "metrics.jsonl")
    left_out = dict(points["train/updates_left_out"])
    assert [left_out[step] for step in (12, 15, 27, 30, 40)] == [0, 2, 2, 3, 3]
    assert all(math.isfinite(loss) for _, loss in points["train/loss"])
    state = torch.load(bench.checkpoint("dense"), weights_only=True)["optimizer_states"][0]["state"]
    assert {float(one["step"]) for one in state.values()} == {37.0}
    assert "dense-seed0 00-dense: 2 updates left out by step 15" in caplog.text
    assert "3 updates left out by step 30" in caplog.text


def test_skip_ends_after_so_many_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str], break_steps: Any) -> None:
    bench = Bench(tmp_path, training={**TRAINING, "non_finite": "skip", "non_finite_limit": 4}, arms=DENSE)
    break_steps({5, 6, 7, *range(14, 40)}, lambda x: x * torch.inf)
    told = train(bench, capsys)
    assert "step 17 is not finite, the last of 4 in a row, first in the output of backbone.transformer.h.1.mlp" in told
    assert told.endswith("lower optim.lr")


def test_a_jump_of_the_loss_at_a_switch_is_logged_and_a_large_one_told(
    tmp_path: Path, break_steps: Any, caplog: Any
) -> None:
    bench = Bench(tmp_path, training={**TRAINING, "log_every": 1}, arms={"ssd": {"method": "ssd"}})
    sparse = bench.phases("ssd", "moefy")[-1].last_step
    # From the switch on an FFN adds the opposite of what it learnt to add, a hundredfold.
    break_steps(set(range(sparse + 1, 99)), lambda x: -100 * x)
    bench.phases("ssd")
    points = read_metrics(bench.dir("ssd") / "metrics.jsonl")
    loss, jumps = dict(points["train/loss"]), points["switch/loss_jump"]
    records = [json.loads(path.read_text()) for path in sorted(bench.dir("ssd").glob("phases/*/phase.json"))]
    expected = []
    for before, after in pairwise(record for record in records if record["steps"]):
        last = [
            loss[step + 1] for step in range(max(before["last_step"] - 10, before["first_step"]), before["last_step"])
        ]
        first = [
            loss[step + 1] for step in range(after["first_step"], min(after["first_step"] + 10, after["last_step"]))
        ]
        expected.append((after["first_step"] + len(first), mean(first) - mean(last)))
    assert [step for step, _ in jumps] == [step for step, _ in expected]
    assert [jump for _, jump in jumps] == pytest.approx([jump for _, jump in expected], abs=1e-5)
    assert "ssd-seed0 02-sparse: the loss jumped from" in caplog.text


def test_what_a_message_advises_goes_on_from_the_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], break_steps: Any
) -> None:
    bench = Bench(tmp_path, training=TRAINING, arms=DENSE)
    break_steps({BAD}, lambda x: x * torch.inf)
    assert "set training.non_finite: skip" in train(bench, capsys)
    before = read_metrics(bench.dir("dense") / "metrics.jsonl")["train/loss"]
    bench.stage("train", bench.dir("dense"), "training.non_finite=skip", "--until", "dense")
    after = read_metrics(bench.dir("dense") / "metrics.jsonl")["train/loss"]
    assert len(before) > 2
    # Points of before stand: it did not begin anew.
    assert after[: len(before)] == before
    assert read_metrics(bench.dir("dense") / "metrics.jsonl")["train/updates_left_out"][-1] == (40, 1)


def test_a_loss_that_is_left_out_beside_a_switch_hides_no_jump(tmp_path: Path, break_steps: Any) -> None:
    training = {**TRAINING, "non_finite": "skip"}
    bench = Bench(
        tmp_path, training=training, arms={"ssd": {"method": "ssd", "switching": {"switch_points": [12, 28]}}}
    )
    break_steps({11, 14}, lambda x: x * torch.inf)
    bench.phases("ssd")
    jumps = read_metrics(bench.dir("ssd") / "metrics.jsonl")["switch/loss_jump"]
    assert len(jumps) == 2
    assert all(math.isfinite(jump) for _, jump in jumps)
