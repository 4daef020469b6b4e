"""Snapshots in the nodes' memory, from a rank's side. Surface of `checkpoint.Checkpoints`, and two methods more.

    save(step, …)      hands the state over and returns; a thread copies it into the node's segment
    wait_copied()      before the state changes: returns once it is copied (of a GPU's state: once the rest is on its
                       way, and the stream waits for that)

The rest of a snapshot is the snapshot processes' work. One is made at a time: where the one before is not committed
yet, `save` waits for it.

[Note: the version that the update writes]
State in host memory that an update may leave elsewhere (`offload.state.Movable`) needs no copy. The update before a
snapshot begins the version and writes the state into its slot; `save` hands the slot over, and the next update writes
the state into the next version's slot, where that is due at once, else to where it was at first. Such an update waits
for the version before, as `save` would. With ``auto`` nobody waits: that snapshot is put off until its slot is there.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import values
from checkpoint.crc import Bytes, crc32c
from checkpoint.errors import CheckpointError
from checkpoint.index import Index
from checkpoint.options import CheckpointOptions
from checkpoint.ranks import Ranks
from checkpoint.snapshots import recovery
from checkpoint.snapshots.area import Blob, Written
from checkpoint.snapshots.configure import configure
from checkpoint.snapshots.copying import Copier, copy_here, seal
from checkpoint.snapshots.fragment import PIECE_BYTES
from checkpoint.snapshots.handed_over import HandedOver, Stats
from checkpoint.snapshots.places import array_offsets, berths, lay_out
from checkpoint.snapshots.process import drop
from checkpoint.snapshots.reader import SnapshotReader
from checkpoint.snapshots.roster import Roster, check_nodes
from checkpoint.snapshots.segment import Segment
from checkpoint.snapshots.segment_files import NoRoom
from checkpoint.snapshots.wire import Refused, Wire
from offload.state import Destination, Movable, Piece, nowhere

_log = logging.getLogger(__name__)

GRANT_S = 120.0
"""Longest wait for the snapshot before; then this rank goes on without snapshots, and says so."""
COST = 0.01
"""Of the time of training, for ``checkpoint.snapshot_every_steps=auto``."""
_SLACK_BYTES = 64 << 10
"""Room for a description to grow: the random generators' state and the data position."""
_POLL_S = 1.0


class Ended(CheckpointError):
    """Another rank, or the coordinator, takes part in no snapshots any more, so there are none."""


