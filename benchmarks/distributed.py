"""Training on two GPUs: gradients beside those of one process that is not compiled.

    python benchmarks/distributed.py

A GPT-2 of three layers in float32, D 256, F 1024, in dense mode and in sparse mode (E 32, K 6, fused), 16 x 128 tokens.
Its activation is smooth: of ReLUs whose input is zero but for rounding, some would fire in one of them alone.
Gradients are added up (`training.devices`) or divided (`training.shard`), plain and compiled, with activations kept and
computed again. They are those of the third pass, when CUDA graphs run from their records. Errors are relative to the
largest gradient of each parameter.
"""

import itertools
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt2 import Shape, build, random_batch
from machine import RESULTS, machine
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from ssd_lit.config import MoEConfig
from ssd_lit.data.objectives import Batch
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.names import Activation, Mode
from ssd_lit.support.files import write_json
from ssd_lit.training.data_parallel import GradientSums
from ssd_lit.training.sharding import shard

PROCESSES, PASSES = 2, 3
SHAPE = Shape(layers=3, d_model=256, heads=4, batch=16, sequence=128, vocabulary=512)
MOE = MoEConfig(experts=32, top_k=6, backend="fused")
ACTIVATION: Activation = "gelu_new"
MODES: tuple[Mode, ...] = ("dense", "sparse")
MOST = 1e-4


def gradients(model: LanguageModel, batch: Batch, mode: Mode, sums: GradientSums | None = None) -> dict[str, Tensor]:
    """The gradients of the last of some passes, by name, on the CPU."""
    model.set_mode(mode)
    for _ in range(PASSES):
        model.zero_grad()
        loss = model.loss(batch)
        if sums is None:
            loss.backward()
        else:
            sums.begin()
            (loss / PROCESSES).backward()
            sums.finish()
    grads: dict[str, Any] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).cpu() for name, g in grads.items()}


def work(rank: int, port: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cuda", (PROCESSES,))
    found = {}
    for divided, compiled, checkpointed in itertools.product((False, True), repeat=3):
        model = build(SHAPE, MOE, ACTIVATION)
        batch = {name: rows.chunk(PROCESSES)[rank] for name, rows in random_batch(SHAPE).items()}
        if checkpointed:
            model.checkpoint_activations()
        if compiled:
            model.compile_layers(graphs=not divided)
        if divided:
            shard(model, mesh)
        sums = None if divided else GradientSums(model)
        way = ["divided" if divided else "added up", *["compiled"] * compiled, *["checkpointed"] * checkpointed]
        for mode in MODES * 2:
            found[", ".join([mode, *way])] = gradients(model, batch, mode, sums)
        torch._dynamo.reset()
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


def main() -> int:
    if torch.cuda.device_count() < PROCESSES:
        print(f"needs {PROCESSES} GPUs, this machine has {torch.cuda.device_count()}")
        return 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (port, folder), nprocs=PROCESSES)
        found = torch.load(Path(folder) / "gradients.pt")
    model = build(SHAPE, MOE, ACTIVATION)
    batch = random_batch(SHAPE)
    alone = {mode: gradients(model, batch, mode) for mode in MODES}
    worst = {}
    for way, theirs in found.items():
        own = alone[MODES[way.startswith("sparse")]]
        worst[way] = max(float((theirs[name] - grad).abs().max() / grad.abs().max()) for name, grad in own.items())
        print(f"{way:<40} worst relative error of a gradient {worst[way]:.1e}")
    write_json(RESULTS / "distributed.json", {"machine": machine(), "worst_relative_error": worst, "most": MOST})
    return 0 if max(worst.values()) <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
