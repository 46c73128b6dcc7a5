"""Which stage of a run the training stands in, for the records."""

from lightning.pytorch import Trainer

from ssd_lit.records import stage_of
from ssd_lit.training.logger import Recorder
from ssd_lit.training.module import Pretraining
from ssd_lit.training.phase_switch import PhaseCallback, PhaseSwitch
from ssd_lit.training.schedule import Phase


class StageTeller(PhaseCallback):
    """Tells the recorder of the stage whose steps follow: one fit goes through several."""

    def __init__(self, switch: PhaseSwitch, recorder: Recorder):
        self._method = switch.run.config.method
        self._recorder = recorder

    def on_phase_start(self, trainer: Trainer, module: Pretraining, phase: Phase) -> None:
        self._recorder.begin(stage_of(self._method, phase.index, phase.mode))
