"""Sparse FFNs on two processes: the gradients are those of one process that sees all tokens."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.routers import CenterRouter

PROCESSES = 2


def model() -> nn.Module:
    torch.manual_seed(0)
    ffns = []
    for _ in range(2):
        ffn = ExpertFFN(16, 32, experts=4, top_k=1, router=CenterRouter(16, 4), backend="loop")
        ffn.router.on_permuted(ffn.gating_weight)
        ffn.set_mode("sparse")
        ffns.append(ffn)
    return nn.Sequential(*ffns).double()


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net(x).square().mean().backward()
    found = {}
    for name, parameter in net.named_parameters():
        grad: Any = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def tokens() -> Tensor:
    # So few that a process's tokens leave experts without any.
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    mine = tokens().chunk(PROCESSES)[rank]
    found = {"DDP": gradients(DistributedDataParallel(model()), mine)}
    sharded, mesh = model(), init_device_mesh("cpu", (PROCESSES,))
    for layer in sharded:  # type: ignore[attr-defined]
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    found["FSDP"] = gradients(sharded, mine)
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=PROCESSES)
    result: dict[str, dict[str, Tensor]] = torch.load(folder / "gradients.pt")
    return result


@pytest.mark.parametrize("way", ["DDP", "FSDP"])
def test_gradients_are_those_of_one_process(found: dict[str, dict[str, Tensor]], way: str) -> None:
    torch.testing.assert_close(found[way], gradients(model(), tokens()))
