"""Snapshots over several snapshot processes: any m of n may be lost, any byte may be wrong, any ranks may read."""

import itertools
import os
import pickle
import signal
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from checkpoint.crc import crc32c
from checkpoint.erasure import isal
from checkpoint.snapshots import node as snapshot_node
from checkpoint.snapshots.generation import Generation
from checkpoint.snapshots.process import drop
from checkpoint.snapshots.rank import _POLL_S
from checkpoint.snapshots.reader import SnapshotReader
from checkpoint.snapshots.recovery import newest_snapshot, retire
from checkpoint.snapshots.segment import Segment
from checkpoint.snapshots.wire import Refused, Wire, WireError
from offload.state import Movable, Piece
from tests.checkpoint.snapshot_nodes import Nodes, ThreadNodes, check_restored, pieces

SHM = Path("/dev/shm")


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(4, folder=tmp_path)
    yield nodes
    nodes.end()


@pytest.fixture(scope="module", params=[1, 2])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nodes, int]]:
    """Four nodes, four ranks, parity 1 or 2, steps 1 to 3 saved."""
    nodes = Nodes(4, folder=tmp_path_factory.mktemp("nodes"))
    nodes.save(4, [1, 2, 3], parity=request.param)
    yield nodes, request.param
    nodes.end()


def segments(nodes: Nodes) -> list[Path]:
    return sorted(path for path in SHM.glob(f"atoll-{nodes.run.hex()}-*") if path.suffix != ".door")


def flip(path: Path, offset: int, bit: int = 3) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def payload_offset(path: Path, version: int) -> tuple[int, int]:
    """Where the payload of a version lies in its file, and its size."""
    segment = Segment.open(path)
    found = next(held for held in segment.committed() if held.version == version)
    start, size = segment._slot(found.slot) + segment.meta_bytes, len(found.payload)
    segment.close()
    return start, size


def test_every_subset_of_at_most_m_nodes_lost_is_restored_bitwise(saved: tuple[Nodes, int]):
    nodes, parity = saved
    for count in range(parity + 1):
        for lost in itertools.combinations(range(4), count):
            found = newest_snapshot(nodes.roster([], lost))
            assert found is not None and found.lost == tuple(f"n{node}" for node in lost)
            reader = SnapshotReader(found, nodes.token)
            check_restored(reader, 3, readers=3)
            reader.verify()
            reader.close()


@pytest.mark.slow
def test_a_node_that_does_not_run_for_some_seconds_is_not_lost(saved: tuple[Nodes, int]):
    nodes, _ = saved
    os.kill(nodes.pids["n1"], signal.SIGSTOP)
    wake = threading.Timer(8, os.kill, (nodes.pids["n1"], signal.SIGCONT))
    wake.start()
    found = newest_snapshot(nodes.roster([]))
    wake.join()
    assert found is not None and not found.lost


def test_more_than_m_nodes_lost_is_refused_and_says_which(saved: tuple[Nodes, int]):
    nodes, parity = saved
    for lost in itertools.combinations(range(4), parity + 1):
        said: list[str] = []
        assert newest_snapshot(nodes.roster([], lost), said.append) is None
        assert (
            f"({', '.join(f'n{node}' for node in lost)}), checkpoint.parity={parity} makes up for {parity}" in said[-1]
        )


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
def test_what_4_ranks_saved_any_number_reads(saved: tuple[Nodes, int], readers: int):
    nodes, _ = saved
    found = newest_snapshot(nodes.roster([], without=[2]))
    assert found is not None
    check_restored(SnapshotReader(found, nodes.token), 3, readers)


def test_a_flipped_bit_in_any_fragment_is_found_and_repaired(four: Nodes):
    four.save(4, [1, 2], parity=1)
    for path in segments(four):
        start, size = payload_offset(path, 2)
        chunk = size // 4  # three of data and one of parity
        for fragment in range(4):
            flip(path, start + fragment * chunk + 1234)
            found = newest_snapshot(four.roster([]))
            assert found is not None and (found.version, found.num_bad) == (2, 1)
            reader = SnapshotReader(found, four.token)
            check_restored(reader, 2)
            reader.verify()
            reader.close()
            flip(path, start + fragment * chunk + 1234)


