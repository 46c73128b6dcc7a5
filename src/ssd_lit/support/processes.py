"""The processes that train a run together: who started them, which one this is, what the first tells the others."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

POLL_SECONDS = 0.1
_WORD = "ssd_lit/word"


class Place(NamedTuple):
    """The place of this process among those that train together."""

    rank: int
    size: int
    """The number of processes; 1 where the training itself starts the others."""
    started_by: Literal["torchrun", "srun", None]

    @property
    def is_first(self) -> bool:
        """Whether this process keeps the records, tells MLflow and prints."""
        return self.rank == 0


def this_process() -> Place:
    """The place of this process, from the environment that torchrun, srun or Lightning gave it."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        return Place(int(environment["RANK"]), int(environment["WORLD_SIZE"]), "torchrun")
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        return Place(int(environment["SLURM_PROCID"]), tasks, "srun")
    # Lightning starts a process for each further device.
    return Place(int(environment.get("LOCAL_RANK", "0")), 1, None)


def check_number(place: Place, nodes: int, devices: int) -> None:
    """Raise ValueError if there are not as many processes as a run's config asks for: `devices` on each node."""
    if place.started_by is None and nodes > 1:
        raise ValueError(
            f"training.nodes {nodes}: start a process for each device by torchrun or srun, as docs/clusters.md says; "
            "without them allowed: 1"
        )
    if place.started_by is not None and place.size != nodes * devices:
        raise ValueError(
            f"{place.started_by} started {place.size} processes; training.nodes {nodes} times training.devices "
            f"{devices} are {nodes * devices}"
        )


class Others:
    """The processes beside the first, which wait for its word: whether there is something to train."""

    def __init__(self, store: Any):
        self._store = store
        self._told = store is None

    def train(self) -> None:
        """Let them join the training."""
        self._tell("train")

    def _tell(self, word: str) -> None:
        if not self._told:
            self._store.set(_WORD, word)
            self._told = True


@contextmanager
def leading(place: Place) -> Iterator[Others]:
    """Yields the others, in the first process; at the end those that still wait are let go."""
    others = Others(_store(place))
    try:
        yield others
    finally:
        others._tell("end")


def wait_for_first(place: Place) -> bool:
    """Wait for the first process's word; whether there is something to train. False too if the first has ended."""
    from torch.distributed import DistError

    try:
        store = _store(place)
        # A wait inside the store would not see signals.
        while store is not None and not store.check([_WORD]):
            time.sleep(POLL_SECONDS)
        return store is None or store.get(_WORD) == b"train"
    except DistError:
        return False


def _store(place: Place) -> Any:
    """The store that all processes see; None for a process that Lightning starts, or that is alone."""
    if place.started_by is None:
        return None
    from torch.distributed.rendezvous import rendezvous

    if place.started_by == "srun":
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        # Sets the address and the port by the job's first node and id.
        environment = SLURMEnvironment(auto_requeue=False)
        _ = environment.main_address, environment.main_port
    store, _, _ = next(rendezvous("env://", rank=place.rank, world_size=place.size))
    return store
