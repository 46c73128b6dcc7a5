"""Lightning's logger and callback that pass metrics and stages to a recorder."""

from collections.abc import Mapping
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from ssd_lit.stages import stage_of
from ssd_lit.training.module import Pretraining
from ssd_lit.training.phase_switch import PhaseCallback, PhaseSwitch
from ssd_lit.training.schedule import Phase


class Recorder(Protocol):
    """Records metrics of a run and its current stage."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def begin(self, stage: str) -> None: ...


class RecorderLogger(Logger):
    """Passes metrics to a recorder, from the first process only; the others have none."""

    def __init__(self, recorder: Recorder | None):
        super().__init__()
        self._recorder = recorder

    @property
    def name(self) -> str:
        return "ssd_lit"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # Lightning also logs metrics of its own, such as an empty set at the end of an epoch.
        if self._recorder is not None and metrics and step is not None:
            self._recorder.log(step, metrics)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The recorder has the whole config already."""


class StageReporter(PhaseCallback):
    """Passes the stage of the next steps to the recorder: one fit trains several stages."""

    def __init__(self, switch: PhaseSwitch, recorder: Recorder):
        self._method = switch.run.config.method
        self._recorder = recorder

    def on_phase_start(self, trainer: Trainer, module: Pretraining, phase: Phase) -> None:
        self._recorder.begin(stage_of(self._method, phase.index, phase.mode))
