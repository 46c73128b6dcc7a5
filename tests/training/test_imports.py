"""What training does not import."""

import subprocess
import sys


def test_training_leaves_out_what_other_stages_or_threads_import() -> None:
    modules = "pipeline.train", "training.fit", "training.moefication", "training.routers"
    imports = ", ".join(f"ssd_lit.{module}" for module in modules)
    code = f"import sys, {imports}; assert not {{'mlflow', 'sklearn', 'pandas'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
