"""Dense training of GPT-2 small beside nanoGPT's model and trainer; through Lightning; with monitors and without.

    python benchmarks/throughput.py --nanogpt FOLDER [--shape small] [--rounds 5] [--steps 20]

FOLDER is a checkout of nanoGPT (github.com/karpathy/nanoGPT), of which model.py is imported. All train the same GPT-2
(GELU, biases, no dropout, 24 x 1024 tokens a step) in bf16 over float32 weights, compiled. nanoGPT's loop is that of
its train.py: its own AdamW, a batch drawn from a memory map while the GPU works, clipping, the loss read every tenth
step. Its model without biases, train.py's default, is measured too. Ours is a plain loop over one batch that lies on
the GPU, and the real trainer: LightningModule, data loader over token files, learning-rate schedule, phase switch; with
logging and monitors every tenth step and with none, in turns within one fit. Checkpoints, validation and similarity
checks are left out, everywhere.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpt2 import DEVICE, SHAPES, Shape, autocast, build, forget_peak, gibibytes, mfu, random_batch, shown, stepper
from lightning.pytorch import Callback, Trainer
from machine import RESULTS, machine, seconds_in_turns, synchronize
from torch import Tensor

from ssd_lit.config import MoEConfig, RunConfig, dump
from ssd_lit.data.datamodule import TokenData
from ssd_lit.data.objectives import Causal
from ssd_lit.paths import run_dir
from ssd_lit.records import Totals
from ssd_lit.run import Run
from ssd_lit.support.files import sha256, write_json, write_json_checked, write_text
from ssd_lit.tracking.metrics_log import MetricsLog
from ssd_lit.training.activation_monitor import ActivationMonitor
from ssd_lit.training.checkpointing import Checkpoints, RollingCheckpoint
from ssd_lit.training.fit import build_trainer, silence_lightning
from ssd_lit.training.module import Pretraining
from ssd_lit.training.phase_switch import PhaseSwitch
from ssd_lit.training.throughput import Progress, ThroughputLogger

RESULT = RESULTS / "throughput.json"
LOG_EVERY = 10
WARMUP = 2 * LOG_EVERY
"""Steps of the real trainer before the first stretch that is timed."""
BLOCKS = 4096
LOOKED_AT = 8
"""Steps in which the host's waits for the GPU are counted."""
OURS, NANO, UNBIASED = "ours, plain loop", "nanoGPT", "nanoGPT, no biases"
ON, OFF = "ours, Lightning, monitors on", "ours, Lightning, monitors off"
MOE = MoEConfig(experts=32, top_k=6)


