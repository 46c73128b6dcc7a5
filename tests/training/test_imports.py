"""What training does not import."""

import subprocess
import sys


def test_training_leaves_out_the_metrics_that_nobody_uses_and_they_are_there_when_asked_for() -> None:
    code = (
        "import sys, ssd_lit.training.phase\n"
        "assert not {'scipy.signal', 'torchmetrics.functional', 'mlflow', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "from torchmetrics import MeanMetric, Metric\n"
        "from torchmetrics.classification import BinaryAccuracy\n"
        "mean = MeanMetric()\n"
        "mean.update(2.0)\n"
        "assert isinstance(mean, Metric) and issubclass(BinaryAccuracy, Metric) and mean.compute() == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
