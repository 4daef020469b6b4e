"""The installed command, run as a user runs it: in a folder of its own, as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

COMMAND = Path(sys.executable).with_name("atoll")
QUICK = ["train.steps=3", "train.eval_sequences=8", "train.sample_tokens=0", "logger=none"]
"""Overrides for the shortest real job."""

Atoll = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def atoll(tmp_path: Path) -> Atoll:
    """Run ``atoll`` with these arguments in an empty folder; standard output and error as text."""

    def run(*args: str, cwd: Path = tmp_path, timeout_s: float = 100, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [COMMAND, *args], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout_s
        )

    return run


@pytest.fixture
def atoll_started(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start ``atoll`` as the leader of its own process group; what it prints comes through one pipe. What a test that
    failed has left running is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> "subprocess.Popen[str]":
        run = subprocess.Popen(
            [COMMAND, *args],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(run)
        return run

    yield start
    for run in started:
        if run.poll() is None:
            family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
            for process in family:
                process.kill()
            run.wait(20)