def main() -> int:
    arguments = parse()
    shape = SHAPES[arguments.shape]
    torch.set_float32_matmul_precision("high")  # as nanoGPT's train.py sets it, for all
    peaks: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as name:
        trained = write_run(Path(name), run_config(shape, all_steps(arguments.rounds, arguments.steps)), shape)
        ways = {OURS: ours(shape)}
        if arguments.nanogpt is not None:
            source = load_nanogpt(arguments.nanogpt)
            ways = {NANO: nanogpt(source, shape, trained.tokens, bias=True), **ways}
            ways[UNBIASED] = nanogpt(source, shape, trained.tokens, bias=False)
        for way, run in ways.items():
            run(1)
            forget_peak()
            run(2)
            peaks[way] = gibibytes()
        turns = seconds_in_turns({way: partial(run, arguments.steps) for way, run in ways.items()}, arguments.rounds)
        seconds = {way: [one / arguments.steps for one in values] for way, values in turns.items()}
        # The memory of the models before is not the trainer's.
        ways.clear()
        del run
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        windows, fetching, peaks[ON] = fit(trained, shape, arguments.steps)
    seconds |= windows.seconds
    median = {way: statistics.median(values) for way, values in seconds.items()}
    flops = shape.batch * shape.costs(MOE).dense()
    found = {
        "shape": vars(shape),
        "seconds": seconds,
        "median_seconds": median,
        "tokens_per_second": {way: shape.tokens / one for way, one in median.items()},
        "mfu": {way: mfu(flops, one) for way, one in median.items()},
        "peak_gibibytes": peaks,
        "host_share_of_fetching": fetching,
        "waits_for_the_gpu": windows.waits,
        "monitors_on_over_off": statistics.median(on / off for on, off in zip(seconds[ON], seconds[OFF], strict=True)),
        "ours_over_nanogpt": median[NANO] / median[OFF] if NANO in median else None,
    }
    write_json(RESULT, {"machine": machine("transformers", "lightning"), **found})
    show(found)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; left out of the comparison without")
    parser.add_argument("--shape", default="small" if DEVICE.type == "cuda" else "tiny", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps of each in a round, a multiple of ten")
    return parser.parse_args()


def write_run(results: Path, config: RunConfig, shape: Shape) -> Run:
    """The folder of a run and its tokens, as `ssd-lit configs` and `ssd-lit encode` leave them."""
    run = Run(run_dir(results, config), results, config)
    write_text(run.folder / "config.yaml", dump(config))
    write_tokens(run.tokens, shape)
    return run


def write_tokens(folder: Path, shape: Shape) -> None:
    """Random tokens, in the files that training reads; they must not depend on the speed of a tokenizer."""
    folder.mkdir(parents=True)
    splits = {"train": BLOCKS, "validation": 64}
    index: dict[str, Any] = {
        "vocab_size": shape.vocabulary, "eos_id": 0, "dtype": "uint16", "sequence_length": shape.sequence, "splits": {},
        "digest": "random",
    }  # fmt: skip
    for split, blocks in splits.items():
        tokens = np.random.default_rng(blocks).integers(0, shape.vocabulary, blocks * shape.sequence + 1, np.uint16)
        path = folder / f"{split}.bin"
        path.write_bytes(tokens.tobytes())
        index["splits"][split] = {"tokens": len(tokens), "blocks": blocks, "sha256": sha256(path)}
    write_json_checked(folder / "index.json", index)


def ours(shape: Shape) -> Callable[[int], None]:
    """Steps of our model on one batch."""
    step = stepper(build(shape, MOE, "gelu"), random_batch(shape))

    def run(steps: int) -> None:
        for number in range(steps):
            loss = step()
            if number % LOG_EVERY == 0:
                loss.item()

    return run


def load_nanogpt(folder: Path) -> Any:
    """Its module `model`."""
    path = folder / "model.py" if folder.is_dir() else folder
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def nanogpt(source: Any, shape: Shape, tokens: Path, *, bias: bool) -> Callable[[int], None]:
    """Steps of nanoGPT's model, as its train.py takes them."""
    torch.manual_seed(0)
    with DEVICE:
        model = source.GPT(
            source.GPTConfig(
                block_size=shape.sequence, vocab_size=shape.vocabulary, n_layer=shape.layers, n_head=shape.heads,
                n_embd=shape.d_model, dropout=0.0, bias=bias,
            )
        )  # fmt: skip
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), DEVICE.type)
    compiled: Any = torch.compile(model)

    def draw() -> tuple[Tensor, Tensor]:
        stream = np.memmap(tokens / "train.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(stream) - shape.sequence, (shape.batch,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(stream[i + ahead : i + ahead + shape.sequence].astype(np.int64))
                         for i in starts])
            for ahead in (0, 1)
        )  # fmt: skip
        if DEVICE.type == "cuda":
            return x.pin_memory().to(DEVICE, non_blocking=True), y.pin_memory().to(DEVICE, non_blocking=True)
        return x, y

    def run(steps: int) -> None:
        x, y = draw()
        for number in range(steps):
            with autocast():
                _, loss = compiled(x, y)
            x, y = draw()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if number % LOG_EVERY == 0:
                loss.item()

    return run


class Windows(Callback):
    """Times stretches of a fit, those with what watches it and those without in turns.

    Before that, it looks for a stretch without logging at how often the host waits for the GPU.
    """

    def __init__(self, steps: int, warmup: int):
        self.seconds: dict[str, list[float]] = {ON: [], OFF: []}
        self._steps = steps
        self._warmup = warmup
        self._since = 0.0
        self._all: list[Callback] = []
        self.waits: list[str] | None = None
        """Where the host waited for the GPU in the steps that were looked at; None without a GPU."""
        self._looking = warnings.catch_warnings(record=True)
        self._seen: list[warnings.WarningMessage] | None = None

    def _look_for_waits(self, step: int) -> None:
        """Over steps between two logged ones, the first of which has come and gone."""
        if DEVICE.type != "cuda":
            return
        if step == LOG_EVERY + 1:
            self._seen = self._looking.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif step == LOG_EVERY + 1 + LOOKED_AT:
            torch.cuda.set_sync_debug_mode("default")
            self._looking.__exit__(None, None, None)
            found = [one for one in self._seen or [] if "synchroniz" in str(one.message)]
            self.waits = [f"{one.filename.rpartition('site-packages/')[2]}:{one.lineno}" for one in found]

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._all = list(trainer.callbacks)  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._look_for_waits(trainer.global_step)
        done = trainer.global_step - self._warmup
        if done == 0:
            forget_peak()
        if done < 0 or done % self._steps:
            return
        synchronize()
        now = time.perf_counter()
        turn = done // self._steps
        if turn:
            self.seconds[(ON, OFF)[(turn - 1) % 2]].append((now - self._since) / self._steps)
        watching = (ThroughputLogger, ActivationMonitor, Progress)
        # Another list, for this one is being gone through.
        trainer.callbacks = [  # type: ignore[attr-defined]
            one for one in self._all if turn % 2 == 0 or not isinstance(one, watching)
        ]
        synchronize()
        self._since = time.perf_counter()


