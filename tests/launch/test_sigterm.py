"""One SIGTERM at each moment of a run: it ends with code 75, nothing that was done is lost, nothing is left running."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch.driver import Killed, Stop
from launch.failures import FILE, TEAM_FILE, FailureRecord
from trainer import timeline

SMALL = (
    "launch.device=cpu model.dim=32 model.num_heads=2 model.ffn_dim=64 model.num_layers=1 train.seq_len=64 "
    "train.sample_tokens=0 logger=none run.name=it"
).split()
ENDLESS = [*SMALL, "train.steps=1000000", "train.eval_sequences=8"]
LONG_EVAL = [*SMALL, "train.steps=4", "train.eval_sequences=100000", "train.micro_batch_size=1"]

workers = pytest.mark.parametrize(
    "num", [1, pytest.param(2, marks=[pytest.mark.ray, pytest.mark.slow])], ids=["one", "two"]
)


def wait_for(run, line_start: str) -> None:
    assert any(line.startswith(line_start) for line in run.stdout), f"it ended without {line_start!r}"


def ends_resumable(run, patience_s: float = 40) -> str:
    """Send SIGTERM to the driver and wait; what was printed since."""
    run.send_signal(signal.SIGTERM)
    said = "".join(run.stdout)
    assert run.wait(patience_s) == 75, said
    deadline = time.monotonic() + 15
    while left := in_session(run.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    return said


def in_session(session: int) -> list[str]:
    found = []
    for process in psutil.process_iter(["pid", "name", "status"]):
        try:
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.info["name"])
        except ProcessLookupError:
            continue
    return found


def events(folder: Path) -> list[str]:
    """Of the run's timeline, oldest first."""
    return [line["event"] for line in timeline.read(folder / "runs" / "it")]


def wait_for_validation(run, folder: Path) -> None:
    """Until the first one is under way: it follows at once where the loop begins."""
    deadline = time.monotonic() + 60
    while "train" not in events(folder):
        assert run.poll() is None and time.monotonic() < deadline, "it has not begun to train"
        time.sleep(0.01)
    time.sleep(0.3)  # a small part of what it takes


def steps_logged(folder: Path) -> list[int]:
    file = folder / "runs" / "it" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("after_s", [0.5, pytest.param(1.5, marks=pytest.mark.slow)])
@workers
def test_at_the_start(atoll_started: Callable[..., object], num: int, after_s: float, tmp_path: Path) -> None:
    run = atoll_started("train", *ENDLESS, f"launch.workers={num}")
    time.sleep(after_s * (1 if num == 1 else 6))  # any moment will do: this is no wait for anything
    said = ends_resumable(run)
    assert not steps_logged(tmp_path) or "the same command resumes it" in said


@workers
def test_in_a_validation(atoll_started: Callable[..., object], num: int, tmp_path: Path) -> None:
    run = atoll_started("train", *LONG_EVAL, f"launch.workers={num}")
    wait_for_validation(run, tmp_path)
    ends_resumable(run)
    assert steps_logged(tmp_path) == []
    assert "eval" in events(tmp_path), "it was stopped before the validation, not in it"
    evals = tmp_path / "runs" / "it" / "evals.jsonl"
    assert not evals.exists() or not evals.read_text()


@pytest.mark.slow
@workers
def test_a_validation_that_was_cut_is_made_good(atoll_started, atoll, num: int, tmp_path: Path) -> None:
    options = [*SMALL, "train.steps=4", "train.eval_every_steps=2", f"launch.workers={num}"]
    run = atoll_started("train", *options, "train.eval_sequences=100000", "train.micro_batch_size=1")
    wait_for_validation(run, tmp_path)
    ends_resumable(run)
    done = atoll("train", *options, "train.eval_sequences=8")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "it" / "evals.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]