def test_bits_flipped_after_the_check_are_found_while_reading(four: Nodes):
    four.save(4, [1], parity=1)
    found = newest_snapshot(four.roster([]))
    assert found is not None and found.num_bad == 0
    reader = SnapshotReader(found, four.token)
    start, size = payload_offset(segments(four)[1], 1)
    flip(segments(four)[1], start + size // 4 + 7)  # in the second chunk, which nobody has read yet
    check_restored(reader, 1)


def test_too_much_damage_leads_to_the_version_before(four: Nodes):
    four.save(4, [1, 2], parity=1)
    for path in segments(four)[:2]:
        start, size = payload_offset(path, 2)
        for fragment in range(4):
            flip(path, start + fragment * size // 4 + 10)
    said: list[str] = []
    found = newest_snapshot(four.roster([]), said.append)
    assert found is not None and found.step == 1
    assert "the snapshot of step 2 in memory cannot be restored" in said[0] and "damaged in one place" in said[0]
    check_restored(SnapshotReader(found, four.token), 1)


def test_a_damaged_header_costs_its_fragment_alone(four: Nodes):
    four.save(4, [1], parity=1)
    path = segments(four)[2]
    segment = Segment.open(path)
    version = segment.committed()[0]
    start = segment._slot(version.slot)
    at = start + version.meta.index(b"ATOLLFRG") + 30
    segment.close()
    flip(path, at)  # the record's CRC of the meta is wrong now: the node does not hold the version any more
    found = newest_snapshot(four.roster([]))
    assert found is not None and found.lost == ("n2",)
    check_restored(SnapshotReader(found, four.token), 1)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_another_number_of_ranks_goes_on_and_its_snapshots_replace_the_old(four: Nodes, after: int):
    four.save(4, [1, 2], parity=1)

    def go_on(snapshots, rank: int) -> None:
        if rank == 0:
            assert snapshots.steps() == [2]
        reader = snapshots.open(2)
        check_restored(reader, 2, after)
        snapshots.start(pieces(rank, after, 2), {"rank": rank}, {"step": 0})
        for step in (2, 3):
            snapshots.save(step, pieces(rank, after, step), {"rank": rank, "step": step}, {"step": step})
            snapshots.wait()
            assert snapshots.error() is None

    four.ranks(after, go_on, parity=1)
    found = newest_snapshot(four.roster([], without=[0]))
    assert found is not None and found.plan.world == after
    check_restored(SnapshotReader(found, four.token), 3)
    assert len(segments(four)) == 4


def test_a_restored_snapshot_stays_until_the_first_of_the_new_start(four: Nodes):
    four.save(4, [1, 2], parity=1)

    def restore_and_die(snapshots, rank: int) -> None:
        if rank == 0:
            snapshots.steps()
        snapshots.open(2)
        snapshots.start(pieces(rank, 4, 2), {}, {})

    four.ranks(4, restore_and_die, parity=1)
    found = newest_snapshot(four.roster([], without=[3]))
    assert found is not None
    check_restored(SnapshotReader(found, four.token), 2)


def test_what_was_passed_over_does_not_come_back(four: Nodes):
    four.save(4, [1, 2], parity=1)
    four.ranks(4, lambda snapshots, rank: snapshots.start(pieces(rank, 4, 0), {}, {}), parity=1)  # from storage
    assert newest_snapshot(four.roster([])) is None


def test_no_number_is_issued_between_the_question_for_the_newest_and_the_start(four: Nodes):
    """What the start before was making may be decided meanwhile: its coordinator's word comes too late."""
    four.save(4, [1, 2], parity=1)
    assert retire(four.roster([])) == 3
    for node in four.nodes:
        with Wire.connect(node, four.token) as wire:
            wire.ask({"do": "open", "version": 4, "committed": [3], "problem": ""})
    assert retire(four.roster([])) == 3
    four.save(4, [3], parity=1)


def test_the_connection_of_a_start_before_has_no_part_in_the_next(four: Nodes):
    """It may ask, and end, when the next has begun: no rank of that has gone then."""
    four.save(4, [1], parity=1)
    with Wire.connect(four.nodes[2], four.token) as old:
        before = {"generation": 1, "rank": 2}
        old.ask({"do": "attach"} | before)

        def act(snapshots, rank: int) -> None:
            snapshots.start(pieces(rank, 4, 0), {"rank": rank}, {"step": 0})
            if rank == 2:
                with pytest.raises(Refused, match="another start of the run has taken node n2 over"):
                    old.ask({"do": "grant", "after": 1, "wait_s": 1.0} | before)
                old.close()
            snapshots.save(2, pieces(rank, 4, 2), {"rank": rank, "step": 2}, {"step": 2})
            snapshots.wait()
            assert snapshots.error() is None, snapshots.error()

        four.ranks(4, act, parity=1)


def test_a_state_that_is_copied_before_save_returns(four: Nodes):
    def act(snapshots, rank: int) -> None:
        snapshots.start(pieces(rank, 4, 0), {"rank": rank}, {"step": 0})
        shared = torch.empty(400_000)

        def one_by_one(step: int):
            for piece in pieces(rank, 4, step):
                shared[: piece.stop - piece.start] = piece.tensor  # good until the next is asked for
                yield type(piece)(**{**vars(piece), "tensor": shared[: piece.stop - piece.start]})

        state = {"rank": rank, "step": 5}
        snapshots.save(5, one_by_one(5), state, {"step": 5}, background=False)
        shared.zero_()
        snapshots.wait()
        assert snapshots.error() is None

    four.ranks(4, act, parity=2)
    found = newest_snapshot(four.roster([], without=[0, 3]))
    assert found is not None
    check_restored(SnapshotReader(found, four.token), 5)


@pytest.mark.parametrize("late", [None, 0, 1], ids=["all at once", "rank 0 late", "rank 1 late"])
def test_a_state_that_turns_out_bad_is_not_kept_and_the_one_before_is(four: Nodes, late: int | None):
    """Where the others have given it up before the late rank has written, that one hears why too."""
    said: list[list[str]] = [[] for _ in range(4)]

    def act(snapshots, rank: int) -> None:
        def judge(fault: str) -> str:
            if rank == late and fault:
                time.sleep(0.5)
            return fault

        snapshots.start(pieces(rank, 4, 0), {"rank": rank}, {"step": 0})
        for step, fault in ((1, ""), (2, "step 2 left no numbers"), (3, "step 3 left no numbers"), (4, "")):
            state = {"rank": rank, "step": step}
            snapshots.save(step, pieces(rank, 4, step), state, {"step": step}, fault=lambda fault=fault: judge(fault))
            snapshots.wait_copied()
            snapshots.wait()
            snapshots._ranks.tell(b"decided")  # every node has heard what became of it
            said[rank].append(str(snapshots.error() or ""))
            if rank == 0:
                found = newest_snapshot(four.roster([]))
                assert found is not None and found.step == (1 if step < 4 else 4)
            snapshots._ranks.tell(b"looked")

    four.ranks(4, act, parity=1)
    for rank, (first, second, third, fourth) in enumerate(said):
        assert first == fourth == "", rank
        assert "the snapshot of step 2 was given up" in second and "step 2 left no numbers" in second, rank
        assert "step 3 left no numbers" in third, rank
    found = newest_snapshot(four.roster([], without=[0]))
    assert found is not None
    check_restored(SnapshotReader(found, four.token), 4)


class MovingState:
    """A rank's share of `pieces` whose w can live elsewhere after an update, in two extents with gaps."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.home = [torch.full((p.tensor.numel() + 100,), float("nan")) for p in self._ws(0)]
        self.memory = self.home
        self.movable = Movable(extents=[(p.kind, home) for p, home in zip(self._ws(0), self.home, strict=True)])

    def _ws(self, step: int) -> list[Piece]:
        return [piece for piece in pieces(self.rank, self.world, step) if piece.name == "w"]

    def update(self, step: int) -> bool:
        """To what it is after `step`; whether it lies in a slot."""
        room = self.movable.room(True)
        self.memory = self.home if room is None else list(room)
        for piece, memory in zip(self._ws(step), self.memory, strict=True):
            memory[50:-50] = piece.tensor
        return room is not None

    def pieces(self, step: int) -> list[Piece]:
        memories = iter(self.memory)
        return [
            replace(piece, tensor=next(memories)[50:-50]) if piece.name == "w" else piece
            for piece in pieces(self.rank, self.world, step)
        ]

    @property
    def num_bytes(self) -> int:
        return sum(piece.tensor.nbytes for piece in self._ws(0))


@pytest.mark.parametrize("every", [1, 3])
def test_what_an_update_leaves_in_the_slot_is_not_copied_and_no_later_update_touches_it(four: Nodes, every: int):
    def act(snapshots, rank: int) -> None:
        state = MovingState(rank, 4)
        state.update(0)
        snapshots.start(state.pieces(0), {"rank": rank}, {"step": 0}, state.movable)
        for step in range(1, 10):
            assert state.update(step) == (step % every == 0)
            if not snapshots.due(step):
                continue
            snapshots.save(step, partial(state.pieces, step), {"rank": rank, "step": step}, {"step": step})
            snapshots.wait_copied()
            state.update(step + 1)  # while it is made; where that is due, once it is made
            snapshots.wait()
            assert snapshots.error() is None
            rest = sum(piece.tensor.nbytes for piece in state.pieces(step)) - state.num_bytes
            assert snapshots.stats.copied_bytes == rest
            snapshots._ranks.tell(b"decided")
            if rank == 0:
                found = newest_snapshot(four.roster([], without=[step % 4]))
                assert found is not None and found.step == step
                check_restored(SnapshotReader(found, four.token), step)
            snapshots._ranks.tell(b"looked")

    four.ranks(4, act, parity=2, every=str(every))


def test_a_snapshot_out_of_turn_is_copied_from_where_the_state_was_at_first(four: Nodes):
    def act(snapshots, rank: int) -> None:
        state = MovingState(rank, 4)
        state.update(0)
        snapshots.start(state.pieces(0), {"rank": rank}, {"step": 0}, state.movable)
        for step, in_slot in ((1, False), (2, True)):
            assert state.update(step) == in_slot
            snapshots.save(step, partial(state.pieces, step), {"rank": rank, "step": step}, {"step": step})
            snapshots.wait_copied()
            snapshots.wait()
            assert snapshots.error() is None
            assert (snapshots.stats.copied_bytes < state.num_bytes) == in_slot
        snapshots.close()
        assert not state.update(4)  # due, but nobody gives a place any more

    four.ranks(4, act, parity=2, every="2")
    found = newest_snapshot(four.roster([], without=[0, 3]))
    assert found is not None
    check_restored(SnapshotReader(found, four.token), 2)


def test_an_update_waits_for_the_version_before_it(four: Nodes):
    """Which is given up here: its slot is taken again."""

    def act(snapshots, rank: int) -> None:
        state, decide = MovingState(rank, 4), threading.Event()
        state.update(0)
        snapshots.start(state.pieces(0), {"rank": rank}, {"step": 0}, state.movable)
        assert state.update(1)

        def fault() -> str:
            decide.wait()
            return "step 1 left no numbers"

        snapshots.save(1, partial(state.pieces, 1), {"rank": rank, "step": 1}, {"step": 1}, fault=fault)
        snapshots.wait_copied()
        first = state.memory[0].data_ptr()
        waiting = threading.Thread(target=state.update, args=(2,))
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
        decide.set()
        waiting.join()
        assert "left no numbers" in str(snapshots.error()) and state.memory[0].data_ptr() == first
        snapshots.save(2, partial(state.pieces, 2), {"rank": rank, "step": 2}, {"step": 2})
        snapshots.wait()
        assert snapshots.error() is None and snapshots.stats.copied_bytes < state.num_bytes

    four.ranks(4, act, parity=2)
    found = newest_snapshot(four.roster([], without=[1, 2]))
    assert found is not None
    check_restored(SnapshotReader(found, four.token), 2)


def test_after_one_that_was_given_up_a_snapshot_may_take_its_time(four: Nodes):
    """Who waits for it hears again and again of the one before, which is no news."""

    def act(snapshots, rank: int) -> None:
        snapshots.start(pieces(rank, 4, 0), {"rank": rank}, {"step": 0})
        for step, fault, late_s in ((1, "", 0.0), (2, "step 2 left no numbers", 0.0), (3, "", 2.5 * _POLL_S)):

            def judge(fault: str = fault, late_s: float = late_s if rank == 3 else 0.0) -> str:
                time.sleep(late_s)
                return fault

            state = {"rank": rank, "step": step}
            snapshots.save(step, pieces(rank, 4, step), state, {"step": step}, fault=judge)
            snapshots.wait()
        assert snapshots.error() is None, snapshots.error()

    four.ranks(4, act, parity=1)
    found = newest_snapshot(four.roster([]))
    assert found is not None and found.step == 3


class SlowToAnswer(Generation):
    def report(self, version: int, label: str, step: int, problem: str) -> None:
        super().report(version, label, step, problem)
        if problem:
            time.sleep(1.0)


def test_the_next_snapshot_begins_once_the_one_that_was_given_up_is_reported(tmp_path: Path):
    """A node reports on the connection on which it then asks for chunks: not both at once."""
    with patch.object(snapshot_node, "Generation", SlowToAnswer):
        nodes = ThreadNodes(4, folder=tmp_path)

        def act(snapshots, rank: int) -> None:
            snapshots.start(pieces(rank, 4, 0), {"rank": rank}, {"step": 0})
            for step, fault in ((1, ""), (2, "step 2 left no numbers"), (3, "")):
                late_s = 0.5 if fault and rank == 0 else 0.0  # the coordinator's: it gives up what others report
                state = {"rank": rank, "step": step}

                def judge(fault: str = fault, late_s: float = late_s) -> str:
                    time.sleep(late_s)
                    return fault

                snapshots.save(step, pieces(rank, 4, step), state, {"step": step}, fault=judge)
                snapshots.wait()
            assert snapshots.error() is None, (rank, snapshots.error())

        try:
            nodes.ranks(4, act, parity=1)
        finally:
            nodes.end()


def test_with_auto_no_update_waits_for_a_version(tmp_path: Path):
    """It goes home while one is being written, although a snapshot would be due."""
    nodes, copied = Nodes(1, folder=tmp_path), threading.Event()

    def act(snapshots, rank: int) -> None:
        state = MovingState(rank, 1)
        state.update(0)
        snapshots.start(state.pieces(0), {"rank": rank}, {"step": 0}, state.movable)
        step, moved = 1, state.update(1)
        while not snapshots.due(step):
            step, moved = step + 1, state.update(step + 1)
            time.sleep(0.01)
        assert moved

        def slowly() -> list[Piece]:
            copied.wait()
            return state.pieces(step)

        snapshots.save(step, slowly, {"rank": rank, "step": step}, {"step": step})
        room = ThreadPoolExecutor(1).submit(state.movable.room, True)
        try:
            assert room.result(timeout=5) is None and not snapshots.due(step + 1)
        finally:
            copied.set()
        snapshots.wait_copied()
        snapshots.wait()
        assert snapshots.error() is None

    try:
        nodes.ranks(1, act, parity=0, every="auto")
    finally:
        nodes.end()


def test_states_in_a_slot_outlive_the_snapshot_process_and_go_home(tmp_path: Path):
    nodes = Nodes(1, folder=tmp_path)

    def act(snapshots, rank: int) -> None:
        state = MovingState(rank, 1)
        state.update(0)
        snapshots.start(state.pieces(0), {"rank": rank}, {"step": 0}, state.movable)
        assert state.update(1)
        snapshots.save(1, partial(state.pieces, 1), {"rank": rank, "step": 1}, {"step": 1})
        snapshots.wait_copied()
        snapshots.wait()
        nodes.kill(0)
        for piece, right in zip(state.pieces(1), pieces(rank, 1, 1), strict=True):
            assert torch.equal(piece.tensor, right.tensor)
        assert not state.update(2)
        snapshots.save(2, partial(state.pieces, 2), {"rank": rank, "step": 2}, {"step": 2})
        assert snapshots.error() is not None
        assert not state.update(3)

    try:
        nodes.ranks(1, act, parity=0)
    finally:
        nodes.end()


def test_states_of_several_slices_and_groups(tmp_path: Path):
    """Chunks of more than a slice, in two groups of two nodes."""
    nodes = Nodes(4, folder=tmp_path)
    try:
        numel = 3_000_001
        nodes.save(4, [1], parity=1, numel=numel, group_nodes=2)
        for lost in itertools.product((0, 1), (2, 3)):
            found = newest_snapshot(nodes.roster([], lost))
            assert found is not None and found.plan.groups == (("n0", "n1"), ("n2", "n3"))
            check_restored(SnapshotReader(found, nodes.token), 1, numel=numel)
        assert newest_snapshot(nodes.roster([], without=[2, 3])) is None
    finally:
        nodes.end()


def test_what_encodes_is_said_once_and_each_time_where_it_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nodes = ThreadNodes(3, folder=tmp_path)

    def go_on(snapshots, rank: int) -> None:
        nodes.said.clear()
        snapshots.open(1)
        snapshots.start(pieces(rank, 1, 1), {}, {})

    try:
        nodes.save(1, [1], parity=1)
        assert nodes.said == [f"snapshots are coded as RS(2+1) by {isal.load().name}"]
        nodes.ranks(1, go_on, parity=1)
        assert nodes.said == []
        monkeypatch.setattr(isal, "load", lambda: "no libisal")
        nodes.ranks(1, go_on, parity=1)
        [said] = nodes.said
        assert "RS(2+1) by numpy: no libisal; 50 to 100 times slower" in said and "on n0, n1, n2" in said
    finally:
        nodes.end()


def test_memory_of_two_versions(four: Nodes):
    """RS(3+1): two versions of S(1 + m/k) are 2.7 times the state, and some MiB."""
    four.save(4, [1], parity=1, numel=3_000_000)
    for path in segments(four):
        state = 2 * 4 * 3_000_000 * 4 / 10  # the last rank has 4 of 10 parts, and all nodes are as large as the largest
        # For the manifest, the description, and chunks of whole MiB.
        assert path.stat().st_size < 1.01 * (state + (1 + 1 + 3 << 20)) * 2 * (1 + 1 / 3)


def test_shared_memory_is_private_and_what_listens_listens_on_loopback(four: Nodes):
    four.save(4, [1], parity=1)
    files = list(SHM.glob(f"atoll-{four.run.hex()}-*"))
    assert len(files) == 8 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    for pid in four.pids.values():
        sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
        rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
        listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
        assert listening and all(address.startswith("0100007F:") for address in listening), listening


def test_a_stranger_learns_nothing(four: Nodes):
    address = four.nodes[0]
    with pytest.raises(WireError):
        Wire.connect(address, b"x" * 32)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(b"\0" * 4096)
        connection.settimeout(10)
        said = b""
        try:
            while part := connection.recv(4096):
                said += part
        except ConnectionResetError:
            pass
        assert said.startswith(b"ATOLLHI1") and len(said) == 24  # a greeting and a nonce
    assert newest_snapshot(four.roster([])) is None  # and it goes on answering those who know the token


def test_a_pickle_is_never_run_even_of_one_who_knows_the_token(four: Nodes, tmp_path: Path):
    ran = tmp_path / "ran"
    pickled = pickle.dumps(Touch(ran))
    body = struct.pack("<8sIQ", b"ATOLLNET", len(pickled), 0)
    for content in (pickled, body + struct.pack("<I", crc32c(body, pickled)) + pickled):
        with Wire.connect(four.nodes[0], four.token) as wire:
            wire._write(content)
            with suppress(OSError):  # the node may have hung up by now
                wire._socket.shutdown(socket.SHUT_WR)
            with pytest.raises(WireError, match="closed the connection|broke off"):
                wire.answer()
    assert not ran.exists()
    with Wire.connect(four.nodes[0], four.token) as wire:
        assert wire.ask({"do": "inventory"})["label"] == "n0"
    pickle.loads(pickled)
    assert ran.exists()  # it would have


class Touch:
    """Unpickled it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_left_in_shared_memory_after_a_drop(four: Nodes):
    four.save(4, [1], parity=1)
    four.kill(2)
    drop(four.roster([]))
    deadline = time.monotonic() + 10
    while list(SHM.glob(f"atoll-{four.run.hex()}-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(SHM.glob(f"atoll-{four.run.hex()}-*"))


def test_a_process_that_is_left_alone_ends(tmp_path: Path):
    nodes = Nodes(1, folder=tmp_path, hold_s=1)
    nodes.save(1, [1], parity=0)
    deadline = time.monotonic() + 15
    while list(SHM.glob(f"atoll-{nodes.run.hex()}-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(SHM.glob(f"atoll-{nodes.run.hex()}-*"))
    nodes.end()


def test_too_little_shared_memory_is_said_before_the_first_step(four: Nodes):
    def act(snapshots, rank: int) -> None:
        huge = torch.empty(1).expand(1 << 40)
        whole = [type(piece)(**{**vars(piece), "stop": piece.start + (1 << 40)}) for piece in pieces(rank, 1, 0)[:1]]
        whole = [type(piece)(**{**vars(piece), "shape": (1 << 41,), "tensor": huge}) for piece in whole]
        snapshots.start(whole, {}, {})

    why = r"snapshots need \d+ bytes of shared memory, \d+ are free; enlarge .*set checkpoint.snapshot_every_steps=0$"
    with pytest.raises(ValueError, match=why):
        four.ranks(1, act, parity=1)
