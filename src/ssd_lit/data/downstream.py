"""What is checked of the data for other tasks before anything starts."""

from pathlib import Path

from ssd_lit.config import DownstreamConfig
from ssd_lit.data.blimp import read_blimp
from ssd_lit.data.glue import SPLITS, read_task


def check_downstream(settings: DownstreamConfig) -> None:
    """Read the first example of every file. Raises ConfigError for one that will not do."""
    if settings.glue is not None:
        for name in settings.glue.tasks:
            for split in SPLITS:
                read_task(Path(settings.glue.folder), name, split, limit=1)
    if settings.blimp is not None:
        read_blimp(Path(settings.blimp.file), limit=1)
