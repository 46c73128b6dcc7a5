"""A Slurm on this machine (setup.sh), what it says about jobs, and a node that dies."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SETUP = Path(__file__).with_name("setup.sh")


def wait_for(what: str, reached: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"waited in vain for {what}:\n{slurm('squeue')}"
        time.sleep(0.2)


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


class Job:
    """A job by its id."""

    def __init__(self, number: str):
        self.number = number

    def __getattr__(self, name: str) -> str:
        """What `scontrol show job` tells under a name such as JobState, Restarts or NodeList."""
        found = re.search(rf"(?:^|\s){name}=(\S*)", slurm("scontrol", "-o", "show", "job", self.number))
        assert found is not None, name
        return found[1]

    def start_now(self) -> None:
        """Slurm lets a job that was queued again wait for two minutes.

        Not within the second: nodes take its credential for the one that was revoked when it was queued again.
        """
        wait_for("the job in the queue", lambda: self.JobState == "PENDING")
        slurm("scontrol", "update", f"JobId={self.number}", "StartTime=now+3")


def jobs(rule: str) -> list[Job]:
    """All jobs of a rule that Slurm remembers, the oldest first."""
    listed = re.findall(rf"^JobId=(\d+) .* Comment=rule_{rule}(?:_|\s)", slurm("scontrol", "-o", "show", "job"), re.M)
    return [Job(number) for number in sorted(listed, key=int)]


def kill_node(name: str) -> None:
    """As if its power went: the daemon and every process of its jobs, at once."""
    daemon = psutil.Process(int(Path(f"/tmp/ssd_lit-slurm/pids/{name}").read_text()))
    dead = [daemon]
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURMD_NODENAME") == name:
                # With the step's own daemon, which would report the death of its processes.
                dead += [process, *(p for p in process.parents() if p.name() == "slurmstepd")]
        except psutil.Error:
            continue
    for process in dead:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def start_node(name: str) -> None:
    subprocess.run([SETUP, "start", name], check=True)
