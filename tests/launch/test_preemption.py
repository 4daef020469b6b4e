"""Nodes that Ray is told to drain, as a cloud claims machines back: left in time, with nothing lost, on their own
budget."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.report import report
from tests.launch.supervised import SNAPSHOTS, Raylets, Run, running, undisturbed

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
SLOW_STEPS = ["train.global_batch_size=48", "train.seq_len=256"]
"""So that fewer than the 100 steps that fill a budget again are made between two failures."""


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    cluster = Raylets(4)
    yield cluster
    cluster.close()


def over(raylets: Raylets, *overrides: str) -> list[str]:
    return [f"launch.address={raylets.address}", "launch.nodes=3", "launch.workers=3", SNAPSHOTS, *overrides]


def goes_on(run: Run, num_failures: int) -> None:
    """Until so many failures are recovered from, and spares may stand ready."""
    run.wait(lambda: len(run.failures) == num_failures)
    reached = run.steps
    run.wait(lambda: run.steps > reached + 3)


def test_a_drained_node_is_left_with_nothing_lost(tmp_path: Path, raylets: Raylets) -> None:
    with undisturbed(3, tmp_path, *SLOW_STEPS) as expected, running(tmp_path, *over(raylets, *SLOW_STEPS)) as run:
        run.wait(lambda: run.steps >= 10)
        nodes, before = [node["node_id"] for node in run.team["nodes"]], run.pids
        raylets.drain(nodes[1])
        goes_on(run, 1)
        after = [node["node_id"] for node in run.team["nodes"]]
        assert after[::2] == nodes[::2] and nodes[1] not in after
        assert run.pids[::2] == before[::2]
        raylets.kill(nodes[1])  # the time is up: nobody is there any more
        assert run.end() == 0, run.said
        [failure] = run.failures
        assert (failure.cause, failure.restored_from, failure.steps_lost) == ("preemption", "memory", 0)
        assert (failure.world_before, failure.world_after) == (3, 3)
        assert run.losses == expected()


def test_preemptions_and_failures_are_counted_apart(tmp_path: Path, raylets: Raylets) -> None:
    budgets = ["launch.max_failures=1", "launch.max_preemptions=2", "train.steps=1000"]
    with running(tmp_path, *over(raylets, *SLOW_STEPS, *budgets)) as run:
        run.wait(lambda: run.steps >= 5)
        os.kill(run.pids[2], signal.SIGKILL)  # that is all of the first budget
        goes_on(run, 1)
        raylets.drain(run.team["nodes"][1]["node_id"])
        goes_on(run, 2)
        raylets.drain(run.team["nodes"][1]["node_id"])  # without another free one: fewer go on
        goes_on(run, 3)
        assert run.failures[-1].world_after == 2
        raylets.drain(run.team["nodes"][0]["node_id"])
        assert run.end() == 1
        assert "not recovered from: launch.max_preemptions=2 is used up" in run.said
        causes = [(failure.cause, failure.steps_lost, failure.world_after) for failure in run.failures]
        assert causes[0] in [("process", lost, 3) for lost in (0, 1)]
        assert causes[1:] == [("preemption", 0, 3), ("preemption", 0, 2), ("preemption", None, None)]
        assert all(late.step - early.step < 100 for early, late in zip(run.failures, run.failures[1:], strict=False))
    told = report([f"run.root={tmp_path}", "run.name=job"])
    assert "failures 4 (process 1, preemption 3)" in told and "given up" in told
