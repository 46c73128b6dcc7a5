"""What training does not import."""

import subprocess
import sys


def test_training_leaves_out_what_other_stages_or_threads_import() -> None:
    code = "import sys, ssd_lit.training.phase; assert not {'mlflow', 'sklearn', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
