import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from ssd_lit.tracking.store import follow_results
from tests.workflow.running import snakemake


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Results of the shipped quick experiment, a copy for each process of tests; whoever changes them copies again."""
    base = tmp_path_factory.getbasetemp()
    made = (base if worker_id == "master" else base.parent) / "made-quick"
    with FileLock(made.with_suffix(".lock")):
        if not made.exists():
            snakemake("quick", made.with_suffix(".part"))
            made.with_suffix(".part").rename(made)
        results = tmp_path_factory.mktemp("quick")
        shutil.copytree(made, results, symlinks=True, dirs_exist_ok=True)
    follow_results(results)
    return results
