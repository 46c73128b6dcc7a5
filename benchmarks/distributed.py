"""The fused kernels in two processes on two GPUs: gradients under DDP and FSDP beside those of one process.

    python benchmarks/distributed.py

A stack of sparse FFNs in float32, D 256, F 1024, E 32, K 6, 4096 tokens, checkpointed and not, compiled and not. Errors
are relative to the largest gradient of each parameter.
"""

import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import RESULTS, machine
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.routers import CenterRouter
from ssd_lit.support.files import write_json

PROCESSES, LAYERS, D, F, E, K, TOKENS = 2, 3, 256, 1024, 32, 6, 4096
MOST = 1e-4


class Stack(nn.Module):
    """Residual sparse FFNs."""

    def __init__(self, *, checkpointed: bool):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList()
        for _ in range(LAYERS):
            ffn = ExpertFFN(D, F, experts=E, top_k=K, router=CenterRouter(D, E), backend="fused")
            ffn.router.on_permuted(ffn.gating_weight)
            ffn.set_mode("sparse")
            self.layers.append(ffn)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


def gradients(net: Any, x: Tensor) -> dict[str, Tensor]:
    net(x).square().mean().backward()
    found = {}
    for name, parameter in net.named_parameters():
        grad: Any = parameter.grad
        whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.replace("module.", "").replace("_orig_mod.", "")] = whole.cpu()
    return found


def tokens() -> Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1))


def work(rank: int, port: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    mine, mesh = tokens().chunk(PROCESSES)[rank].cuda(), init_device_mesh("cuda", (PROCESSES,))
    found = {}
    for checkpointed in (False, True):
        kind = "checkpointed" if checkpointed else "plain"
        found[f"DDP, {kind}"] = gradients(DistributedDataParallel(Stack(checkpointed=checkpointed).cuda()), mine)
        sharded = Stack(checkpointed=checkpointed).cuda()
        for layer in sharded.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        found[f"FSDP, {kind}"] = gradients(sharded, mine)
    found["DDP, compiled"] = gradients(torch.compile(DistributedDataParallel(Stack(checkpointed=False).cuda())), mine)
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
    alone = gradients(Stack(checkpointed=False).cuda(), tokens().cuda())
    worst = {}
    for way, theirs in found.items():
        errors = {name: float((theirs[name] - own).abs().max() / own.abs().max()) for name, own in alone.items()}
        worst[way] = max(errors.values())
        print(f"{way:<20} worst relative error of a gradient {worst[way]:.1e}")
    write_json(RESULTS / "distributed.json", {"machine": machine(), "worst_relative_error": worst, "most": MOST})
    return 0 if max(worst.values()) <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