class Snapshots:
    """Of one rank. `ranks` is used by `steps`, `open` and `start` alone, at the same time on every rank.

    `report` gets, on rank 0 and from any thread, each sentence that the user should see. ValueError where
    ``checkpoint.parity`` and ``group_nodes`` do not fit the nodes.
    """

    def __init__(
        self,
        roster: Roster,
        options: CheckpointOptions,
        ranks: Ranks,
        report: Callable[[str], None] = _log.warning,
    ) -> None:
        self._roster, self._options, self._ranks = roster, options, ranks
        self._parity, self._group_sizes = check_nodes(options, len(roster.nodes))
        self._report = report if ranks.rank == 0 else lambda text: None
        self._changed = threading.Condition()
        self._granted = 0
        self._job: HandedOver | None = None
        self._copying: HandedOver | None = None
        self._broken: CheckpointError | None = None
        self._error: CheckpointError | None = None
        self._written: tuple[int, int] = (0, 0)  # version and step of the last one that is not decided
        self._closed = False
        self._leaving = False
        """Nobody is to wait for a version: those who would make it are gone, and this rank goes too."""
        self._asking: Wire | None = None
        """The connection while the thread waits there for a grant."""
        self._thread: threading.Thread | None = None
        self._found: recovery.Found | None = None
        self._restored: int | None = None
        self._reader: SnapshotReader | None = None
        self._copier = Copier()
        self._pinned: list[Bytes] = []
        """Slots whose area is page-locked."""
        self._index: Index | None = None
        self._movable = Movable(extents=())
        self._berths: list[list[torch.Tensor]] = []
        """By slot, the place of each extent."""
        self._wanted = False
        """Whether the training thread waits for the slot of the next version."""
        self._open_slot: int | None = None
        """That slot, until `save` hands it over."""
        self._done_steps = 0
        self._next, self._last_due, self._step_s = 1, 0.0, 0.0
        self.stats = Stats()

    # ------------------------------------------------------------------------------------------------ restoring

    def steps(self) -> list[int]:
        """On rank 0: the step of the newest snapshot that can be restored, every byte of it checked; empty: none."""
        self._found = recovery.newest_snapshot(self._roster, self._report)
        return [self._found.step] if self._found else []

    def open(self, step: int) -> SnapshotReader:
        """The snapshot that `steps` found; every rank calls it. CheckpointError where it has gone meanwhile."""
        if self._ranks.rank == 0 and (self._found is None or self._found.step != step):
            self.steps()
        found = recovery.Found.loads(self._ranks.tell(self._found.dumps() if self._found else b"null"))
        if found.step != step:
            raise CheckpointError(f"there is no snapshot of step {step} in memory, but of step {found.step}")
        self._found, self._restored = found, found.version
        self._reader = SnapshotReader(found, self._roster.token)
        return self._reader

    def __str__(self) -> str:
        return str(self._found)

    # ------------------------------------------------------------------------------------------------ saving

    def start(
        self,
        pieces: Iterable[Piece],
        rank_state: Mapping[str, Any],
        meta: Mapping[str, Any],
        movable: Movable | None = None,
    ) -> None:
        """Reserve the memory and begin; every rank calls it with what it will save, once it has loaded.

        movable: what of it an update may leave in the segment; its `room` is set here, and taken back by `close`.
        What `open` did not choose is thrown away. On every rank CheckpointError where a node is not there, ValueError
        where it has too little shared memory.
        """
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        extents = movable.extents if movable else ()
        index = self._index = lay_out(pieces, extents)
        blob = Blob(
            index=index.dumps(), rank_state=values.dumps(dict(rank_state)), meta=values.dumps(dict(meta)), crcs=()
        )
        data_bytes = array_offsets(index)[1]
        size = data_bytes + len(blob.dumps()) + 4 * (1 + data_bytes // PIECE_BYTES) + _SLACK_BYTES
        sizes = [int(size) for size in self._ranks.gather(str(size).encode())]
        answer: dict[str, Any] = {}
        if self._ranks.rank == 0:
            try:
                answer = configure(
                    self._roster, sizes, self._parity, self._group_sizes, keep=self._restored, report=self._report
                )
            except (CheckpointError, ValueError) as error:
                answer = {"problem": str(error), "no_room": isinstance(error, NoRoom)}
        answer = json.loads(self._ranks.tell(json.dumps(answer).encode()))
        if "problem" in answer:
            raise ValueError(answer["problem"]) if answer["no_room"] else CheckpointError(answer["problem"])
        node = self._roster.rank_nodes[self._ranks.rank]
        self._start, self._size = answer["areas"][str(self._ranks.rank)]
        self._segment = Segment.open(answer["paths"][node])
        self._generation = int(answer["generation"])
        self._last = self._generation - 1
        self._slots = [self._segment.slot_memory(slot) for slot in range(self._segment.num_slots)]
        # attached first, or the process takes itself for left alone: page-locking may take minutes
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()
        for slot in self._slots if torch.cuda.is_available() else []:
            if self._pin(slot):
                self._pinned.append(slot)
        if movable and extents:
            self._berths = [berths(extents, index, self._area(slot)) for slot in range(len(self._slots))]
            self._movable = movable
            movable.room = self._room

    def due(self, step: int) -> bool:
        """Whether to take a snapshot after `step` steps. Every rank calls it after every step: the ranks agree on it
        with ``auto``, and `_room` goes by it."""
        self._done_steps = step
        if self._options.snapshot_every_steps != "auto":
            return step % int(self._options.snapshot_every_steps) == 0
        now = time.perf_counter()
        if self._last_due:
            last = now - self._last_due
            self._step_s = last if not self._step_s else 0.8 * self._step_s + 0.2 * last
        self._last_due = now
        if step < self._next:
            return False
        with self._changed:
            ready = self._open_slot is not None if self._berths else self._may_write
            busy = not ready and self._broken is None
        vote = torch.tensor([float(busy), self._interval()])
        if self._ranks.world > 1:
            dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        if vote[0]:
            self._next = step + 1
            return False
        self._next = step + max(1, int(vote[1]))
        return True

    def save(
        self,
        step: int,
        pieces: Iterable[Piece] | Callable[[], Iterable[Piece]],
        rank_state: Mapping[str, Any],
        meta: Mapping[str, Any],
        *,
        background: bool = True,
        fault: Callable[[], str] = str,
    ) -> None:
        """Hand this rank's state over and return; every rank calls it. The state must not change before `wait_copied`.

        pieces: those of a function are got on another thread, where they may wait for an update that is still under
        way. background: without, all is copied before `save` returns, and a piece need be good only until the next is
        asked for. In both cases the pieces must be those that `start` got. `rank_state` and `meta` as in
        `Checkpoints.save`. fault: asked once the state is copied, on another thread; why there shall be no snapshot of
        it, and then the one before stays the newest. Waits while the snapshot before is being made.
        """
        begun = time.perf_counter()
        self.stats.count()
        if background and not callable(pieces):
            pieces = list(pieces)
        assert self._index is not None, "start() first"
        self._done_steps = step
        job = HandedOver(
            step,
            pieces,
            self._index,
            values.dumps(dict(rank_state)),
            values.dumps(dict(meta)) if self._ranks.rank == 0 else b"{}",
            torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None,
            fault,
        )
        with self._changed:
            if not self._wait_for(lambda: self._may_write) and self._broken is None and not self._leaving:
                self._broken = CheckpointError(f"the snapshot before was not decided within {GRANT_S:g} s")
                self._report(f"there are no snapshots from step {step} on: {self._broken}")
            if self._broken is not None or not self._may_write:
                self._error = self._broken or CheckpointError("the ranks are ending")
                return
            self._job = self._copying = job
            self._open_slot, self._wanted = None, False
            self._changed.notify_all()
        if not background:
            job.begun.wait()
            try:
                if job.area is not None:
                    assert not callable(job.pieces)
                    job.goes(*copy_here(job.pieces, job.index, job.area))
            finally:
                job.issued.set()
        self.stats.stall_s.append(time.perf_counter() - begun)

    def wait_copied(self) -> None:
        """Return once the state may change. Call it before each update."""
        job, self._copying = self._copying, None
        if job is None:
            return
        begun = time.perf_counter()
        reached = job.after and torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        job.issued.wait()
        if reached and job.last and job.last.event:
            torch.cuda.current_stream().wait_event(job.last.event)
            self.stats.waits(reached, job.last.event)
        else:
            self.stats.stall_s[-1] += time.perf_counter() - begun

    def wait(self) -> None:
        """Return once the last snapshot is committed or given up. Which, is in `error`."""
        with self._changed:
            if not self._wait_for(lambda: self._job is None and self._written == (0, 0)) and self._broken is None:
                self._error = CheckpointError("it is not decided what became of the last snapshot")

    def error(self) -> CheckpointError | None:
        """Why the last snapshot that was decided is not there; None if it is."""
        return self._error

    def leave(self) -> None:
        """Whoever waits for a version goes on without. From any thread, before `close`: others that it needs are gone.
        What was handed over is written."""
        with self._changed:
            self._leaving = True
            self._changed.notify_all()

    def _wait_for(self, done: Callable[[], bool]) -> bool:
        """While there is anything to wait for, `GRANT_S` at most; whether it is `done`. Under `_changed`."""
        self._changed.wait_for(lambda: done() or self._broken is not None or self._leaving, GRANT_S)
        return done()

    def close(self, *, dropped: bool = False) -> None:
        """Let go; a copy under way is finished. `dropped`, on rank 0: end the snapshot processes too, with all they
        hold."""
        self._movable.room = nowhere
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._asking is not None:
                self._asking.cut()
        if self._thread is not None:
            self._thread.join(timeout=5 * _POLL_S)
            self._thread = None
            for slot in self._pinned:
                torch.cuda.cudart().cudaHostUnregister(slot.ctypes.data + self._start)
            del self._slots, self._pinned
            self._berths = []
            self._segment.close()
        if dropped and self._ranks.rank == 0:
            drop(self._roster)

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        """One snapshot after the other: wait until it may be written, wait for the state, write it, say so."""
        try:
            with Wire.connect(
                self._roster.nodes[self._roster.rank_nodes[self._ranks.rank]], self._roster.token
            ) as wire:
                wire.ask({"do": "attach", "generation": self._generation, "rank": self._ranks.rank})
                while self._await_grant(wire):
                    job = self._await_job(wire)
                    if job is None:
                        return
                    self._write(wire, job)
        except Exception as error:  # whatever it is, it must reach the user from this thread and not end the training
            with self._changed:
                if self._closed:
                    return
                self._broken = error if isinstance(error, CheckpointError) else CheckpointError(repr(error))
                self._error = self._broken
                self._changed.notify_all()
                if self._job is not None:
                    self._job.begun.set()
                    self._job.issued.set()
                    self._job = None
            self._report(f"there are no snapshots any more: {self._broken}; training goes on")
            if not isinstance(error, Ended):
                self._tell_all(f"rank {self._ranks.rank}: {self._broken}")

    def _tell_all(self, problem: str) -> None:
        """No version is whole without this rank: the others need not wait for one, on any node."""
        message = {"do": "end", "generation": self._generation, "problem": problem}
        for node in self._roster.nodes:
            with suppress(CheckpointError), Wire.connect(node, self._roster.token) as wire:
                wire.ask(message)

    def _await_grant(self, wire: Wire) -> bool:
        while True:
            with self._changed:
                if self._closed:
                    return False
                self._check_unbroken()
                self._asking = wire
            message = {"do": "grant", "generation": self._generation, "rank": self._ranks.rank}
            answer = wire.ask(message | {"after": self._last, "wait_s": _POLL_S})
            with self._changed:
                self._asking = None
            version, step = self._written
            if version and answer["done"] >= version:
                self._decided(version, step, answer)
            elif answer["last"] and not answer["version"]:
                raise Ended(str(answer["problem"]))
            if answer["version"]:
                with self._changed:
                    self._granted = int(answer["version"])
                    self._changed.notify_all()
                return True

    def _check_unbroken(self) -> None:
        """Under `_changed`, in the thread: the training thread may have waited too long."""
        if self._broken is not None and not self._closed:
            raise self._broken

    @property
    def _may_write(self) -> bool:
        """Whether the next version is granted, and the one before no longer written."""
        return self._granted > 0 and self._job is None

    def _room(self, wait: bool) -> Destination | None:
        """Asked before an update, by the training thread to `wait`; see [Note: the version that the update writes]."""
        begun, every = time.perf_counter(), self._options.snapshot_every_steps
        step = self._done_steps + 1
        with self._changed:
            due = step >= self._next and self._may_write if every == "auto" else step % int(every) == 0
            if not due or self._broken is not None:
                return None
            if self._open_slot is None:
                self._wanted = True
                self._changed.notify_all()
                if wait:
                    self._wait_for(lambda: not self._wanted)
                    self._wanted = False
            slot = self._open_slot
        if wait and self.stats.stall_s:
            self.stats.stall_s[-1] += time.perf_counter() - begun
        return None if slot is None else self._berths[slot]

    def _open(self, wire: Wire) -> None:
        """Begin the version that was granted, before its step is known. Where it was given up meanwhile, who writes it
        is told so."""
        try:
            slot = int(wire.ask({"do": "begin", "version": self._granted, "step": None})["slot"])
        except Refused:
            slot = None
        with self._changed:
            if self._wanted:
                self._open_slot, self._wanted = slot, False
                self._changed.notify_all()

    def _decided(self, version: int, step: int, answer: Mapping[str, Any]) -> None:
        before = str(self._error)
        with self._changed:
            self._written = (0, 0)
            self._error = None
            if answer["done"] > version or not answer["committed"]:
                self._error = CheckpointError(f"the snapshot of step {step} was given up: {answer['problem']}")
            self.stats.node_s = dict(answer["seconds"])
            self._changed.notify_all()
        if self._error is not None and before.partition(":")[2] != str(self._error).partition(":")[2]:
            self._report(f"{self._error}; training goes on")

    def _await_job(self, wire: Wire) -> HandedOver | None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._job or self._wanted or self._broken)
                self._check_unbroken()
                if self._job is not None or self._closed:
                    return self._job
            self._open(wire)

    def _write(self, wire: Wire, job: HandedOver) -> None:
        begun = time.perf_counter()
        version = self._granted
        try:
            slot = int(wire.ask({"do": "begin", "version": version, "step": job.step})["slot"])
            self._wake(version, job.step)
        except Refused as error:  # given up before it began: the others will not have it either
            self._skip(version, job, error)
            return
        area = self._area(slot)
        if callable(job.pieces) or isinstance(job.pieces, list):
            pieces = list(job.pieces()) if callable(job.pieces) else job.pieces
            marks = self._copier.copy(pieces, job.index, area, job.after, job.goes)
        else:
            job.area = area
            job.begun.set()
            job.issued.wait()
            if job.last is None:
                raise CheckpointError(f"the state of step {job.step} could not be read")
            marks = iter([job.last])
        data_bytes = array_offsets(job.index)[1]
        crcs = seal(area, marks, data_bytes)
        self.stats.copy_s.append(time.perf_counter() - begun)
        blob = Blob(index=job.index.dumps(), rank_state=job.rank_state, meta=job.meta, crcs=crcs).dumps()
        if data_bytes + len(blob) > len(area):
            raise CheckpointError(f"the description of the state has {len(blob)} bytes, more than there is room for")
        area[data_bytes : data_bytes + len(blob)] = np.frombuffer(blob, dtype=np.uint8)
        part = Written(
            rank=self._ranks.rank,
            start=self._start,
            data_bytes=data_bytes,
            blob_bytes=len(blob),
            blob_crc=crc32c(blob),
        )
        with self._changed:
            self._job, self._granted, self._last = None, 0, version
            self._written = (version, job.step)
        self.stats.taken += 1
        self.stats.state_bytes, self.stats.copied_bytes = data_bytes, job.copied_bytes
        try:
            wire.ask({"do": "written", "version": version, "part": asdict(part), "fault": job.fault()})
        except Refused as error:
            self._skip(version, job, error)

    def _area(self, slot: int) -> Bytes:
        """This rank's, in a slot."""
        return self._slots[slot][self._start : self._start + self._size]

    def _wake(self, version: int, step: int) -> None:
        """From rank 0, the nodes without ranks, which keep parity alone: nobody else tells them of a step."""
        if self._ranks.rank == 0:
            for number in set(range(len(self._roster.nodes))) - set(self._roster.rank_nodes):
                with Wire.connect(self._roster.nodes[number], self._roster.token) as wire:
                    wire.ask({"do": "begin", "version": version, "step": step})

    def _skip(self, version: int, job: HandedOver, error: Refused) -> None:
        job.begun.set()
        job.issued.set()
        with self._changed:
            self._job, self._granted, self._last, self._written = None, 0, version, (0, 0)
            self._error = CheckpointError(f"the snapshot of step {job.step} was given up: {error}")
            self._changed.notify_all()
        self._report(f"{self._error}; training goes on")

    def _pin(self, slot: Bytes) -> bool:
        """Page-lock this rank's area of a slot."""
        result = torch.cuda.cudart().cudaHostRegister(slot.ctypes.data + self._start, self._size, 0)
        if int(result) != 0:
            self._report(f"page-locking {self._size} bytes of shared memory failed ({result}): snapshots are slower")
        return int(result) == 0

    def _interval(self) -> float:
        """Steps between snapshots that cost `COST` of the time, from what the last ones cost this rank."""
        self.stats.count()
        if not self.stats.stall_s or not self._step_s:
            return 1.0
        cost_s = sum(self.stats.stall_s[-5:]) / len(self.stats.stall_s[-5:])
        if not torch.cuda.is_available():  # training and snapshots share the cores
            cores = len(os.sched_getaffinity(0))
            cost_s += (self.stats.copy_s[-1] if self.stats.copy_s else 0.0) / cores
            cost_s += self.stats.node_s.get("cpu", 0.0) / cores
        return float(np.ceil(cost_s / (COST * self._step_s)))
