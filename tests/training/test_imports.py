"""What training and measuring do not import."""

import subprocess
import sys


def test_training_leaves_out_what_other_stages_or_threads_import() -> None:
    modules = "pipeline.train", "training.fit", "training.moefication", "training.routers"
    imports = ", ".join(f"ssd_lit.{module}" for module in modules)
    code = f"import sys, {imports}; assert not {{'mlflow', 'sklearn', 'pandas'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_moefying_routing_and_measuring_do_without_lightning() -> None:
    modules = "training.moefication", "training.routers", "evaluation.evaluate", "evaluation.analysis"
    imports = ", ".join(f"ssd_lit.{module}" for module in modules)
    code = f"import sys, {imports}; assert not {{'lightning', 'torchmetrics', 'mlflow', 'sklearn'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
