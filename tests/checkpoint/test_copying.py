"""A rank's state on its way into its area: every byte, in its place, before its mark, and with its checksum."""

import random

import numpy as np
import pytest
import torch

from checkpoint.crc import crc32c
from checkpoint.options import CheckpointOptions
from checkpoint.snapshots import copying
from checkpoint.snapshots.copying import Copier, Mark, seal
from checkpoint.snapshots.fragment import PIECE_BYTES
from checkpoint.snapshots.handed_over import Stats
from checkpoint.snapshots.places import array_offsets, lay_out, to_copy
from checkpoint.snapshots.rank import COST, Snapshots
from checkpoint.snapshots.roster import Roster
from checkpoint.snapshots.wire import NodeAddress
from offload.state import Piece
from tests.checkpoint.snapshot_nodes import ThreadRanks

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])


def _pieces(device: str, num: int) -> list[Piece]:
    """Of random lengths and two kinds, some longer than a run."""
    draw = random.Random(0)
    found = []
    for number in range(num):
        numel = draw.choice([1, 37, 4096, 100_003, 1_000_000])
        kind, dtype = ("master", torch.float32) if number % 3 else ("residual", torch.bfloat16)
        tensor = torch.randn(numel, device=device).to(dtype)
        found.append(Piece(name=f"w{number}", kind=kind, start=0, stop=numel, shape=(numel,), tensor=tensor))
    return found


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("ahead", [1, 3, 1000])
def test_all_of_a_state_arrives_before_its_marks(device: str, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "RUN_BYTES", 1 << 20)
    monkeypatch.setattr(copying, "RUN_PIECES", 5)
    monkeypatch.setattr(copying, "AHEAD", ahead)
    pieces = _pieces(device, 120)
    index = lay_out(pieces)
    size_bytes = array_offsets(index)[1]
    area = np.zeros(size_bytes + 4096, dtype=np.uint8)
    if device == "cuda":
        torch.cuda.cudart().cudaHostRegister(area.ctypes.data, area.nbytes, 0)
    told: list[tuple[Mark, int]] = []
    after = None
    if device == "cuda":
        torch.cuda._sleep(100_000_000)  # nothing arrives before the first mark is asked for
        after = torch.cuda.current_stream().record_event()
    seen = []

    def marks():
        for mark in Copier().copy(pieces, index, area, after, lambda mark, size: told.append((mark, size))):
            seen.append((mark.end, len(told)))
            yield mark

    try:
        crcs = seal(area, marks(), size_bytes)
        ends = [end for end, _ in seen]
        assert ends == sorted(ends) and ends[-1] == size_bytes
        assert told == [(told[0][0], sum(piece.tensor.nbytes for piece in pieces))] and told[0][0].end == size_bytes
        if device == "cuda":
            assert len(seen) > 30
            assert seen[0][1] == (ahead == 1000), "all at once only where that many may be on their way"
        for target, source in to_copy(pieces, index, area):
            assert torch.equal(torch.from_numpy(target), source.cpu())
        starts = range(0, size_bytes, PIECE_BYTES)
        assert crcs == [crc32c(area[start : min(start + PIECE_BYTES, size_bytes)]) for start in starts]
        assert not area[size_bytes:].any()
    finally:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(area.ctypes.data)


@pytest.mark.gpu
@NEEDS_GPU
def test_the_stream_waits_and_not_the_thread_and_that_is_counted() -> None:
    """`Stats.stall_s` is what the stream stood still for, however long ago the thread handed its work over."""
    stats = Stats(stall_s=[0.0, 0.0])
    training, side = torch.cuda.current_stream(), torch.cuda.Stream()

    def event(stream: torch.cuda.Stream) -> torch.cuda.Event:
        found = torch.cuda.Event(enable_timing=True)
        found.record(stream)
        return found

    def busy(stream: torch.cuda.Stream, cycles: int) -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)

    busy(side, 100_000_000)
    stats.waits(event(training), event(side))
    torch.cuda.synchronize()
    stats.count()
    assert stats.stall_s[0] == 0 and stats.stall_s[1] > 0.02
    stats.stall_s.append(0.0)
    busy(side, 10_000_000)
    copied = event(side)
    busy(training, 100_000_000)
    stats.waits(event(training), copied)
    torch.cuda.synchronize()
    stats.count()
    assert stats.stall_s[2] == 0


class Over:
    """Of a CUDA event what `Stats` asks: it is over, `ms` after the others."""

    def __init__(self, ms: float = 0.0) -> None:
        self.ms = ms

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: "Over") -> float:
        return later.ms - self.ms


def test_auto_counts_what_the_stream_waited_for_the_last_snapshot() -> None:
    """It asks before the next is saved."""
    roster = Roster(run=b"", token=b"", nodes=(NodeAddress("n0", "127.0.0.1", 1),), rank_nodes=(0,))
    snapshots = Snapshots(roster, CheckpointOptions(snapshot_every_steps="auto"), ThreadRanks(0, 1, {}))
    snapshots._step_s = 0.1
    snapshots.stats.stall_s.append(0.0)
    snapshots.stats.waits(Over(), Over(ms=50.0))  # type: ignore[arg-type]
    assert snapshots._interval() == round(0.05 / (COST * 0.1))
