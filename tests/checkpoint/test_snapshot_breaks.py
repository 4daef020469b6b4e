"""Snapshots that break on one rank or node, while the job goes on: the others learn it at once, and why."""

import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from checkpoint.snapshots import wire
from checkpoint.snapshots.node import SnapshotNode
from checkpoint.snapshots.process import KILLED, drop, find_process, local_roster
from checkpoint.snapshots.rank import Snapshots
from checkpoint.snapshots.recovery import newest_snapshot
from checkpoint.snapshots.roster import Roster
from offload.state import Piece
from tests.checkpoint import snapshot_nodes
from tests.checkpoint.snapshot_nodes import Nodes, ThreadNodes, ended, pieces

SOON_S = 15.0
"""Of what took 50 s or more."""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(2, folder=tmp_path)
    yield nodes
    nodes.end()


def save(snapshots: Snapshots, rank: int, world: int, step: int, **state: object) -> None:
    state = {"rank": rank, "step": step, **state}
    snapshots.save(step, pieces(rank, world, step), state, {"step": step})
    snapshots.wait_copied()


def train_on(snapshots: Snapshots, rank: int, world: int, steps: range) -> str:
    """Why there are no snapshots any more; the steps take no long wait."""
    began = time.monotonic()
    for step in steps:
        if snapshots.due(step):
            save(snapshots, rank, world, step)
    snapshots.wait()
    assert time.monotonic() - began < SOON_S
    return str(snapshots.error())


def test_a_process_that_hangs_is_killed_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped, as one whose machine cannot go on with it: a start waits for its answer, and goes on without."""
    run, said = secrets.token_bytes(16), list[str]()

    def roster() -> Roster:
        return local_roster(run, 1, hold_s=60, say=said.append, log=tmp_path / "log")

    before = roster()
    assert roster() == before and not said
    hung = find_process(run, "local")
    assert hung is not None
    os.kill(hung.pid, signal.SIGSTOP)
    monkeypatch.setattr(wire, "_HANDSHAKE_S", 1.0)
    after = roster()
    try:
        assert after.nodes != before.nodes and ended(hung.pid)
        assert len(said) == 1 and said[0].endswith(f"; {KILLED}") and str(before.nodes[0].port) in said[0]
        assert roster() == after and len(said) == 1
    finally:
        drop(after)


@pytest.mark.parametrize(("count", "parity"), [(1, 0), (2, 0), (2, 1)])
def test_one_rank_of_a_node(tmp_path: Path, count: int, parity: int):
    """Its description does not fit. Rank 0 is on its node, ranks 2 and 3 of four on another."""
    nodes, world = Nodes(count, folder=tmp_path), 2 * count

    def act(snapshots: Snapshots, rank: int) -> None:
        snapshots.start(pieces(rank, world, 0), {"rank": rank}, {"step": 0})
        save(snapshots, rank, world, 1)
        snapshots.wait()
        assert snapshots.error() is None
        save(snapshots, rank, world, 2, **({"more": "x" * (2 << 20)} if rank == 1 else {}))
        assert "the description of the state has" in train_on(snapshots, rank, world, range(3, 10))

    try:
        nodes.ranks(world, act, parity=parity)
        assert "there are no snapshots any more: rank 1: the description of the state has" in nodes.said[-1], nodes.said
        found = newest_snapshot(nodes.roster([]))
        assert found is not None and found.step == 1
    finally:
        nodes.end()


@pytest.mark.parametrize("number", [0, 1], ids=["the coordinator's", "another's"])
@pytest.mark.parametrize("parity", [0, 1])
def test_the_process_of_a_node(two: Nodes, number: int, parity: int):
    def act(snapshots: Snapshots, rank: int) -> None:
        snapshots.start(pieces(rank, 4, 0), {"rank": rank}, {"step": 0})
        save(snapshots, rank, 4, 1)
        snapshots.wait()
        assert snapshots.error() is None
        snapshots._ranks.tell(b"saved")
        if rank == 0:
            two.kill(number)
        snapshots._ranks.tell(b"killed")
        assert train_on(snapshots, rank, 4, range(2, 10)) != "None"

    two.ranks(4, act, parity=parity)
    assert "no snapshots any more" in two.said[-1], two.said


def test_who_leaves_waits_for_nobody(two: Nodes):
    """Rank 3 has died, as far as the others can see; they are told by another thread."""

    def act(snapshots: Snapshots, rank: int) -> None:
        snapshots.start(pieces(rank, 4, 0), {"rank": rank}, {"step": 0})
        if rank == 3:
            snapshots._ranks.tell(b"left")
            return
        save(snapshots, rank, 4, 1)
        waiting = threading.Thread(target=save, args=(snapshots, rank, 4, 2))
        waiting.start()
        waiting.join(timeout=1)
        assert waiting.is_alive()
        snapshots.leave()
        waiting.join(timeout=1)
        assert not waiting.is_alive() and "the ranks are ending" in str(snapshots.error())
        snapshots.wait()
        snapshots._ranks.tell(b"left")

    two.ranks(4, act, parity=1)
    assert len(two.said) == 1 and two.said[0].startswith("snapshots are coded as "), two.said


def closed_soon(snapshots: Snapshots) -> bool:
    """And its thread, which may hold the engine, has ended."""
    thread, began = snapshots._thread, time.monotonic()
    snapshots.close()
    return thread is not None and not thread.is_alive() and time.monotonic() - began < 3


def test_a_state_that_cannot_be_read(two: Nodes):
    """By the training thread, of a drive: the snapshot thread does not wait for the rest, and the others hear of it."""

    def broken(rank: int) -> Iterator[Piece]:
        yield pieces(rank, 4, 2)[0]
        raise OSError("the drive is gone")

    def act(snapshots: Snapshots, rank: int) -> None:
        snapshots.start(pieces(rank, 4, 0), {"rank": rank}, {"step": 0})
        save(snapshots, rank, 4, 1)
        snapshots.wait()
        assert snapshots.error() is None
        if rank == 1:
            with pytest.raises(OSError, match="the drive is gone"):
                snapshots.save(2, broken(rank), {"rank": rank, "step": 2}, {"step": 2}, background=False)
            assert closed_soon(snapshots)
        else:
            assert train_on(snapshots, rank, 4, range(2, 10)) != "None"

    two.ranks(4, act, parity=1)
    found = newest_snapshot(two.roster([]))
    assert found is not None and found.step == 1


def test_what_ends_a_rank_while_it_page_locks(two: Nodes):
    """It may take minutes, and the rank has a thread by then."""

    def act(snapshots: Snapshots, rank: int) -> None:
        with (
            patch.object(torch.cuda, "is_available", return_value=True),
            patch.object(snapshots, "_pin", side_effect=RuntimeError("told to end")),
            pytest.raises(RuntimeError, match="told to end"),
        ):
            snapshots.start(pieces(rank, 1, 0), {"rank": rank}, {"step": 0})
        assert closed_soon(snapshots)

    two.ranks(1, act, parity=1)


class SlowMemory(SnapshotNode):
    def _segment(self, *args):
        time.sleep(3)
        return super()._segment(*args)


def test_a_process_is_not_left_alone_while_it_makes_memory(tmp_path: Path):
    with patch.object(snapshot_nodes, "SnapshotNode", SlowMemory):
        nodes = ThreadNodes(1, folder=tmp_path, hold_s=1)
        try:
            nodes.save(1, [1], parity=0)
        finally:
            nodes.end()
