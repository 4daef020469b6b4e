"""Nodes that are killed, raylet and workers: replaced, done without, grown back; from memory, or from storage."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.supervised import SNAPSHOTS, Raylets, Run, running, undisturbed

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    cluster = Raylets(4)
    yield cluster
    cluster.close()


def started(run: Run, step: int = 10) -> list[str]:
    """The ids of the nodes of a run that has come so far; slow starts are the test machine's."""
    run.wait(lambda: run.steps >= step)
    return [node["node_id"] for node in run.team["nodes"]]


def over(address: str, nodes: int, *overrides: str) -> list[str]:
    return [f"launch.address={address}", f"launch.nodes={nodes}", f"launch.workers={nodes}", SNAPSHOTS, *overrides]


def test_a_killed_node_is_replaced_by_a_free_one(tmp_path: Path, raylets: Raylets) -> None:
    with undisturbed(3, tmp_path) as expected, running(tmp_path, *over(raylets.address, 3)) as run:
        nodes, before = started(run), run.pids
        raylets.kill(nodes[1])
        run.wait(lambda: run.team["generation"] == 2)
        after = run.team
        assert run.end() == 0, run.said
        assert [rank["pid"] for rank in after["ranks"]][::2] == before[::2]
        assert [node["node_id"] for node in after["nodes"]][::2] == nodes[::2]
        [failure] = run.failures
        assert (failure.cause, failure.rank, failure.restored_from, failure.world_after) == ("node", 1, "memory", 3)
        assert failure.steps_lost is not None and failure.steps_lost <= 1
        assert run.losses == expected()


def test_without_a_replacement_fewer_go_on_and_it_grows_back(tmp_path: Path, raylets: Raylets) -> None:
    with undisturbed(4, tmp_path) as expected, running(tmp_path, *over(raylets.address, 4, "train.steps=1000")) as run:
        nodes = started(run)
        raylets.kill(nodes[0])  # rank 0, with the run's lock and its log
        run.wait(lambda: len(run.failures) == 1)
        assert (run.failures[0].cause, run.failures[0].restored_from) == ("node", "memory")
        assert (run.failures[0].world_before, run.failures[0].world_after) == (4, 3)
        come = raylets.add()
        run.wait(lambda: len(run.team["ranks"]) == 4)
        assert come in [node["node_id"] for node in run.team["nodes"]]
        generation, steps = run.team["generation"], run.steps
        run.wait(lambda: run.steps > steps + 5)
        assert (run.team["generation"], len(run.failures)) == (generation, 1)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 75, run.said
        assert "paused" not in run.said and "going on with 4 ranks on 4 nodes, after 3 ranks" in run.said
        whole, found = expected(), run.losses
        assert sorted(found) == list(range(len(found)))
        common = sorted(whole.keys() & found.keys())
        assert [found[step] for step in common] == pytest.approx([whole[step] for step in common], rel=1e-5)


def test_a_node_on_which_nothing_starts_is_done_without(tmp_path: Path) -> None:
    """Whether it takes the place of a lost one, or comes to make up for it."""
    shadow = tmp_path / "shadow" / "trainer"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").touch()
    cluster = Raylets(2)
    try:
        with running(tmp_path, *over(cluster.address, 2, "train.steps=1000")) as run:
            nodes = started(run)
            cluster.add(PYTHONPATH=str(shadow.parent))
            cluster.kill(nodes[1])
            run.wait(lambda: len(run.team["ranks"]) == 1)
            steps = run.steps
            run.wait(lambda: run.steps > steps + 5)
            cluster.add(PYTHONPATH=str(shadow.parent))
            run.wait(lambda: run.said.count("is done without") == 2)
            generation, steps = run.generation, run.steps
            run.wait(lambda: run.steps > steps + 5)
            assert run.generation == generation and run.said.count("the name 'trainer' leads") >= 2
            good = cluster.add()
            run.wait(lambda: len(run.team["ranks"]) == 2)
            assert good in [node["node_id"] for node in run.team["nodes"]]
    finally:
        cluster.close()


def test_who_waits_for_nodes_heeds_a_stop(tmp_path: Path) -> None:
    cluster = Raylets(2)
    try:
        with running(tmp_path, *over(cluster.address, 2, "train.steps=1000")) as run:
            for node in started(run):
                cluster.kill(node)
            run.wait(lambda: "waiting 120 s for others" in run.said)
            run.process.send_signal(signal.SIGTERM)
            assert run.end(20) == 75, run.said
            assert "stopped (SIGTERM) with no nodes" in run.said and len(run.failures) == 1
    finally:
        cluster.close()


def test_more_nodes_lost_than_parity_goes_back_to_storage_and_says_so(tmp_path: Path, raylets: Raylets) -> None:
    config = over(raylets.address, 4, "checkpoint.every_steps=5", "train.steps=1000")
    with running(tmp_path, *config) as run:
        nodes = started(run, 12)
        for node in nodes[:2]:
            raylets.kill(node)
        run.wait(lambda: len(run.failures) > 0)
        failure = run.failures[-1]
        assert (failure.restored_from, failure.world_after) == ("storage", 2)
        assert failure.resumed_step is not None and failure.resumed_step % 5 == 0
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 75, run.said
        assert "checkpoint.parity=1 makes up for 1" in run.said


def test_a_spent_budget_ends_the_job_with_its_reason(tmp_path: Path) -> None:
    brief = "checkpoint.snapshot_hold_s=20"  # nothing drops the snapshots of a job that has failed
    with running(tmp_path, "launch.workers=2", SNAPSHOTS, brief, "launch.max_failures=1", "train.steps=1000") as run:
        for generation in (1, 2):
            run.wait(lambda generation=generation: run.generation == generation and len(run.failures) == generation - 1)
            reached = run.steps
            run.wait(lambda reached=reached: run.steps > reached + 5)
            os.kill(random.choice(run.pids), signal.SIGKILL)
        assert run.end() == 1
        assert "not recovered from: launch.max_failures=1 is used up" in run.said
        assert [failure.world_after for failure in run.failures] == [2, None]
