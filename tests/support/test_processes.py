"""Who started the processes that train together."""

import pytest

from ssd_lit.support.processes import Place, check_number, this_process

NAMES = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, None)),
        ({"LOCAL_RANK": "2"}, Place(2, 1, None)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place(0, 1, None)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, Place(5, 8, "srun")),
        (
            {"TORCHELASTIC_RUN_ID": "x", "RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "8"},
            Place(4, 8, "torchrun"),
        ),
    ],
)
def test_the_place_of_a_process(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: Place) -> None:
    """The first process of a second node has local rank 0 too, and is not the first of all."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert this_process() == place
    assert place.is_first == (place.rank == 0)


def test_another_number_of_processes_than_the_config_asks_for_is_refused() -> None:
    check_number(Place(0, 1, None), nodes=1, devices=4)
    check_number(Place(0, 8, "srun"), nodes=2, devices=4)
    with pytest.raises(ValueError, match=r"training.nodes 2: start a process for each device by torchrun or srun"):
        check_number(Place(0, 1, None), nodes=2, devices=4)
    with pytest.raises(ValueError, match=r"srun started 4 processes; training.nodes 2 times training.devices 4 are 8"):
        check_number(Place(0, 4, "srun"), nodes=2, devices=4)
