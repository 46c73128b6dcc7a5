"""Loss, throughput and cost of training at every logged step, and the progress display."""

import sys
import time
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from tqdm import tqdm

from ssd_lit.models.flops import PEAK_FLOPS, Costs
from ssd_lit.training.module import Pretraining
from ssd_lit.training.optim import lr_factor
from ssd_lit.training.phase_switch import PhaseCallback, PhaseSwitch
from ssd_lit.training.schedule import Phase, phase_flops


class Point(NamedTuple):
    """A global step, and what the phase had cost by then."""

    step: int
    seconds: float
    flops: float


class ThroughputLogger(PhaseCallback):
    """Logs the mean loss since the last logged step, tokens a second, training FLOPs, seconds and MFU.

    Logs at the end of a phase too, so that no point covers two phases.
    """

    def __init__(self, switch: PhaseSwitch, costs: Costs):
        self.last: dict[str, float] = {}
        """The latest logged values."""
        self._switch = switch
        self._config = switch.run.config
        self._costs = costs
        self._point = Point(0, 0.0, 0.0)
        """The last that was logged."""
        self._peak: float | None = None

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        if module.device.type == "cuda" and self._config.training.precision == "bf16":
            self._peak = PEAK_FLOPS.get(torch.cuda.get_device_name(module.device))

    def on_phase_start(self, trainer: Trainer, module: Pretraining, phase: Phase) -> None:
        step = trainer.global_step
        self._point = Point(step, self._switch.elapsed(), phase_flops(self._config, phase, self._costs, step))

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        step, training, optim = trainer.global_step, self._config.training, self._config.optim
        if self._switch.ended_by is None and step % training.log_every:
            return
        loss = module.take_train_loss()
        before, self._point = self._point, self._now(step)
        seconds = self._point.seconds - before.seconds
        step_tokens = training.batch_size * self._config.data.sequence_length
        self.last = {
            "train/loss": loss,
            # The optimizer has that of the next step already.
            "train/lr": optim.lr * lr_factor(step - 1, config=optim, steps=training.steps),
            "train/tokens_per_second": (step - before.step) * step_tokens / seconds,
            **self._costs_by(self._point),
        }
        if self._peak is not None:
            done = (self._point.flops - before.flops) / seconds
            self.last["train/mfu"] = done / (self._peak * trainer.world_size)
        module.record(self.last)

    def on_validation_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        # At every step with a validation loss, so that it can be drawn over each of them.
        module.record(self._costs_by(self._now(trainer.global_step)))

    def _now(self, step: int) -> Point:
        last, phase = self._point, self._switch.phase
        spent = phase_flops(self._config, phase, self._costs, step, since=last.step)
        return Point(step, self._switch.elapsed(), last.flops + spent)

    def _costs_by(self, point: Point) -> dict[str, float]:
        """What the run has cost by a point in the phase."""
        before, config = self._switch.before, self._config
        step_tokens = config.training.batch_size * config.data.sequence_length
        return {
            "train/tokens": before.tokens + (point.step - self._switch.phase.first_step) * step_tokens,
            "train/flops": before.flops + point.flops,
            "train/seconds": before.seconds + point.seconds,
        }


LINE_SECONDS = 15.0
"""Time between progress lines where there is no terminal."""


class Progress(PhaseCallback):
    """Shows phase, step, loss, tokens a second and time left: a bar on a terminal, else lines in the log."""

    def __init__(self, switch: PhaseSwitch, meter: ThroughputLogger):
        self._switch = switch
        self._meter = meter
        self._bar: tqdm[Any] | None = None
        self._last_line = 0.0

    def on_phase_start(self, trainer: Trainer, module: Pretraining, phase: Phase) -> None:
        if not trainer.is_global_zero:
            return
        config = self._switch.run.config
        if self._bar is None:
            self._last_line = time.monotonic()
            # Without a terminal the bar only formats the lines that are printed.
            self._bar = tqdm(
                total=config.training.steps,
                initial=trainer.global_step,
                unit="step",
                dynamic_ncols=True,
                file=sys.stderr if sys.stderr.isatty() else _NullWriter(),
            )
        self._bar.set_description_str(f"{config.name} {phase.name}")

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        if self._bar is None:
            return
        self._bar.update()
        if self._meter.last:
            loss, rate = self._meter.last["train/loss"], self._meter.last["train/tokens_per_second"]
            self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s", refresh=False)
        if not sys.stderr.isatty() and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(str(self._bar), file=sys.stderr, flush=True)

    def teardown(self, trainer: Trainer, module: Pretraining, stage: str) -> None:  # type: ignore[override]
        if self._bar is not None:
            self._bar.close()


class _NullWriter:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...
