"""One training phase of a run: one Lightning `fit`, from the previous phase's checkpoint to its own."""

import signal
from pathlib import Path

import torch

from ssd_lit.config import RunConfig
from ssd_lit.data.blocks import load_index
from ssd_lit.data.module import TokenData
from ssd_lit.data.objectives import Specials, build_objective
from ssd_lit.files import same_file
from ssd_lit.layout import PhaseRecord, Totals, phase_dir, rolling_checkpoint
from ssd_lit.models.flops import forward_costs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.backends import Activation, choose_backend, fastest_backend
from ssd_lit.stopping import Stopped
from ssd_lit.training.checkpoint import SWITCH_STATE, build_model, load_weights, read_checkpoint
from ssd_lit.training.logger import Recorder
from ssd_lit.training.meter import phase_flops
from ssd_lit.training.module import Pretraining
from ssd_lit.training.records import finished
from ssd_lit.training.rolling_checkpoint import newest_state
from ssd_lit.training.schedule import Phase
from ssd_lit.training.trainer import build_trainer, quiet


def train_phase(
    run_dir: Path,
    config: RunConfig,
    phase: Phase,
    history: list[PhaseRecord],
    tokens_dir: Path,
    recorder: Recorder | None,
) -> None:
    """Train the phase to its end, which its rolling checkpoint then holds.

    Starts from the phase's own rolling checkpoint if it was interrupted (the one before if that is damaged), else from
    the checkpoint of the phase before, else from the model's first weights. Only the first process needs a recorder.
    """
    rolling = rolling_checkpoint(run_dir, phase.index, phase.mode)
    interrupted = newest_state(rolling)
    if interrupted is not None and interrupted[SWITCH_STATE]["ended_by"] is not None:
        return
    specials = Specials.of(load_index(tokens_dir))
    start = _spent_before(history)
    before = phase_dir(run_dir, history[-1].index, history[-1].mode) / "last.ckpt" if history else None
    # Before the run's own first step there is no optimiser state to go on from, only weights.
    resume = rolling if interrupted is not None else before if phase.first_step else None
    fresh = before is None and resume is None
    model = build_model(config, specials, read_weights=fresh, draw_weights=fresh)
    if before is not None and resume is None:
        load_weights(model, read_checkpoint(before))
    model.set_mode("sparse" if phase.mode == "sparse" else "dense")
    objective = build_objective(model.objective_name, specials)
    # Reading goes on where the run that this one started from stopped, in the same order.
    skipped = start.steps - phase.first_step
    data = TokenData.of_run(config, tokens_dir, objective.draws, skipped_steps=skipped)
    costs = forward_costs(config.model, config.moe, specials, config.data.sequence_length)
    backend = _backend(config, model)
    if phase.mode == "sparse":
        print(f"{config.name} {phase.name}: sparse FFNs are computed by {backend}", flush=True)
    with quiet():
        trainer = build_trainer(config, phase, start, costs, recorder, run_dir)
        try:
            trainer.fit(Pretraining(config, model, objective), data, ckpt_path=resume, weights_only=True)
        except Stopped:
            if trainer.strategy.launcher is not None:
                # Asked while the processes of further devices waited for this one to begin.
                trainer.strategy.launcher.kill(signal.SIGTERM)
            raise
        finally:
            # Where one process trains phase after phase, the graphs of all of them would stay on the GPU; recording
            # still more of them failed there in the twelfth. What was compiled is found again on disk.
            torch.compiler.reset()


def _backend(config: RunConfig, model: LanguageModel) -> str:
    """The name of the backend that training takes, for `auto` the one that fits its batches.

    Raises ValueError for one that this machine cannot run, before any phase is trained in vain.
    """
    ffn, name = model.ffns[0], config.moe.backend
    activation = Activation(ffn.activation, ffn.hidden_dropout.p)
    tokens = config.training.batch_size // config.training.devices * config.data.sequence_length
    x = torch.empty(
        tokens, 0,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
    )  # fmt: skip
    choose_backend(name, x, activation)
    return f"{fastest_backend(x, activation)} (auto)" if name == "auto" else name


def close_phase(
    run_dir: Path, config: RunConfig, phase: Phase, history: list[PhaseRecord], tokens_dir: Path
) -> PhaseRecord:
    """Write the last.ckpt of a phase that was trained to its end; returns what phase.json is to say."""
    rolling = rolling_checkpoint(run_dir, phase.index, phase.mode)
    checkpoint = read_checkpoint(rolling, mapped=True)
    same_file(rolling, phase_dir(run_dir, phase.index, phase.mode) / "last.ckpt")
    state = checkpoint["callbacks"][SWITCH_STATE]
    step = checkpoint["global_step"]
    steps = step - phase.first_step
    specials = Specials.of(load_index(tokens_dir))
    costs = forward_costs(config.model, config.moe, specials, config.data.sequence_length)
    spent = Totals(
        steps=steps,
        sparse_steps=steps if phase.mode == "sparse" else 0,
        tokens=steps * config.training.batch_size * config.data.sequence_length,
        flops=phase_flops(config, phase, costs, step),
        seconds=state["seconds"],
    )
    return finished(config, phase, history, _spent_before(history), spent, state["ended_by"], state["similarity"])


def _spent_before(history: list[PhaseRecord]) -> Totals:
    return history[-1].total if history else Totals()
