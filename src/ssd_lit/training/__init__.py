"""The training of a run: schedule, one fit through all phases, checkpoints, routers."""
