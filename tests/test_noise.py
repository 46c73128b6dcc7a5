"""The console holds our own lines and no others: no library's leaks, hints, warnings or bars."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import Bench

pytestmark = pytest.mark.whole_run

LOADED = "import triton._C.libtriton; " if find_spec("triton") else ""
"""As a GPU's stages load it: its bindings name what they leak where an interpreter ends in order."""
STAGE = LOADED + "import sys; from ssd_lit.cli import run; sys.argv[0] = 'ssd-lit'; run()"
OURS = re.compile(r"\[\d\d:\d\d:\d\d\] ssd-lit |ssd-seed0\b")


def test_a_stage_writes_nothing_but_our_lines_to_stderr(tmp_path: Path) -> None:
    bench = Bench(tmp_path, arms={"ssd": {"method": "ssd"}})
    run = bench.dir("ssd")
    srun = tmp_path / "bin/srun"  # of a cluster: Lightning has a hint for who does not call it
    srun.parent.mkdir()
    srun.write_text("#!/bin/sh\nexit 1\n")
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{srun.parent}:{os.environ['PATH']}"}
    stages = [["train", run, "--until", "sparse_phases"], ["evaluate", run], ["summarise", run.parent.parent]]
    for stage in stages:
        command = [sys.executable, "-c", STAGE, *map(str, stage), "--threads", "1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) >= 2
        assert [line for line in lines if not OURS.match(line)] == [], stage
