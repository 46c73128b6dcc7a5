"""A signal that asks to stop, at a moment at which the interpreter must not be interrupted."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW = """
import pathlib, time
pathlib.Path(__file__).with_name("importing").touch()
time.sleep(0.5)
pathlib.Path(__file__).with_name("imported").touch()
"""

PROGRAM = """
import sys, time
from ssd_lit.support import signals
signals.raise_on_signal()
sys.path.insert(0, sys.argv[1])
try:
    import slow_module
    time.sleep(60)
except signals.Preempted as asked:
    print(asked, "slow_module" in sys.modules)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_that_comes_during_an_import_waits_until_it_is_done(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "slow_module.py").write_text(SLOW)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "importing").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    told, _ = process.communicate(timeout=30)
    assert told.split() == [number.name, "True"]
    assert (tmp_path / "imported").exists()