class Points(MetricsLog):
    """Points of a run that is of one stage."""

    def begin(self, stage: str) -> None: ...


class TimedData(TokenData):
    """Tells how long the host waits for the training batches."""

    seconds = 0.0
    fetched = 0

    def train_dataloader(self) -> Any:
        return _Timed(self, super().train_dataloader())


class _Timed:
    def __init__(self, told: TimedData, loader: Any):
        self._told = told
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self._told.seconds += time.perf_counter() - start
            self._told.fetched += 1
            yield batch


def all_steps(rounds: int, steps: int) -> int:
    """Steps of a fit with so many rounds; the last one ends the last stretch by beginning."""
    return WARMUP + 2 * rounds * steps + 1


def fit(run: Run, shape: Shape, steps: int) -> tuple[Windows, float, float | None]:
    """A fit that was timed, the share of a step in which the host fetches data, and the peak memory."""
    model, costs = build(shape, MOE, "gelu"), shape.costs(MOE)
    data = TimedData.of_run(run.config, run.tokens, noise_per_token=0, micro_batch_size=shape.batch)
    assert isinstance(data, TimedData)
    windows = Windows(steps, WARMUP)
    points = Points(run.folder / "metrics.jsonl")
    switch = PhaseSwitch(run, [], Totals(), "dense", costs, Checkpoints(run), provenance={})
    with silence_lightning():
        trainer = build_trainer(run, switch, costs, points)
        # The final model is saved behind the last stretch; nothing is to be saved within one.
        trainer.callbacks = [  # type: ignore[attr-defined]
            windows,
            *(one for one in trainer.callbacks if not isinstance(one, RollingCheckpoint)),  # type: ignore[attr-defined]
        ]
        trainer.fit(Pretraining(run.config, model, Causal(), shape.batch), data)
    points.close()
    step = statistics.median(windows.seconds[OFF])
    return windows, data.seconds / data.fetched / step, gibibytes()


def run_config(shape: Shape, steps: int) -> RunConfig:
    """A dense run of the shape, watched every tenth step, with neither checkpoints nor checks in its way."""
    beyond = steps + 1
    return RunConfig.model_validate(
        {
            "experiment": "throughput", "arm": "dense", "method": "dense", "label": "Dense", "seed": 0,
            "data": {
                "name": "random", "sources": [{"kind": "files", "paths": ["random.txt"]}],
                "sequence_length": shape.sequence,
            },
            "model": shape.model("gelu").model_dump(),
            "moe": MOE.model_dump(),
            "optim": {"lr": 6e-4, "warmup_steps": 10},
            "training": {
                "steps": steps, "batch_size": shape.batch, "compile": True, "log_every": LOG_EVERY,
                "precision": "bf16" if DEVICE.type == "cuda" else "fp32",
                "validate_every": beyond, "checkpoint_every": beyond, "validation_blocks": 1,
            },
            "switching": {"check_every": beyond},
        }
    )  # fmt: skip


def show(found: dict[str, Any]) -> None:
    print(f"{'':<32}{'ms':>9}{'tokens/s':>11}{'MFU':>7}{'GiB':>7}")
    for way, seconds in found["median_seconds"].items():
        print(
            f"{way:<32}{1e3 * seconds:9.2f}{found['tokens_per_second'][way]:11,.0f}{shown(found['mfu'][way], '.1%'):>7}"
            f"{shown(found['peak_gibibytes'].get(way), '.2f'):>7}"
        )
    print(f"Lightning without monitors / nanoGPT, in speed: {shown(found['ours_over_nanogpt'], '.3f')} (at least 1)")
    print(f"monitors on / off, in time: {found['monitors_on_over_off']:.3f} (at most 1.03)")
    waits = found["waits_for_the_gpu"]
    if waits is not None:
        print(f"the host waits for the GPU {len(waits) / LOOKED_AT:.1f} times a step: {sorted(set(waits))}")
    print(f"the host fetches data for {found['host_share_of_fetching']:.1%} of a step, while the GPU works")


if __name__ == "__main__":
    sys.exit(main())
