"""One writer at a time, for real processes."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ssd_lit.support import locks
from ssd_lit.support.locks import exclusive

HOLDER = """
import sys, time
from pathlib import Path
from ssd_lit.support.locks import exclusive
with exclusive(Path(sys.argv[1]), "train to evaluate"):
    (Path(sys.argv[1]) / "checkpoints" / ".warmup.ckpt.x.part").touch()
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_newcomer_says_who_holds_the_run_and_a_dead_holder_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(locks, "FIRST_MESSAGE", 0.2)
    entered = threading.Event()

    def enter() -> None:
        with exclusive(tmp_path, "train to evaluate"):
            entered.set()

    newcomer = threading.Thread(target=enter)
    newcomer.start()
    assert not entered.wait(1)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    newcomer.join(60)
    assert entered.is_set()
    told = capsys.readouterr().out
    assert f"{tmp_path}: held by train to evaluate, process {holder.pid} on " in told
    assert "since 20" in told
    # What the dead one was writing is gone, and nothing says that it holds the run.
    assert [path.name for path in tmp_path.rglob("*") if path.name != ".lock"] == ["checkpoints"]


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    gone = ["documents/.work.abc/bucket-001", "tokens/.train.bin.abc.part", ".report.html.abc.part"]
    stay = ["tokens/train.bin", "runs/dense-seed0/.evaluation.json.abc.part", ".config.yaml.abc.part", ".hidden"]
    for name in [*gone, *stay]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with exclusive(tmp_path, "prepare"):
        assert not (tmp_path / "documents/.work.abc").exists()
        assert not any((tmp_path / name).exists() for name in gone)
        assert all((tmp_path / name).exists() for name in stay)
