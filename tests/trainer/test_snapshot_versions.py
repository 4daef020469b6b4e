"""A run meets the snapshot process of a job of another version of Atoll: it is said, and goes on from storage."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from checkpoint.snapshots.format import FORMAT, OTHER_VERSION
from checkpoint.snapshots.process import find_process
from tests.checkpoint.other_version import other_version
from tests.trainer.test_snapshots import BROKEN_AFTER, STEPS, job, train
from trainer.loop import Trainer
from trainer.run import run_id

SHM = Path("/dev/shm")


def main() -> None:
    """The job of the other version: it is killed after some steps."""
    train(job(Path(sys.argv[1]), "run", "memory"), break_after=BROKEN_AFTER)
    os.kill(os.getpid(), signal.SIGKILL)


def owner(segment: Path) -> int:
    """The process that has locked it."""
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return next(int(line[4]) for line in lines if line[1] == "FLOCK" and line[5].endswith(f":{segment.stat().st_ino}"))


@pytest.mark.parametrize(
    "number", [pytest.param(FORMAT - 1, id="older"), pytest.param(FORMAT + 1, id="newer", marks=pytest.mark.slow)]
)
def test_the_process_of_another_version_is_ended_and_the_run_goes_on_from_storage(tmp_path: Path, number: int):
    torch.set_num_threads(1)
    other = other_version(tmp_path / "other", number)
    command = [sys.executable, "-c", "from tests.trainer.test_snapshot_versions import main; main()", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(other)}
    killed = subprocess.run(command, env=env, cwd=other, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = job(tmp_path, "run", "memory")
    before = find_process(run_id(run), "local")
    assert before is not None and before.format == number
    [segment] = SHM.glob(f"atoll-{run_id(run).hex()}-local-*")
    process = psutil.Process(owner(segment))

    said: list[str] = []
    losses: dict[int, float] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "step":
            losses[event["step"]] = event["loss"]
        elif event["type"] in ("message", "resumed"):
            said.append(event["text"])

    trainer = Trainer(run, emit=emit)
    trainer.train()

    assert said[0] == OTHER_VERSION and f"resumed from step 4 of {tmp_path}/run/checkpoints" in said[1], said
    assert not [text for text in said[1:] if "snapshot process" in text or "no snapshots" in text], said
    assert sorted(losses) == list(range(4, STEPS)) and trainer.snapshots.stats.taken == 1 + STEPS - 4
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    deadline = time.monotonic() + 10
    while left := list(SHM.glob(f"atoll-{run_id(run).hex()}-*")):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
