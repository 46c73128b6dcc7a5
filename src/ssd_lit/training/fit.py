"""The training of a run: one Lightning `fit` that goes through phase after phase."""

import multiprocessing
import signal

import torch

from ssd_lit.config import RunConfig
from ssd_lit.data.datamodule import TokenData
from ssd_lit.data.objectives import build_objective
from ssd_lit.models.flops import forward_costs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.backends import Activation, choose_backend, fastest_backend
from ssd_lit.run import Run
from ssd_lit.support.signals import Preempted
from ssd_lit.training.checkpoint import build_model, load_weights, read_checkpoint
from ssd_lit.training.checkpointing import Checkpoints
from ssd_lit.training.logger import Recorder
from ssd_lit.training.module import Pretraining
from ssd_lit.training.phase_switch import PhaseSwitch
from ssd_lit.training.start import spent_elsewhere, starting_point
from ssd_lit.training.trainer import build_trainer, quiet


def train(run: Run, until: str, recorder: Recorder | None, provenance: dict[str, object]) -> PhaseSwitch:
    """Train from where the run stands to the end of a stage; all is on record and on the disk when it returns.

    Only the first process needs a recorder. Returns the phase switch, which knows the phases that were gone through.
    """
    config, start = run.config, starting_point(run)
    model = build_model(config, run.vocab, read_weights=start.checkpoint is None, draw_weights=start.checkpoint is None)
    if start.checkpoint is not None and not start.step:
        # Before the run's own first step there is no optimiser state to go on from, only weights.
        load_weights(model, read_checkpoint(start.checkpoint))
    objective = build_objective(model.objective_name, run.vocab)
    elsewhere = spent_elsewhere(run)
    # Reading goes on where the run that this one started from stopped, in the same order.
    data = TokenData.of_run(config, run.tokens, objective.noise_per_token, skipped_steps=elsewhere.steps)
    costs = forward_costs(config.model, config.moe, run.vocab, config.data.sequence_length)
    backend = _backend(config, model)
    if config.method != "dense":
        print(f"{config.name}: sparse FFNs are computed by {backend}", flush=True)
    switch = PhaseSwitch(run, start.history, elsewhere, until, costs, Checkpoints(run), provenance)
    with quiet():
        trainer = build_trainer(run, switch, costs, recorder)
        resume = start.checkpoint if start.step else None
        try:
            trainer.fit(Pretraining(config, model, objective), data, ckpt_path=resume, weights_only=True)
        except Preempted:
            if trainer.strategy.launcher is not None:
                # Asked while the processes of further devices waited for this one to begin.
                trainer.strategy.launcher.kill(signal.SIGTERM)
            raise
        finally:
            for worker in multiprocessing.active_children():
                # Data workers do not hear the SIGTERM that schedulers send to all, and Python would wait for them.
                worker.kill()
                worker.join()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # What this process measures next is not for the others to take part in.
        torch.distributed.destroy_process_group()
    torch.compiler.reset()
    return switch


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
