"""The workflow as a module of another one, as `snakedeploy` deploys it (config/README.md)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny
from tests.workflow.running import ENVIRONMENT, ROOT

pytestmark = pytest.mark.whole_run

SNAKEFILE = """
configfile: "config/config.yaml"

module ssd_lit:
    snakefile: {snakefile!r}
    config: config

use rule * from ssd_lit

rule everything:
    default_target: True
    input: rules.all.input
"""


def test_a_module_runs_the_first_stages_and_plans_the_rest(tmp_path: Path) -> None:
    experiment = tiny("quick", tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text(f"experiment: {experiment}\n", encoding="utf-8")
    (tmp_path / "workflow").mkdir()
    snakefile = SNAKEFILE.format(snakefile=str(ROOT / "workflow/Snakefile"))
    (tmp_path / "workflow/Snakefile").write_text(snakefile, encoding="utf-8")

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    call("ssd_lit", "configs", str(experiment))
    flags = ("--cores", "2", "--rerun-triggers", "mtime")
    call("snakemake", *flags, "--until", "encode")
    assert list(tmp_path.glob("results/data/*/tokens/index.json"))
    planned = call("snakemake", *flags, "-n")
    assert "encode" not in planned.split("Job stats")[1].split("total")[0]
    assert "warmup" in planned
    assert "write_report" in planned
