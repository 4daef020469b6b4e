"""Copying a rank's pieces into its area of a slot, and the CRC-32C of every MiB of it behind the copy.

[Note: the side stream]
GPU state is copied by a stream of its own, which first waits for what the training stream had been given when the
snapshot was asked for (the update). It writes into the segment, page-locked once at the start, in the order of the
area; an event after every `RUN_BYTES` lets threads checksum what has arrived while the rest is on its way. The last
event is what the next update waits for, on the GPU: nobody sleeps.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from checkpoint.crc import Bytes, idle_threads, piece_crcs
from checkpoint.index import Index
from checkpoint.snapshots.fragment import PIECE_BYTES
from checkpoint.snapshots.places import array_offsets, to_copy
from offload.state import Piece

RUN_BYTES = 256 << 20
"""Copied between two events."""
PART_BYTES = 16 << 20
"""Of host memory, copied by a thread at a time."""
NICENESS = 10
"""Checksums take the cores that training leaves idle."""


@dataclass(frozen=True)
class Mark:
    """All bytes of the area before `end` are there once `event` is over; at once without one."""

    end: int
    event: torch.cuda.Event | None


class Copier:
    """Of one rank; its stream is kept, as new ones would each grow the memory pools."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def copy(
        self, pieces: Sequence[Piece], index: Index, area: Bytes, after: torch.cuda.Event | None
    ) -> tuple[list[Mark], int]:
        """Copy what lies in host memory; a GPU's pieces are on their way, on the side stream once `after` is over. Also
        returns how many bytes were not in the area already."""
        places = list(to_copy(pieces, index, area))
        end = array_offsets(index)[1]
        away = sorted((p for p in places if p[1].is_cuda), key=lambda place: place[0].ctypes.data)
        marks = self._issue(away, area, after, end) if away else [Mark(end, None)]
        _copy_in_host_memory([place for place in places if not place[1].is_cuda])
        return marks, sum(len(target) for target, _ in places)

    def _issue(
        self, places: Sequence[tuple[Bytes, Tensor]], area: Bytes, after: torch.cuda.Event | None, end: int
    ) -> list[Mark]:
        assert after is not None
        stream = self._side_stream(places[0][1].device)
        stream.wait_event(after)
        marks: list[Mark] = []
        run = 0
        with torch.cuda.stream(stream):
            for target, source in places:
                torch.from_numpy(target).copy_(source, non_blocking=True)
                run += len(target)
                if run >= RUN_BYTES:
                    marks.append(Mark(target.ctypes.data + len(target) - area.ctypes.data, _event(stream)))
                    run = 0
        return [*marks, Mark(end, _event(stream))]

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


def copy_here(pieces: Iterable[Piece], index: Index, area: Bytes) -> tuple[list[Mark], int]:
    """In the training thread, which has nothing else to do: with all of torch's threads, one piece at a time."""
    copied = 0
    for target, source in to_copy(pieces, index, area):
        torch.from_numpy(target).copy_(source)
        copied += len(target)
    return [Mark(array_offsets(index)[1], None)], copied


def seal(area: Bytes, marks: Sequence[Mark]) -> list[int]:
    """CRC-32C of every piece up to the last mark, each once it is there; the last piece may be short."""
    crcs: list[int] = []
    for mark in marks:
        if mark.event is not None:
            mark.event.synchronize()
        start = len(crcs) * PIECE_BYTES
        end = mark.end if mark is marks[-1] else mark.end // PIECE_BYTES * PIECE_BYTES
        if end > start:
            crcs += piece_crcs(area[start:end], PIECE_BYTES, _spare_threads(), NICENESS)
    return crcs


def _copy_in_host_memory(places: Sequence[tuple[Bytes, Tensor]]) -> None:
    """By numpy: it frees the GIL, and does not start torch's threads on a second set of cores."""
    parts = [
        (target[start : start + PART_BYTES], source.numpy()[start : start + PART_BYTES])
        for target, source in places
        for start in range(0, len(target), PART_BYTES)
    ]
    with ThreadPoolExecutor(_spare_threads()) as pool:
        for _ in pool.map(lambda part: np.copyto(*part), parts):
            pass


def _spare_threads() -> int:
    """Beside a GPU half of this rank's cores: what they would do is the next update, which waits for the copy. On CPUs
    training computes on them, and the copy takes what is left idle."""
    idle = idle_threads()
    return max(idle, torch.get_num_threads() // 2) if torch.cuda.is_initialized() else idle


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # whoever waits for it leaves the core to others
    event.record(stream)
    return event
