"""Where training stands, for the person who waits for it."""

import sys
import time
from typing import Any

from lightning.pytorch import Trainer
from tqdm import tqdm

from ssd_lit.training.meter import ThroughputLogger
from ssd_lit.training.module import Pretraining
from ssd_lit.training.phase_switch import PhaseCallback, PhaseSwitch
from ssd_lit.training.schedule import Phase

LINE_SECONDS = 15.0


class Progress(PhaseCallback):
    """Shows phase, step, loss, tokens a second and time left: a bar on a terminal, else a line now and then."""

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
            # Written as lines where nobody would see a bar move, as in a log file.
            self._bar = tqdm(
                total=config.training.steps,
                initial=trainer.global_step,
                unit="step",
                dynamic_ncols=True,
                file=sys.stderr if sys.stderr.isatty() else _Nowhere(),
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


class _Nowhere:
    """A file that forgets."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...
