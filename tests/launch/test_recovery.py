"""A worker that is killed: the others keep their processes, a spare takes its place, every loss to the last bit."""

import os
import signal
from pathlib import Path

import pytest

from launch.nodes import process_state
from tests.launch.supervised import SNAPSHOTS, running, undisturbed

pytestmark = pytest.mark.ray


@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_worker_is_replaced_and_the_others_stay(tmp_path: Path, victim: int) -> None:
    with undisturbed(2, tmp_path) as expected, running(tmp_path, "launch.workers=2", SNAPSHOTS) as run:
        run.wait(lambda: run.steps >= 20)
        before = run.pids
        os.kill(before[victim], signal.SIGKILL)
        run.wait(lambda: run.team["generation"] == 2)
        after = run.pids
        assert run.end() == 0, run.said
        assert after[1 - victim] == before[1 - victim] and after[victim] != before[victim]
        [failure] = run.failures
        assert (failure.cause, failure.rank, failure.restored_from) == ("process", victim, "memory")
        assert failure.steps_lost is not None and failure.steps_lost <= 1
        assert (failure.world_before, failure.world_after) == (2, 2)
        assert run.losses == expected()
        assert not (run.folder / "team.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_that_is_stopped_is_killed_and_replaced(tmp_path: Path) -> None:
    with running(tmp_path, "launch.workers=2", SNAPSHOTS, "launch.collective_timeout_s=20") as run:
        run.wait(lambda: run.steps >= 20)
        before = run.pids
        os.kill(before[1], signal.SIGSTOP)
        run.wait(lambda: run.generation == 2 or len(run.failures) > 0)
        assert run.pids[0] == before[0]
        run.wait(lambda: process_state(before[1]) in ("is gone", "has ended"), 20)
        assert run.end() == 0, run.said
        assert [(failure.cause, failure.rank) for failure in run.failures] == [("hang", 1)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_users_mistake_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff" * 1000)
    with running(tmp_path, "launch.workers=2", SNAPSHOTS, "data=text", "data.paths=[bad.txt]") as run:
        assert run.end() == 2
        assert "bad.txt" in run.said and "Traceback" not in run.said
        assert len(run.failures) == 1 and run.failures[0].restored_from is None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_survivor_holds_the_memory_of_one_start_alone(tmp_path: Path) -> None:
    """Where its states are in host memory: the arena of now, and the segment of now."""
    brief = ["offload=host", "checkpoint.snapshot_hold_s=20", "train.steps=1000"]
    with running(tmp_path, "launch.workers=2", SNAPSHOTS, *brief) as run:
        for generation in (1, 2, 3):
            run.wait(lambda generation=generation: run.generation == generation and len(run.failures) == generation - 1)
            reached = run.steps
            run.wait(lambda reached=reached: run.steps > reached + 3)
            survivor, victim = run.pids
            lines = Path(f"/proc/{survivor}/maps").read_text().splitlines()
            mapped = [line.split(maxsplit=5)[5] for line in lines if "/dev/shm/atoll-" in line]
            assert len(mapped) == len(set(mapped)) == 2, mapped
            os.kill(victim, signal.SIGKILL)
        run.wait(lambda: len(run.failures) == 3)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 75, run.said
