"""A tier on NVMe: one range of bytes, striped over the drives at hand, with loads ahead and stores behind.

    bytes    0      1S     2S     3S     4S         S = stripe_bytes
    drive    a      b      a      b      …          each drive: a file, `depth` threads, O_DIRECT

A request is cut at stripes; its pieces queue at their drives, so every drive always has `depth` of them under way.
Requests on ranges that overlap wait for each other if one of them is a store ([Note: order] in `offload/tier.py`).

[Note: a failed store] After a store has failed nobody knows what its range holds. From then on the tier refuses every
request with that error, those already waiting too, and `flush` and `close` raise it: training ends there and goes on
from the last checkpoint, which lies elsewhere. A failed load spoils nothing: only its own answer raises.

Versions and commits are not kept here: a version of the state spans all tiers, so its commit is `checkpoint/`'s.
The data is not flushed to the medium either: the files are scratch (see `offload/drive.py`).
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.drive import BLOCK, Drive, DriveError, SystemCalls
from offload.space import round_up
from offload.tier import check_range

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Request:
    is_store: bool
    start: int
    stop: int
    tensor: Tensor
    answer: "Future[Tensor]" = field(default_factory=Future)
    num_blockers: int = 0  # requests made before, not yet done, that this one waits for
    waiting: "list[_Request]" = field(default_factory=list)  # those that wait for this one
    num_pieces: int = 0  # not yet done
    error: BaseException | None = None

    def conflicts(self, other: "_Request") -> bool:
        return (self.is_store or other.is_store) and self.start < other.stop and other.start < self.stop


class NvmeTier:
    """`size_bytes` on the drives of `folders`; a `Tier`."""

    align = BLOCK

    def __init__(
        self,
        folders: Sequence[Path],
        size_bytes: int,
        *,
        direct: bool = True,
        depth: int = 8,
        stripe_bytes: int = 2 << 20,
        calls: SystemCalls | None = None,
    ) -> None:
        """folders: one a drive. direct: past the page cache; False only where a file system refuses (said once).
        depth: requests under way on each drive. stripe_bytes: the largest request.

        Raises ValueError for settings that cannot be, DriveError where space or direct I/O is not to be had.
        """
        if size_bytes < 1 or not folders or depth < 1 or stripe_bytes < BLOCK or stripe_bytes % BLOCK:
            raise ValueError(
                f"offload.nvme_bytes={size_bytes}, offload.nvme_path={[str(f) for f in folders]}, depth {depth}, "
                f"stripe {stripe_bytes}: at least 1 byte, one folder, depth 1, and a stripe of a multiple of {BLOCK}"
            )
        self.size_bytes = round_up(size_bytes, BLOCK)
        self.bytes_read = self.bytes_written = 0
        self._stripe = stripe_bytes
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._pending: list[_Request] = []  # not yet done, in the order in which they were made
        self._num_unanswered = 0  # pending, or done a moment ago
        self._failed: BaseException | None = None  # the first failed store
        self._closed = False
        self._drives: list[Drive] = []
        if not direct:
            log.warning("offload.nvme_direct=false: state goes through the page cache, which takes memory and time")
        share = round_up(-(-self.size_bytes // len(folders)), stripe_bytes) if len(folders) > 1 else self.size_bytes
        try:
            for folder in folders:
                drive = Drive(folder, share, direct=direct, depth=depth, calls=calls or SystemCalls())
                self._drives.append(drive)
        except BaseException:
            for drive in self._drives:
                drive.close()
            raise

    def store(self, offset: int, values: Tensor) -> "Future[Tensor]":
        return self._submit(True, offset, values)

    def load(self, offset: int, into: Tensor) -> "Future[Tensor]":
        return self._submit(False, offset, into)

    def flush(self) -> None:
        with self._lock:
            self._check_open()
            self._wait()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True  # no new requests
            self._idle.wait_for(lambda: self._num_unanswered == 0)
        for drive in self._drives:
            drive.close()
        with self._lock:
            self._wait()

    def __enter__(self) -> "NvmeTier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self) -> None:
        """With the lock held: until all is done; raise what failed."""
        self._idle.wait_for(lambda: self._num_unanswered == 0)
        self._check_whole()

    def _check_whole(self) -> None:
        if self._failed is not None:
            number = getattr(self._failed, "errno", None)
            raise DriveError(number, f"a store to this tier failed before: {self._failed}") from self._failed

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this NvmeTier is closed")

    def _submit(self, is_store: bool, offset: int, tensor: Tensor) -> "Future[Tensor]":
        check_range(self.size_bytes, self.align, offset, tensor)
        request = _Request(is_store=is_store, start=offset, stop=offset + tensor.nbytes, tensor=tensor)
        request.answer.set_running_or_notify_cancel()  # nobody can take it back
        with self._lock:
            self._check_open()
            self._check_whole()
            for other in self._pending:
                if request.conflicts(other):
                    other.waiting.append(request)
                    request.num_blockers += 1
            self._pending.append(request)
            self._num_unanswered += 1
            ready = request.num_blockers == 0
        if ready:
            self._start(request)
        return request.answer

    def _start(self, request: _Request) -> None:
        """Hand the pieces to their drives."""
        data = request.tensor.detach().view(-1).view(torch.uint8).numpy()
        pieces = list(self._pieces(request.start, request.stop))
        request.num_pieces = len(pieces)
        for drive, file_offset, start, stop in pieces:
            drive.submit(partial(self._move, request, drive, file_offset, data[start:stop].data))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Drive, int, int, int]]:
        """Drive, offset in its file, and bytes start:stop of the request, for each stripe that it touches."""
        place = start
        while place < stop:
            stripe, within = divmod(place, self._stripe)
            end = min(stop, place + self._stripe - within)
            row, column = divmod(stripe, len(self._drives))
            yield self._drives[column], row * self._stripe + within, place - start, end - start
            place = end

    def _move(self, request: _Request, drive: Drive, offset: int, memory: Any) -> None:
        """On a thread of the drive."""
        error: BaseException | None = None
        try:
            if request.error is None:  # else the rest is of no use
                (drive.write if request.is_store else drive.read)(memory, offset)
        except BaseException as raised:
            error = raised
        with self._lock:
            if error is not None:
                request.error = request.error or error
            elif request.is_store:
                self.bytes_written += len(memory)
            else:
                self.bytes_read += len(memory)
            request.num_pieces -= 1
            done = request.num_pieces == 0
        if done:
            self._finish(request)

    def _finish(self, request: _Request) -> None:
        with self._lock:
            self._pending.remove(request)
            if request.is_store and request.error is not None:
                self._failed = self._failed or request.error
            ready = []
            for other in request.waiting:
                other.num_blockers -= 1
                if other.num_blockers == 0:
                    ready.append(other)
            failed = self._failed
        for other in ready:
            if failed is not None:
                other.error = failed
                self._finish(other)
            else:
                self._start(other)
        if request.error is not None:
            request.answer.set_exception(request.error)
        else:
            request.answer.set_result(request.tensor)
        with self._lock:  # last: after `flush` every answer is there
            self._num_unanswered -= 1
            self._idle.notify_all()


@dataclass(frozen=True, kw_only=True)
class Endurance:
    """What writing at a rate means for drives."""

    bytes_per_day: float
    capacity_bytes: float | None = None
    """Of the drives together."""
    tbw: float | None = None
    """Terabytes (10^12 bytes) that they together are rated to have written to them."""

    @property
    def years(self) -> float | None:
        """Until as much is written as they are rated for: by `tbw`, else once the capacity a day over 5 years (drives
        are sold for 0.3 to 3 a day); None where neither is known."""
        if self.tbw is None and self.capacity_bytes is None:
            return None
        rated = 5 * 365 * (self.capacity_bytes or 0.0) if self.tbw is None else self.tbw * 1e12
        return rated / self.bytes_per_day / 365 if self.bytes_per_day else float("inf")

    def __str__(self) -> str:
        said = f"writes {self.bytes_per_day / 1e12:.2f} TB a day"
        if self.capacity_bytes:
            said += f", {self.bytes_per_day / self.capacity_bytes:.2f} times the capacity"
        if self.years is None:
            return f"{said}; offload.nvme_tbw=<terabytes> has it said how long the drives last"
        rated = "rated for 1 a day over 5 years" if self.tbw is None else f"rated for {self.tbw:g} TB"
        return f"{said}; drives {rated} last {_duration(self.years)}"


def endurance(
    bytes_written: float, seconds: float, *, capacity_bytes: float | None = None, tbw: float | None = None
) -> Endurance:
    """From what was written in `seconds`."""
    return Endurance(bytes_per_day=bytes_written / seconds * 86400, capacity_bytes=capacity_bytes, tbw=tbw)


def _duration(years: float) -> str:
    if years >= 100:
        return "over 100 years"
    return f"{years:.1f} years" if years >= 1 else f"{365 * years:.1f} days"
