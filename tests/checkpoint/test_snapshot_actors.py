"""Snapshot processes as actors on real raylets: found again, of another version of Atoll, and on a node that dies."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from checkpoint.snapshots import actors
from checkpoint.snapshots.actors import start_snapshot_processes
from checkpoint.snapshots.format import FORMAT, OTHER_VERSION
from checkpoint.snapshots.process import KILLED, drop
from checkpoint.snapshots.recovery import inventories
from checkpoint.snapshots.roster import Roster
from launch.places import alive, gone
from tests.checkpoint.other_version import other_version
from tests.checkpoint.snapshot_nodes import ended
from tests.launch.supervised import Raylets

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    cluster = Raylets(2)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.close()


def start(run: bytes, nodes: list[str], said: list[str], **more: Any) -> Roster | None:
    return start_snapshot_processes(run, nodes, range(len(nodes)), hold_s=60, say=said.append, **more)


def main() -> None:
    """As a job of another version: an actor on each node, found again by the next job."""
    address, run, *nodes = sys.argv[1:]
    ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}})
    assert start(bytes.fromhex(run), nodes, []) is not None


def pids(roster: Roster) -> set[int]:
    found = inventories(roster)
    assert len(found) == len(roster.nodes)
    return {held["pid"] for held in found.values()}


def test_actors_of_another_version_are_ended_and_others_take_their_names(tmp_path: Path, raylets: Raylets) -> None:
    run, nodes, said = secrets.token_bytes(16), list(raylets.ids), []
    other = other_version(tmp_path / "other", FORMAT - 1)
    command = [sys.executable, "-c", "from tests.checkpoint.test_snapshot_actors import main; main()"]
    env = {**os.environ, "PYTHONPATH": str(other)}
    subprocess.run([*command, raylets.address, run.hex(), *nodes], env=env, cwd=other, check=True)
    roster = start(run, nodes, said)
    assert roster is not None and said == [OTHER_VERSION]
    again = start(run, nodes, said)
    assert again is not None and said == [OTHER_VERSION] and pids(again) == pids(roster)
    drop(roster)


def test_one_that_does_not_answer_is_killed_and_another_takes_its_name(
    raylets: Raylets, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, nodes, said = secrets.token_bytes(16), list(raylets.ids), []
    before = start(run, nodes, said)
    assert before is not None
    held = inventories(before)
    silent, other = (held[node.label]["pid"] for node in before.nodes)
    os.kill(silent, signal.SIGSTOP)
    monkeypatch.setattr(actors, "SILENT_S", 3.0)
    roster = start(run, nodes, said)
    assert roster is not None and len(said) == 1
    assert said[0] == f"the snapshot process of node {nodes[0][:12]} has said nothing for 3 s; {KILLED}"
    assert roster.token == before.token and other in pids(roster) and silent not in pids(roster)
    since = time.monotonic()
    while not ended(silent):  # Ray asks it to end itself, and kills it some seconds later
        assert time.monotonic() - since < 20
        time.sleep(0.1)
    drop(roster)


@pytest.mark.timed
def test_a_node_that_dies_meanwhile_does_not_hold_the_start_up(raylets: Raylets) -> None:
    """Ray counts it as alive for 14 s, and waits for it."""
    nodes = list(raylets.ids)
    ours = [node for node in alive() if node.id in nodes]
    raylets.kill(nodes[1])
    began = time.monotonic()
    assert start(secrets.token_bytes(16), nodes, [], go_on=lambda: not gone(ours)) is None
    assert time.monotonic() - began < 5
