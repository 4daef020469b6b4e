"""The script of ``atoll submit slurm`` under a real slurmctld and two real slurmd on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

COMMAND = Path(sys.executable).with_name("atoll")
HERE = Path(__file__).with_name("slurm_here.sh")
SMALL = (
    "model.dim=64 model.ffn_dim=160 model.num_layers=2 train.seq_len=256 train.global_batch_size=8 "
    "train.micro_batch_size=2 checkpoint.every_steps=3 train.eval_every_steps=1000 train.eval_sequences=8 "
    "train.sample_tokens=0 logger.tensorboard=false logger.plot=false run.name=job"
).split()
WITHOUT_SAVING = "checkpoint.every_steps=100000"


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """Slurm's commands lead to a cluster of two nodes."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        subprocess.run([HERE, "start", folder], check=True, timeout=60)
        yield
    finally:
        subprocess.run(["scancel", "--full", "--me"], timeout=20)
        subprocess.run([HERE, "stop", folder], timeout=60)
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
        for left in (folder, *Path(tempfile.gettempdir()).glob("atoll-[0-9]*-[0-9]*-[0-9]*")):
            shutil.rmtree(left, ignore_errors=True)  # what is killed does not remove its folder


class Job:
    """A job that was submitted from `folder`."""

    def __init__(self, folder: Path, *overrides: str, minutes: int = 10, signal_s: int = 60) -> None:
        typed = f"submit slurm --nodes 2 --time {minutes} --signal-s {signal_s} --wait-s 90 --max-restarts 1 --".split()
        done = subprocess.run([COMMAND, *typed, *SMALL, *overrides], cwd=folder, capture_output=True, text=True)
        found = re.search(r"Submitted batch job (\d+)", done.stdout)
        assert found, done.stderr
        self.id, self._run = found[1], folder / "runs/job"

    def __getitem__(self, key: str) -> str:
        shown = subprocess.run(["scontrol", "-o", "show", "job", self.id], capture_output=True, text=True, check=True)
        return dict(re.findall(r"(\w+)=(\S*)", shown.stdout))[key]

    @property
    def said(self) -> str:
        file = self._run / f"submit/slurm-{self.id}.log"
        return file.read_text() if file.exists() else ""

    def steps(self) -> list[int]:
        file = self._run / "metrics.jsonl"
        return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []

    def wait(self, *states: str, restarts: int = 0, patience_s: float = 150) -> None:
        deadline = time.monotonic() + patience_s
        while (self["JobState"], self["Restarts"]) not in [(state, str(restarts)) for state in states]:
            assert time.monotonic() < deadline, f"{self['JobState']}, restarts {self['Restarts']}\n{self.said}"
            time.sleep(0.5)

    def wait_for_steps(self, count: int, patience_s: float = 120) -> None:
        deadline = time.monotonic() + patience_s
        while len(self.steps()) < count:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)

    def start_again(self) -> None:
        """Slurm holds a job that was requeued back for two minutes, in which its life before ends; here it is begun as
        soon as that has ended: what its steps still report is else taken for the next life's."""
        deadline = time.monotonic() + 60
        while steps := [line for line in _processes() if line.startswith(f"slurmstepd: [{self.id}.")]:
            assert time.monotonic() < deadline, steps
            time.sleep(0.1)
        scontrol("update", f"JobId={self.id}", "StartTime=now")


def scontrol(*words: str) -> None:
    subprocess.run(["scontrol", *words], check=True, timeout=20)


def left_running() -> list[str]:
    """Ray and our parts, after some patience: they see their end a moment later."""
    deadline = time.monotonic() + 20
    while _running() and time.monotonic() < deadline:
        time.sleep(0.5)
    return _running()


def _processes() -> list[str]:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()


def _running() -> list[str]:
    return [line for line in _processes() if re.search(r"^\S*/(raylet|gcs_server) |-m launch\.node", line)]


def test_two_nodes_train_and_nothing_stays(slurm: None, tmp_path: Path) -> None:
    job = Job(tmp_path, "train.steps=4")
    job.wait("COMPLETED")
    assert "node 2 x worker 1" in job.said
    assert job.steps() == [0, 1, 2, 3]
    assert not left_running()


def test_the_time_limit_leads_back_into_the_queue_and_cancel_out_of_it(slurm: None, tmp_path: Path) -> None:
    job = Job(tmp_path, "train.steps=100000", WITHOUT_SAVING, minutes=3)
    job.wait_for_steps(2)
    job.wait("PENDING", restarts=1)  # Slurm's own warning, a minute before the limit of three
    done = len(job.steps())
    assert f"stopped after step {done} of 100000" in job.said
    assert not left_running()
    job.start_again()
    job.wait("RUNNING", restarts=1)
    job.wait_for_steps(done + 2)
    assert f"resumed from step {done} " in job.said
    subprocess.run(["scancel", job.id], check=True)
    job.wait("CANCELLED", restarts=1)
    assert f"stopped after step {len(job.steps())} of 100000" in job.said  # in time, and with a checkpoint
    assert not left_running()
    assert job["JobState"] == "CANCELLED"


def test_a_lost_node_leads_back_into_the_queue(slurm: None, tmp_path: Path) -> None:
    job = Job(tmp_path, "train.steps=80")
    job.wait_for_steps(5)
    scontrol("update", "NodeName=n2", "State=DOWN", "Reason=lost")
    try:
        job.wait("PENDING", restarts=1)
    finally:
        scontrol("update", "NodeName=n2", "State=RESUME")
    job.start_again()
    job.wait("COMPLETED", restarts=1)
    assert "resumed from step" in job.said
    assert job.steps() == list(range(80))
    assert not left_running()


def test_what_is_configured_wrong_is_not_tried_again(slurm: None, tmp_path: Path) -> None:
    job = Job(tmp_path, "launch.workers=64", "train.global_batch_size=64")
    job.wait("FAILED")
    assert job["ExitCode"] == "2:0"
    assert "launch.workers=64" in job.said and "attempt 2" not in job.said
