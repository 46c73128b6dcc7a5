"""What a job of the workflow asks for: GPUs, and on a cluster nodes, tasks and cores as well."""

from collections.abc import Iterable
from typing import Any, Protocol

from ssd_lit.config import RunConfig
from ssd_lit.support.devices import count_gpus

Resources = dict[str, int | str]
"""Resources by Snakemake's name; those of a cluster by that of snakemake-executor-plugin-slurm."""


class Asked(Protocol):
    """Resources of a job as Snakemake hands them to a rule: no mapping, `in` looks at the values."""

    def get(self, name: str, default: Any = None, /) -> Any: ...


NAMES = ("gpu", "gres", "nodes", "tasks", "tasks_per_node", "tasks_per_gpu", "cpus_per_task", "mpi")
DATA_CORES = 4
"""Cores of a job that reads, tokenizes or encodes text on a cluster."""


def limit(gpu_share: int) -> Resources:
    """What the jobs on this machine may ask for together: `gpu_share` places on each of its GPUs.

    Nothing is limited where there is no GPU.
    """
    places = count_gpus() * gpu_share
    return {"gpu": places} if places else {}


def on_all_devices(config: RunConfig, stage: str) -> bool:
    """Whether all devices of a run do a stage together: its steps, and the MoEfication of a divided state.

    One process does any other.
    """
    divided = config.training.shard and config.method == "ssd"
    return stage in ("warmup", "sparse_phases", "dense") or (stage == "moefy" and divided)


def of_job(config: RunConfig, stages: Iterable[str], *, uses_gpu: bool, cluster: bool) -> Resources:
    """What a job that does these stages of a run asks for.

    On this machine that is a place on a GPU for each process that trains; `uses_gpu` False asks for none.
    """
    training = config.training
    devices, nodes = training.devices, training.nodes
    if not any(on_all_devices(config, stage) for stage in stages):
        devices = nodes = 1
    gpu: Resources = {"gpu": devices} if uses_gpu else {}
    if not cluster:
        return gpu
    if nodes == 1:
        # One task, in which Lightning starts a process for each further device.
        cores = max(training.threads, devices) + devices * training.workers
        return {**gpu, "nodes": 1, "cpus_per_task": cores}
    cores = max(training.threads // devices, 1) + training.workers
    # The plugin takes one or the other, and no number of tasks a node that is 1.
    tasks: Resources = {"tasks_per_node": devices} if devices > 1 else {"tasks": nodes, "tasks_per_gpu": 0}
    if uses_gpu:
        # Both: a total alone could be spread unevenly over the nodes.
        gpu = {"gpu": nodes * devices, "gres": f"gpu:{devices}"}
    return {**gpu, **tasks, "nodes": nodes, "cpus_per_task": cores, "mpi": "srun"}


def launcher(resources: Asked) -> str:
    """What stands before `ssd-lit train` in a job with these resources: in one of several nodes srun, which starts a
    process for each device; else nothing."""
    if not resources.get("mpi"):
        return ""
    # In full: the plugin takes away the variables from which srun would know.
    tasks = f"--nodes={resources.get('nodes')} --ntasks-per-node={resources.get('tasks_per_node', 1)}"
    return f"{resources.get('mpi')} {tasks} --cpus-per-task={resources.get('cpus_per_task')} "
