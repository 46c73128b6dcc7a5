"""The training of a run: one Lightning `fit` for all its phases."""

import atexit
import gc
import logging
import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from torch._subclasses.fake_tensor import FakeTensorMode

from ssd_lit.config import RunConfig, TrainingConfig
from ssd_lit.data.datamodule import TokenData
from ssd_lit.data.objectives import build_objective
from ssd_lit.models.flops import Costs, forward_costs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.models.memory import blocks_at_once
from ssd_lit.moe.backends import Activation, choose_backend, fastest_backend
from ssd_lit.run import Run
from ssd_lit.support.processes import this_process
from ssd_lit.support.signals import Preempted
from ssd_lit.training.activation_monitor import ActivationMonitor
from ssd_lit.training.checkpoint import build_model, load_weights, read_checkpoint, spent_elsewhere, starting_point
from ssd_lit.training.checkpointing import Checkpoints, RollingCheckpoint, Snapshots
from ssd_lit.training.data_parallel import WholeModels
from ssd_lit.training.logger import Recorder, RecorderLogger, StageReporter
from ssd_lit.training.module import Pretraining
from ssd_lit.training.non_finite import NonFinite
from ssd_lit.training.phase_switch import PhaseSwitch
from ssd_lit.training.sharding import Shards
from ssd_lit.training.switch_loss import SwitchLossLogger
from ssd_lit.training.throughput import Progress, ThroughputLogger

# The libraries' objects, half a million, live to the end: no collection looks at them from here on.
gc.freeze()
atexit.register(gc.unfreeze)
PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def build_trainer(run: Run, switch: PhaseSwitch, costs: Costs, recorder: Recorder | None) -> Trainer:
    """The trainer of a run; `switch` ends the training.

    Fitting starts a process for each further device. Raises ValueError if the machine has too few GPUs.
    """
    config, training = run.config, run.config.training
    meter, non_finite = ThroughputLogger(switch, costs), NonFinite(switch)
    snapshots = [Snapshots(run.folder, training.snapshot_every)] if training.snapshot_every else []
    trainer = Trainer(
        max_epochs=-1,  # only the phase switch ends the training
        devices=training.devices,
        num_nodes=training.nodes,
        strategy=_strategy(training),
        plugins=[_environment(), switch.checkpoints.writer],
        precision=PRECISION[training.precision],
        gradient_clip_val=config.optim.grad_clip,
        val_check_interval=training.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=RecorderLogger(recorder),
        callbacks=[
            # The order at the end of a step: decide whether the phase ends, measure, check, show, save. A phase that
            # ends is validated after the step; there too the switch comes first and saving last.
            switch,
            ActivationMonitor(config.name, training.log_every),
            non_finite,
            SwitchLossLogger(switch),
            meter,
            Progress(switch, meter),
            *([StageReporter(switch, recorder)] if recorder is not None else []),
            *snapshots,
            RollingCheckpoint(switch.checkpoints, training, non_finite.check),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.folder / "work",
    )
    # Lightning asks the first process at every step whether it got a SIGTERM, and waits for the GPU to read the answer:
    # 5 ms of a step of 50. `RollingCheckpoint` stops all processes together.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _strategy(training: TrainingConfig) -> Any:
    """How the processes share the model, as Lightning takes it."""
    if training.processes == 1:
        return "auto"
    return Shards(training.processes) if training.shard else WholeModels()


def _environment() -> ClusterEnvironment:
    """Who starts the processes. Lightning itself would take a cluster's single task for the number of processes."""
    match this_process().started_by:
        case "torchrun":
            return TorchElasticEnvironment()
        case "srun":
            return SLURMEnvironment(auto_requeue=False)
        case None:
            return LightningEnvironment()


@contextmanager
def silence_lightning() -> Iterator[None]:
    """Silence Lightning's start-up messages, its advice on settings, and warnings that only Lightning can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
        warnings.filterwarnings("ignore", message=".*has no `__len__`.*")
        warnings.filterwarnings("ignore", message=".*overridden `on_after_batch_transfer`.*")  # overridden on purpose
        warnings.filterwarnings("ignore", message=".*`srun` command.*")
        warnings.filterwarnings("ignore", message=".*all_gather is deprecated.*")  # Lightning's own use of it
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning uses an old name in torch
        yield


def train(run: Run, until: str, recorder: Recorder | None, provenance: dict[str, object]) -> PhaseSwitch:
    """Train a run from its latest state to the end of the stage `until`; returns its phase switch.

    All records and checkpoints are on the disk on return. Only the first process needs a recorder. Raises ValueError if
    the machine has too few GPUs.
    """
    config, start = run.config, starting_point(run)
    if torch.cuda.is_available() and config.training.devices > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"training.devices {config.training.devices}: this machine has {found} GPUs")
    model = build_model(config, run.vocab, read_weights=start.checkpoint is None, draw_weights=start.checkpoint is None)
    if start.checkpoint is not None and not start.step:
        # Before the run's own first step there are only weights to load, no optimiser state.
        load_weights(model, read_checkpoint(start.checkpoint))
    objective = build_objective(model.objective_name, run.vocab)
    elsewhere = spent_elsewhere(run)
    micro_batch_size = blocks_at_once(config, run.vocab)
    data = TokenData.of_run(
        config, run.tokens, objective.noise_per_token, micro_batch_size=micro_batch_size,
        # Reads on from the data position of the run that this one starts from, in the same order.
        first_block=elsewhere.tokens // config.data.sequence_length,
    )  # fmt: skip
    costs = forward_costs(config.model, config.moe, run.vocab, config.data.sequence_length)
    backend = _backend(config, model, micro_batch_size)
    if config.method != "dense" and this_process().is_first:
        print(f"{config.name}: sparse FFNs are computed by {backend}", flush=True)
    switch = PhaseSwitch(run, start.history, elsewhere, until, costs, Checkpoints(run), provenance)
    with silence_lightning():
        trainer = build_trainer(run, switch, costs, recorder)
        resume = start.checkpoint if start.step else None
        try:
            module = Pretraining(config, model, objective, micro_batch_size)
            trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        except Preempted:
            if trainer.strategy.launcher is not None:
                # The signal came while the processes of further devices waited for this one to begin.
                trainer.strategy.launcher.kill(signal.SIGTERM)
            raise
        finally:
            for worker in multiprocessing.active_children():
                # Data workers ignore the SIGTERM that schedulers send to all, and Python would wait for them.
                worker.kill()
                worker.join()
    torch.compiler.reset()  # CUDA graphs hold memory
    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # The measurements that follow run in this process only.
        torch.distributed.destroy_process_group()
    return switch


def _backend(config: RunConfig, model: LanguageModel, micro_batch_size: int) -> str:
    """The name of the backend that training uses, for `auto` the fastest for its batches.

    Raises ValueError for one that this machine cannot run, before any phase is trained.
    """
    ffn, name = model.ffns[0], config.moe.backend
    activation = Activation(ffn.activation, ffn.hidden_dropout.p)
    tokens = micro_batch_size * config.data.sequence_length
    with FakeTensorMode():
        x = torch.empty(
            tokens, ffn.w_in.shape[1],
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        )  # fmt: skip
    given = x, ffn.by_expert(), activation
    choose_backend(name, *given, weighted=ffn.router.weighted)
    return f"{fastest_backend(*given, weighted=ffn.router.weighted)} (auto)" if name == "auto" else name
