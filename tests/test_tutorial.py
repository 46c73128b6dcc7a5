"""docs/tutorial.md, block by block, by the wheel as a person installs it: from a text file to a report."""

import csv
import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import sentences
from tests.pages import ROOT, blocks
from tests.preloaded import Server

pytestmark = pytest.mark.whole_run

DOCUMENTS = 2500


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables of an environment that has the built wheel, and of this one all libraries but ssd_lit.

    The jobs of its Snakemake are forks of one process, which has imported that wheel.
    """
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs hatchling, which builds the wheel: pip install -e .[dev]")
    folder = tmp_path_factory.mktemp("installed")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("ssd_lit-*.whl")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env/bin/python"
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    # A path file in a folder that such a file names is not read: the sources of this clone stay out.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(install, check=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    variables = {**kept, "PATH": f"{folder}/env/bin{os.pathsep}/usr/bin{os.pathsep}/bin"}
    jobs = Server(python, variables)
    snakemake = folder / "env/bin/snakemake"
    snakemake.write_text(f'#!/bin/sh\nPATH={jobs.path}:$PATH exec {python} -m snakemake "$@"\n')
    snakemake.chmod(0o755)
    yield variables
    jobs.close()


def test_the_tutorial_leads_from_a_text_file_to_a_report(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "speeches.txt").write_text(sentences(DOCUMENTS), encoding="utf-8")
    commands = [block.code for block in blocks("docs/tutorial.md") if block.language == "sh" and block.why is None]
    assert len(commands) >= 3
    done = subprocess.run(
        ["bash", "-exc", "".join(commands)], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    plan, _, rest = done.stdout.partition("+ snakemake")
    assert "training tokens; the longest run reads it about" in plan
    assert "Training: " in plan
    assert "first: 3 runs: 3 done" in rest
    results = tmp_path / "my_text/results/first"
    assert (results / "report.html").stat().st_size > 100_000
    with (results / "summary.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"dense", "ssd", "posthoc"}
    assert float(rows["ssd"]["sparse_fraction"]) == pytest.approx(0.5, abs=0.1)
    assert float(rows["ssd"]["train_flops"]) < 0.9 * float(rows["dense"]["train_flops"])
    # The text is simple, and something was learnt of it.
    assert float(rows["dense"]["val_loss_dense"]) < 4


def test_a_wheel_brings_what_a_project_needs(environment: dict[str, str], tmp_path: Path) -> None:
    code = "from ssd_lit.support.shipped import CONFIGS, WORKFLOW; print(CONFIGS, WORKFLOW)"
    told = subprocess.run(
        ["python", "-c", code], cwd=tmp_path, env=environment, text=True, capture_output=True, check=True
    )
    for folder, own in zip(map(Path, told.stdout.split()), (ROOT / "configs", ROOT / "workflow"), strict=True):
        assert not folder.is_relative_to(ROOT)
        for path in own.rglob("*"):
            if path.is_file():
                assert (folder / path.relative_to(own)).read_bytes() == path.read_bytes()
