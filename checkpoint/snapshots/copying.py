"""Copying a rank's pieces into its area of a slot, and the CRC-32C of every MiB of it, in host memory as it is copied
and behind the copies of a GPU.

[Note: the side stream]
GPU state is copied by a stream of its own, which first waits for what the training stream had been given when the
snapshot was asked for (the update). It writes into the segment, page-locked once at the start, in the order of the
area; an event after every run lets threads checksum what has arrived while the rest is on its way. The last event is
what the next update waits for, on the GPU.

[Note: a few runs ahead]
A stream's queue is finite, and a copy that finds it full waits in the driver, with the lock that the training thread
needs for every kernel it launches: 36 GB handed over at once left gaps between kernels, 160 ms a step
(docs/recovery.md). So no more than `AHEAD` runs are on their way: the stream does not run dry while one is
checked. A training thread that comes to the update before the last run is issued waits for that itself.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint.crc import Bytes, copied_crcs, copy_arrays, idle_threads, piece_crcs
from checkpoint.index import Index
from checkpoint.snapshots.fragment import PIECE_BYTES
from checkpoint.snapshots.places import array_offsets, to_copy
from offload.state import Piece

RUN_BYTES = 256 << 20
"""Copied between two events."""
RUN_PIECES = 32
"""The most of them between two events."""
AHEAD = 8
"""Runs on their way at a time."""
NICENESS = 10
"""Of threads that make checksums: they take the cores that training leaves idle."""

Places = Sequence[tuple[Bytes, Tensor]]
"""Where to, and what."""


@dataclass(frozen=True)
class Mark:
    """All bytes of the area before `end` are there once `event` is over; at once without one."""

    end: int
    event: torch.cuda.Event | None
    crcs: Sequence[int] = ()
    """Of all pieces before `end`, where they were checked as they were copied."""


class Copier:
    """Of one rank; its stream is kept, as new ones would each grow the memory pools."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def copy(
        self,
        pieces: Sequence[Piece],
        index: Index,
        area: Bytes,
        after: torch.cuda.Event | None,
        issued: Callable[[Mark, int], None],
    ) -> Iterator[Mark]:
        """Copy what lies in host memory; a GPU's pieces follow on the side stream, once `after` is over, as the marks
        are asked for. `issued` gets the last mark once all is on its way, and how many bytes were not in the area
        already."""
        places = list(to_copy(pieces, index, area))
        end = array_offsets(index)[1]
        size_bytes = sum(len(target) for target, _ in places)
        here = [(target, source.numpy()) for target, source in places if not source.is_cuda]
        away = sorted((p for p in places if p[1].is_cuda), key=lambda place: place[0].ctypes.data)
        if not away:
            mark = Mark(end, None, copied_crcs(area[:end], here, PIECE_BYTES, _spare_threads(), NICENESS))
            issued(mark, size_bytes)
            yield mark
            return
        copy_arrays(here, _spare_threads())
        assert after is not None
        stream = self._side_stream(away[0][1].device)
        stream.wait_event(after)
        runs, marks = deque(_runs(away)), deque[Mark]()
        while runs or marks:
            while runs and (len(marks) < AHEAD or _is_over(marks[-AHEAD])):  # they end in their order
                marks.append(_issue(runs.popleft(), area, stream, None if runs else end))
                if not runs:
                    issued(marks[-1], size_bytes)
            yield marks.popleft()

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


def _is_over(mark: Mark) -> bool:
    return mark.event is None or mark.event.query()


def _runs(places: Places) -> Iterator[Places]:
    """In their order, of `RUN_BYTES` and `RUN_PIECES` at the most; a larger piece is a run of its own."""
    run: list[tuple[Bytes, Tensor]] = []
    for place in places:
        if run and (len(run) == RUN_PIECES or sum(len(target) for target, _ in [*run, place]) > RUN_BYTES):
            yield run
            run = []
        run.append(place)
    yield run


def _issue(run: Places, area: Bytes, stream: torch.cuda.Stream, end: int | None) -> Mark:
    """end: of the area's content, with the last run."""
    with torch.cuda.stream(stream):
        for target, source in run:
            torch.from_numpy(target).copy_(source, non_blocking=True)
    last = run[-1][0]
    done = torch.cuda.Event(blocking=True, enable_timing=True)  # whoever waits for it leaves the core to others
    done.record(stream)
    return Mark(last.ctypes.data + len(last) - area.ctypes.data if end is None else end, done)


def copy_here(pieces: Iterable[Piece], index: Index, area: Bytes) -> tuple[Mark, int]:
    """In the training thread, which has nothing else to do: with all of torch's threads, one piece at a time. As
    `Copier.copy` tells it."""
    copied = 0
    for target, source in to_copy(pieces, index, area):
        torch.from_numpy(target).copy_(source)
        copied += len(target)
    return Mark(array_offsets(index)[1], None), copied


def seal(area: Bytes, marks: Iterable[Mark], size_bytes: int) -> list[int]:
    """CRC-32C of every piece of the area's first `size_bytes`, where the last mark is, each once it is there; the last
    piece may be short."""
    crcs: list[int] = []
    for mark in marks:
        if mark.event is not None:
            mark.event.synchronize()
        crcs += mark.crcs
        start = len(crcs) * PIECE_BYTES
        end = mark.end if mark.end == size_bytes else mark.end // PIECE_BYTES * PIECE_BYTES
        if end > start:
            crcs += piece_crcs(area[start:end], PIECE_BYTES, _spare_threads(), NICENESS)
    return crcs


def _spare_threads() -> int:
    """Beside a GPU half of this rank's cores: what they would do is the next update, which waits for the copy. On CPUs
    training computes on them, and the copy takes what is left idle."""
    idle = idle_threads()
    return max(idle, torch.get_num_threads() // 2) if torch.cuda.is_initialized() else idle
