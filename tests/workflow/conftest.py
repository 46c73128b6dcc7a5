from pathlib import Path

import pytest

from tests.workflow.running import snakemake


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the shipped quick experiment; whoever changes them works on a copy."""
    results = tmp_path_factory.mktemp("quick")
    snakemake("quick", results)
    return results
