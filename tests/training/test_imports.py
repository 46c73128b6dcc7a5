"""What training and measuring do not import."""

import subprocess
import sys

IMPORTS = """
import os, sys

def leaves_out(names, *modules):
    for module in modules:
        __import__(f"ssd_lit.{module}")
    assert not names & set(sys.modules), (modules, names & set(sys.modules))

# Lightning takes seconds, and a thread imports MLflow.
slow = {"lightning", "torchmetrics", "mlflow", "sklearn"}
leaves_out({*slow, "pandas"}, "training.moefication", "training.routers", "evaluation.evaluate")
if os.fork() == 0:
    leaves_out(slow, "evaluation.analysis")
else:
    leaves_out({"mlflow", "sklearn", "pandas"}, "pipeline.train", "training.fit")
    assert os.wait()[1] == 0
"""


def test_stages_leave_out_what_others_or_threads_import() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, timeout=120)
