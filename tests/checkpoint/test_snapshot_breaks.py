"""Snapshots that break on one rank or node, while the job goes on: the others learn it at once, and why."""

import itertools
import json
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch

from checkpoint.crc import crc32c
from checkpoint.errors import CheckpointError
from checkpoint.snapshots import generation, process, wire
from checkpoint.snapshots.format import FORMAT
from checkpoint.snapshots.fragment import PIECE_BYTES
from checkpoint.snapshots.generation import GivenUp
from checkpoint.snapshots.node import SnapshotNode
from checkpoint.snapshots.process import KILLED, drop, find_process, local_roster, start_process
from checkpoint.snapshots.rank import Snapshots
from checkpoint.snapshots.recovery import newest_snapshot, retire
from checkpoint.snapshots.roster import Plan, Roster
from checkpoint.snapshots.segment_files import create_locked
from checkpoint.snapshots.wire import NodeAddress, Wire, WireError, Wires
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


def until(done) -> None:
    deadline = time.monotonic() + SOON_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_sender_that_falls_silent_does_not_hold_the_next_start_up(tmp_path: Path):
    """Its machine lost power within a slice of a parity, so nothing ends the connection."""
    nodes = ThreadNodes(3, folder=tmp_path)

    def act(snapshots: Snapshots, rank: int) -> None:
        snapshots.start(pieces(rank, 1, 0), {"rank": rank}, {"step": 0})
        making = nodes.generation(1)._making
        with Wire.connect(nodes.nodes[1], nodes.token) as silent:
            message = {"do": "parity", "version": making.version, "step": 1, "start": 0, "number": 1}
            body = json.dumps(message).encode()
            header = wire._HEADER.pack(wire._MAGIC, len(body), PIECE_BYTES)
            silent._write(header + wire._CRC.pack(crc32c(header, body)) + body + bytes(PIECE_BYTES // 2))
            until(lambda: nodes.generation(1)._users == 2)  # the version's own thread too: no rank is on this node
            began = time.monotonic()
            assert retire(nodes.roster([])) == making.version
            assert time.monotonic() - began < SOON_S

    try:
        nodes.ranks(1, act, parity=2)
    finally:
        nodes.end()


def test_a_node_that_does_not_greet_does_not_hold_up_who_ends():
    """Stopped, say: its kernel makes the connection, and nobody answers on it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = NodeAddress("n1", "127.0.0.1", silent.getsockname()[1])
        wires = Wires(lambda label, begun: Wire.connect(address, bytes(32), begun=begun))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(wires.to, "n1")
            until(lambda: wires._made)
            wires.end()
            assert isinstance(asked.exception(SOON_S), WireError)
        with pytest.raises(WireError, match="are over"):
            wires.to("n1")


def test_a_node_that_has_made_the_next_version_before_the_coordinator_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The coordinator tells one node after the other; of three one does not run when it is told."""
    monkeypatch.setattr(generation, "PATIENCE_S", 4.0)
    nodes, told = ThreadNodes(3, folder=tmp_path), threading.Event()

    def act(snapshots: Snapshots, rank: int) -> None:
        def take(step: int) -> None:
            save(snapshots, rank, 3, step)
            snapshots.wait()
            assert snapshots.error() is None, snapshots.error()

        snapshots.start(pieces(rank, 3, 0), {"rank": rank}, {"step": 0})
        if rank == 0:
            until(lambda: len(nodes.generation(0)._reports) == 2)
            with nodes.generation(2)._changed:
                take_one = threading.Thread(target=take, args=(1,))
                take_one.start()
                until(lambda: nodes.generation(1).version == 2 and nodes.generation(1)._making.ended)
                time.sleep(0.3)
                assert nodes.generation(0).version == 1
            take_one.join()
            told.set()
        else:
            take(1)
            if rank == 2:
                told.wait()
        take(2)

    try:
        nodes.ranks(3, act, parity=0)
    finally:
        nodes.end()


def test_all_nodes_make_their_memory_at_once_and_as_long_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nodes = ThreadNodes(2, folder=tmp_path)
    monkeypatch.setattr(wire.Wire.answer, "__kwdefaults__", {"wait_s": 0.5})
    try:
        with ExitStack() as slow:
            slow.enter_context(nodes._running["n0"][0]._lock)
            saving = threading.Thread(target=nodes.save, args=(2, [1]), kwargs={"parity": 1})
            saving.start()
            until(lambda: nodes._running["n1"][0]._generation)
            time.sleep(1)
        saving.join()
        found = newest_snapshot(nodes.roster([]))
        assert found is not None and found.step == 1
    finally:
        nodes.end()


def test_a_process_without_descriptors_keeps_what_it_holds(two: Nodes):
    """Strangers may take all that it has, for as long as a handshake may take."""
    two.save(2, [1], parity=1)
    pid = two.pids["n0"]
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (psutil.Process(pid).num_fds() + 2, limits[1]))
    with ExitStack() as strangers:
        for _ in range(4):
            strangers.enter_context(socket.create_connection((two.nodes[0].host, two.nodes[0].port)))
        time.sleep(1)
    found = newest_snapshot(two.roster([], without=[1]))
    assert found is not None and found.step == 1


def test_a_segment_may_be_removed_while_another_is_read(tmp_path: Path):
    node = SnapshotNode(secrets.token_bytes(16), "n0", secrets.token_bytes(32), "127.0.0.1")
    over, numbers, interval = threading.Event(), itertools.count(1), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def make() -> None:
        while not over.is_set():
            plan = Plan(generation=next(numbers), world=1, parity=0, groups=(("n0",),), sizes=(PIECE_BYTES,))
            segment, _ = node._segment(plan)
            time.sleep(0.0005)
            with node._lock:
                node._remove(segment)

    maker = threading.Thread(target=make)
    maker.start()
    try:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            with pytest.raises(GivenUp):
                node._read(1, 0, 1)
    finally:
        sys.setswitchinterval(interval)
        over.set()
        maker.join()
        node.close()


def test_no_memory_is_made_after_the_end(tmp_path: Path):
    run = secrets.token_bytes(16)
    node = SnapshotNode(run, "n0", secrets.token_bytes(32), "127.0.0.1", folder=str(tmp_path))
    node.close()
    plan = Plan(generation=1, world=1, parity=0, groups=(("n0",),), sizes=(4 * PIECE_BYTES,))
    message = {"do": "configure", "plan": plan.tree(), "nodes": [], "areas": [], "keep": None}
    with pytest.raises(GivenUp, match="has ended"):
        node._do("configure", message)
    assert not list(tmp_path.iterdir())


def test_a_process_that_does_not_get_up_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "START_S", 0.5)
    monkeypatch.setattr(process, "_START", "import time; time.sleep(20)")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="did not start"):
        start_process(secrets.token_bytes(16), "n0", secrets.token_bytes(32), log=tmp_path / "log")
    assert time.monotonic() - began < 10


def test_a_process_of_another_container_is_not_killed_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They may share /dev/shm, and neither numbers nor a loopback: here the number is somebody else's."""
    monkeypatch.setattr(process, "END_S", 0.2)
    run, bystander = secrets.token_bytes(16), subprocess.Popen(["sleep", "60"])
    path = process._door(run, "local", "/dev/shm")
    door = create_locked(path)
    try:
        tree = {"host": "127.0.0.1", "port": 1, "token": "00", "format": FORMAT, "pid": bystander.pid}
        os.write(door, json.dumps(tree).encode())
        with pytest.raises(CheckpointError, match="has not ended"):
            local_roster(run, 1, hold_s=60, say=lambda text: None)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        path.unlink()
        os.close(door)
