"""The script of ``atoll submit ssh`` run for real: real Ray nodes, real signals; only the network is stood in for.

``ssh`` here is a program that gives its last word to a shell in a session of its own, as sshd does. The "hosts" are two
names of this machine, so the cluster has two Ray nodes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

COMMAND = Path(sys.executable).with_name("atoll")
SMALL = (
    "model.dim=64 model.ffn_dim=160 model.num_layers=2 train.seq_len=256 train.global_batch_size=8 "
    "train.micro_batch_size=2 checkpoint.every_steps=3 train.eval_every_steps=1000 train.eval_sequences=8 "
    "train.sample_tokens=0 logger.tensorboard=false logger.plot=false run.name=job"
).split()

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Submit to two nodes; what is said goes to ``said.txt``."""
    fake = tmp_path / "bin" / "ssh"
    fake.parent.mkdir()
    fake.write_text('#!/bin/bash\nexec setsid --wait /bin/sh -c "${!#}"\n')
    fake.chmod(0o755)
    begun: list[subprocess.Popen[str]] = []

    def submit(*overrides: str, restarts: int = 0) -> "subprocess.Popen[str]":
        typed = [COMMAND, "submit", "ssh", "--hosts", "localhost,127.0.0.1", "--wait-s", "90"]
        with (tmp_path / "said.txt").open("w") as said:
            process = subprocess.Popen(
                [*typed, "--max-restarts", str(restarts), "--", *SMALL, *overrides],
                cwd=tmp_path,
                env={**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"},
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        begun.append(process)
        return process

    yield submit
    for process in begun:
        process.kill()
        process.wait()
    for left in ours(tmp_path):
        left.kill()


def ours(folder: Path) -> list[psutil.Process]:
    """The processes that work in `folder`, as the parts on the nodes and all that they start do."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def gone(folder: Path, patience_s: float = 20) -> bool:
    deadline = time.monotonic() + patience_s
    while ours(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not ours(folder)


def steps(folder: Path) -> list[int]:
    file = folder / "runs/job/metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_steps(folder: Path, count: int, run: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while len(steps(folder)) < count:
        assert run.poll() is None and time.monotonic() < deadline, (folder / "said.txt").read_text()
        time.sleep(0.1)


def raylets(folder: Path) -> list[psutil.Process]:
    return [process for process in ours(folder) if process.name() == "raylet"]


def test_two_nodes_train_and_nothing_stays(start: Start, tmp_path: Path) -> None:
    run = start("train.steps=4")
    assert run.wait(150) == 0, (tmp_path / "said.txt").read_text()
    said = (tmp_path / "said.txt").read_text()
    assert "node 2 x worker 1" in said and "attempt 1: 2 nodes" in said
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert gone(tmp_path)


def test_a_lost_node_costs_no_attempt_and_comes_again(start: Start, tmp_path: Path) -> None:
    """The job recovers by itself, and the script starts Ray again on the node."""
    run = start("train.steps=60", restarts=0)
    wait_for_steps(tmp_path, 5, run)
    of_two = raylets(tmp_path)
    assert len(of_two) == 2
    head = {child.pid for process in ours(tmp_path) if "--head" in process.cmdline() for child in process.children()}
    [other] = [process for process in of_two if process.pid not in head]
    other.kill()
    assert run.wait(200) == 0, (tmp_path / "said.txt").read_text()
    said = (tmp_path / "said.txt").read_text()
    assert "recovered in" in said and "ended; starting it again" in said and "attempt 2" not in said
    assert steps(tmp_path) == list(range(60))
    assert gone(tmp_path)


def test_restarts_end_at_the_bound(start: Start, tmp_path: Path) -> None:
    run = start("train.steps=100000")
    wait_for_steps(tmp_path, 2, run)
    raylets(tmp_path)[0].kill()
    assert run.wait(150) == 1, (tmp_path / "said.txt").read_text()
    assert "gave up after --max-restarts 0" in (tmp_path / "said.txt").read_text()
    assert gone(tmp_path)


def test_sigterm_leaves_a_checkpoint_and_the_script_goes_on(start: Start, tmp_path: Path) -> None:
    run = start("train.steps=60", "checkpoint.every_steps=1000")
    wait_for_steps(tmp_path, 5, run)
    os.killpg(run.pid, signal.SIGTERM)  # to all that the terminal or systemd would reach
    assert run.wait(60) == 75, (tmp_path / "said.txt").read_text()
    done = len(steps(tmp_path))
    assert 5 <= done < 60 and gone(tmp_path)
    again = start("train.steps=60", "checkpoint.every_steps=1000")
    assert again.wait(200) == 0
    assert f"resumed from step {done}" in (tmp_path / "said.txt").read_text()
    assert steps(tmp_path) == list(range(60))


def test_a_killed_script_leaves_nothing_running(start: Start, tmp_path: Path) -> None:
    run = start("train.steps=100000")
    wait_for_steps(tmp_path, 2, run)
    run.kill()
    assert gone(tmp_path), ours(tmp_path)


def test_what_is_configured_wrong_is_not_tried_again(start: Start, tmp_path: Path) -> None:
    run = start("train.steps=4", "launch.workers=64", "train.global_batch_size=64", restarts=3)
    assert run.wait(100) == 2
    said = (tmp_path / "said.txt").read_text()
    assert "launch.workers=64" in said and "not tried again" in said and "attempt 2" not in said
    assert gone(tmp_path)
