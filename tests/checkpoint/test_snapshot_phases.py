"""Nodes lost at every phase of a snapshot: up to m of n, restored bitwise; m + 1, refused, and it is said why.

Two ways, with the phases of `halts.PHASES`:

frozen   every node halts at the phase, and for every subset of nodes what the others hold is restored. Nodes are
         threads of this process, shared memory and sockets are real. All n of 4 to 8, m of 1 to 3, all subsets of up
         to m + 1 nodes.
killed   nodes are processes; at the phase some get SIGKILL and the others go on. Then it is restored, the dead are
         replaced, and the ranks go on from what was restored to the next phase. For every n and m, at every phase one
         subset of m nodes and one of m + 1; subsets rotate, so that each node dies, the coordinator among them. For
         n = 4 and 5 at every phase all subsets of up to m + 1.

And a bit flipped in every fragment of every node, for all these n and m; in m fragments of a stripe at one place, and
in m + 1.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from checkpoint.snapshots.generation import PATIENCE_S
from checkpoint.snapshots.reader import SnapshotReader
from checkpoint.snapshots.recovery import newest_snapshot
from tests.checkpoint.halts import BEFORE_PARITY, COORDINATED, PREPARED, Halts, halted_at, halting, phases
from tests.checkpoint.snapshot_nodes import Nodes, ThreadNodes, check_restored

CODES = [(n, m) for n in range(4, 9) for m in range(1, 4)]
QUICK = (4, 1)
QUICK_KILLS = [("chunks", (2,)), ("deciding", (0,)), ("prepared", (1, 2))]


def some(quick: tuple[int, int]) -> list[object]:
    return [pytest.param(*code, marks=() if code == quick else pytest.mark.slow) for code in CODES]


@pytest.fixture
def halts(tmp_path: Path) -> Iterator[Halts]:
    with halting(tmp_path / "halts") as made:
        yield made


def restore(nodes: Nodes, lost: Sequence[int], parity: int) -> int | None:
    """The step that is restored without `lost`, checked to be bitwise that; with more than m lost None, and why."""
    said: list[str] = []
    found = newest_snapshot(nodes.roster([], lost), said.append)
    if len(lost) > parity:
        assert found is None
        why = f"checkpoint.parity={parity} makes up for {parity}" if len(lost) < len(nodes.nodes) else "no snapshot"
        assert any(why in text for text in said), said
        return None
    assert found is not None, said
    assert {nodes.nodes[number].label for number in lost} <= set(found.lost)
    reader = SnapshotReader(found, nodes.token)
    try:
        check_restored(reader, found.step)
    finally:
        reader.close()
    return found.step


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("n", "m"), some(QUICK))
def test_any_nodes_lost_while_all_are_at_a_phase(tmp_path: Path, halts: Halts, n: int, m: int):
    nodes = ThreadNodes(n, folder=tmp_path)
    try:
        for number, phase in enumerate(phases(m)):
            step = 10 * number
            halts.arm(phase, step + 1)
            with nodes.saving(step, parity=m):
                halts.wait(halted_at(phase, [node.label for node in nodes.nodes]))
                for count in range(m + 2):
                    for lost in itertools.combinations(range(n), count):
                        found = restore(nodes, lost, m)
                        assert count > m or found == step + (phase in PREPARED), (phase, lost)
                halts.release()
    finally:
        nodes.end()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nodes_lost_while_a_new_start_takes_its_first_snapshot(tmp_path: Path, halts: Halts):
    """The first node is new and empty: what was restored stands on the others until that snapshot is there."""
    nodes = ThreadNodes(4, folder=tmp_path)
    try:
        nodes.save(4, [0], parity=2)
        for step, phase in enumerate(phases(2)):
            nodes.replace(0)
            halts.arm(phase, step)
            with nodes.saving(step, parity=2, resume=step):
                halts.wait(halted_at(phase, [node.label for node in nodes.nodes]))
                for lost in itertools.chain(*(itertools.combinations(range(4), count) for count in range(3))):
                    num_holders = len({0, 1, 2, 3} - set(lost) - (set() if phase in PREPARED else {0}))
                    found = newest_snapshot(nodes.roster([], lost))
                    assert (found is not None) == (num_holders >= 2), (phase, lost)
                    if found is not None:
                        reader = SnapshotReader(found, nodes.token)
                        check_restored(reader, step)
                        reader.close()
                halts.release()
    finally:
        nodes.end()


def kills(n: int, m: int) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = []
    for number, phase in enumerate(phases(m)):
        # Neighbours, or every second node where that gives so many; where the coordinator acts it dies.
        first, apart = (0 if phase in COORDINATED else number), 1 + number % 2
        for count in (m, m + 1):
            if count < n:
                lost = {(first + place * apart) % n for place in range(count)}
                lost = lost if len(lost) == count else {(first + place) % n for place in range(count)}
                found.append((phase, tuple(sorted(lost))))
    return found


def test_nodes_killed_at_a_phase(tmp_path: Path, halts: Halts):
    kill_all(tmp_path, halts, *QUICK, QUICK_KILLS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("n", "m"), CODES)
def test_nodes_killed_at_every_phase(tmp_path: Path, halts: Halts, n: int, m: int):
    kill_all(tmp_path, halts, n, m, kills(n, m))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("n", "m"), [code for code in CODES if code[0] <= 5])
def test_any_nodes_killed_at_every_phase(tmp_path: Path, halts: Halts, n: int, m: int):
    every = [lost for count in range(1, min(m + 2, n)) for lost in itertools.combinations(range(n), count)]
    kill_all(tmp_path, halts, n, m, list(itertools.product(phases(m), every)))


def kill_all(folder: Path, halts: Halts, n: int, m: int, kills: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    nodes, resume = Nodes(n, folder=folder), None
    try:
        for number, (phase, lost) in enumerate(kills):
            step = 10 * number
            halts.arm(phase, step + 1)
            with nodes.saving(step, parity=m, resume=resume):
                halts.wait(halted_at(phase, [node.label for node in nodes.nodes]))
                for victim in lost:
                    nodes.kill(victim)
                halts.release()
                resume = restore(nodes, lost, m)
                if len(lost) <= m and phase in BEFORE_PARITY:
                    assert resume == step, (phase, lost)
                elif len(lost) <= m:
                    assert resume in (step + (phase in PREPARED), step + 1), (phase, lost)
            for victim in lost:
                nodes.replace(victim)
    finally:
        nodes.end()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("n", "m"), some((4, 2)))
def test_a_flipped_bit_in_any_fragment_is_found_and_repaired(tmp_path: Path, n: int, m: int):
    nodes = ThreadNodes(n, folder=tmp_path)
    try:
        nodes.save(n, [1, 2], parity=m)
        payloads = [nodes.generation(place).segment.committed()[0].payload for place in range(n)]
        layout = nodes.generation(0).layout

        def flipped(elements: Sequence[tuple[int, int]]) -> tuple[int, int]:
            """Step and number of bad pieces, with a bit flipped in these (node, fragment)."""
            for place, fragment in elements:
                payloads[place][fragment * layout.chunk_bytes + 77] ^= 16
            found = newest_snapshot(nodes.roster([]))
            assert found is not None
            reader = SnapshotReader(found, nodes.token)
            check_restored(reader, found.step)
            reader.close()
            for place, fragment in elements:
                payloads[place][fragment * layout.chunk_bytes + 77] ^= 16
            return found.step, found.num_bad

        for one in itertools.product(range(n), range(n)):
            assert flipped([one]) == (2, 1)
        for number in range(n):
            held = [(place, [s for s, _ in layout.held(place)].index(number)) for place in range(n)]
            same = [held[(number + turn) % n] for turn in range(m + 1)]
            assert flipped(same[:m]) == (2, m)
            assert flipped(same) == (1, 0)
    finally:
        nodes.end()


@pytest.mark.parametrize("parity", [1, 2])
@pytest.mark.parametrize(
    ("phase", "why"),
    [("written", "the description of its state has a wrong CRC-32C"), ("sealed", "came with a wrong CRC-32C")],
    ids=["of the description", "of the state"],
)
def test_a_bit_that_flips_after_the_rank_has_sealed_it_costs_the_version(
    tmp_path: Path, halts: Halts, phase: str, why: str, parity: int
):
    """Its checksum is the rank's: whoever encodes the chunk finds it before the version counts. Nobody waits then for
    what cannot come any more: training stands still meanwhile."""
    nodes = ThreadNodes(4, folder=tmp_path)
    try:
        halts.arm(phase, 1)
        with nodes.saving(0, parity=parity):
            halts.wait({node.label for node in nodes.nodes})
            draft, layout = nodes.generation(2)._making.draft, nodes.generation(2).layout
            assert draft is not None
            state = draft.payload[: layout.data_bytes]
            # The chunk that node 3 encodes; the coordinator keeps a parity of it.
            encoded = [stripe for stripe, _ in layout.held(2)].index(3) * layout.chunk_bytes
            state[state.tobytes().rfind(b"exp_avg") if phase == "written" else encoded + 77] ^= 4
            halts.release()
            deadline = time.monotonic() + PATIENCE_S / 2
            while not any(f"{why}; training goes on" in text for text in nodes.said):
                assert time.monotonic() < deadline, nodes.said
                time.sleep(0.01)
            assert restore(nodes, (), parity) == 0
    finally:
        nodes.end()