@pytest.mark.parametrize("every_steps", [0, 1], ids=["step", "checkpoint"])
@pytest.mark.slow
@workers
def test_in_a_step_or_a_checkpoint(atoll_started, num: int, every_steps: int, tmp_path: Path) -> None:
    command = ["train", *ENDLESS, f"launch.workers={num}", f"checkpoint.every_steps={every_steps}"]
    run = atoll_started(*command)
    assert any(int(found[1]) > 1 for line in run.stdout if (found := re.match(r"step (\d+)/", line)))
    time.sleep(0.3)
    assert "the same command resumes it" in ends_resumable(run)
    done = steps_logged(tmp_path)
    assert done == list(range(len(done))) and len(done) >= 2
    run = atoll_started(*command)
    wait_for(run, f"resumed from step {len(done)} ")
    ends_resumable(run)
    assert steps_logged(tmp_path)[: len(done)] == done


@workers
@pytest.mark.parametrize("pause_s", [0.1, pytest.param(0.5, marks=pytest.mark.slow)])
def test_that_comes_twice_at_once(atoll_started, num: int, pause_s: float) -> None:
    """As `timeout` sends it: to the process, and to its group. By the second time the run may be on its way out."""
    run = atoll_started("train", *ENDLESS, f"launch.workers={num}")
    wait_for(run, "step 1/")
    run.send_signal(signal.SIGTERM)
    time.sleep(pause_s)  # two that wait for their handler are one
    assert "the same command resumes it" in ends_resumable(run)


@pytest.mark.slow
@pytest.mark.timeout(400)
@workers
def test_while_it_compiles(atoll_started, num: int) -> None:
    run = atoll_started("train", *ENDLESS, f"launch.workers={num}", "model.compile=true", "launch.notice_s=20")
    wait_for(run, " dtype ")
    time.sleep(2)
    began = time.monotonic()
    ends_resumable(run, 60)
    assert time.monotonic() - began < 50


@pytest.mark.ray
@pytest.mark.slow
def test_while_a_rank_hangs(atoll_started, tmp_path: Path) -> None:
    """Long before ``launch.hang_timeout_s`` it is replaced, and the run ends with all that was done."""
    run = atoll_started("train", *ENDLESS, "launch.workers=2", "checkpoint.snapshot_every_steps=1")
    assert any(int(found[1]) > 9 for line in run.stdout if (found := re.match(r"step (\d+)/", line)))
    ranks = json.loads((tmp_path / "runs" / "it" / TEAM_FILE).read_text())["ranks"]
    os.kill(ranks[1]["pid"], signal.SIGSTOP)
    time.sleep(1)
    began, done = time.monotonic(), steps_logged(tmp_path)
    said = ends_resumable(run, 60)
    assert time.monotonic() - began < 60
    assert "s, as a stop was asked for)" in said and "the same command resumes it" in said
    [failure] = FailureRecord.read(tmp_path / "runs" / "it" / FILE)
    assert (failure.cause, failure.rank, failure.restored_from) == ("hang", 1, "memory")
    saved = [int(each.name.rpartition("-")[2]) for each in (tmp_path / "runs" / "it" / "checkpoints").iterdir()]
    assert max(saved) == failure.resumed_step >= len(done) - 1  # whose snapshot may not have been whole


@pytest.mark.slow
@pytest.mark.timed
def test_the_notice_ends_a_long_step(atoll_started) -> None:
    endless_step = ["train.global_batch_size=65536", "train.micro_batch_size=4", "train.eval_sequences=0"]
    run = atoll_started("train", *SMALL, "train.steps=4", *endless_step, "launch.workers=1", "launch.notice_s=3")
    wait_for(run, " dtype ")
    time.sleep(1)
    began = time.monotonic()
    assert "launch.notice_s=3 is over" in ends_resumable(run)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, "stopped"), (signal.SIGINT, "killed")])
def test_a_signal_whose_exception_was_swallowed_is_not_lost(number: signal.Signals, status: str) -> None:
    stop = Stop(notice_s=0)
    with suppress(Killed):  # as Python does while Ray's C code calls it back
        stop(number, None)
    with pytest.raises(Killed) as raised:
        stop.gently(lambda reason: None)
    assert raised.value.status == status
