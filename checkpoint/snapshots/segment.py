"""Shared memory that outlives the worker who writes it: versions of a snapshot in slots, committed one by one.

A *segment* is a file in /dev/shm, made and owned by the node's snapshot process, written by one process at a time,
readable by both after either dies. It has 2 or more slots; a slot holds one version: its payload and `meta`, a few
bytes that say what the payload is (the headers of its fragments, an index).

[Note: the commit]
Each slot has a record of 64 bytes on a page of its own: version, step, sizes, the CRC-32C of `meta`, and the CRC-32C of
the record, seeded with the run and the slot. A version is there if and only if its record is right. The writer
 1. zeroes the record (from here the slot's old version does not exist),
 2. writes payload and meta,
 3. writes the record.
SIGKILL may come between any two stores, within the record's too: what is left is then either no record, half a record,
whose CRC is wrong, or the whole. Memory written by a process that was killed stays written. There is no power cut to
survive: /dev/shm does not either. Versions rise and are never used twice, so a record is never taken for another's.

A second writer is refused by a lock of its own. Who owns a segment, and what is left of dead owners:
`checkpoint/snapshots/segment_files.py`, [Note: owners and leftovers]. Nothing is unpickled.
"""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint.crc import Bytes, crc32c
from checkpoint.erasure.protocol import slot_for
from checkpoint.snapshots.format import FORMAT
from checkpoint.snapshots.segment_files import FOLDER, NAME, NoRoom, SegmentError, create_locked, open_private

PAGE_BYTES = 4096
STRIDE_BYTES = 1 << 16
"""From slot to slot, a multiple of this: an update from one to another meets the same alignment as one in place."""

_SUPER = struct.Struct("<8sI16sIQQ")
_SUPER_MAGIC = b"ATOLLSEG"
_RECORD = struct.Struct("<8sQQQQI")
_RECORD_MAGIC = b"ATOLLREC"
_CRC = struct.Struct("<I")
_RECORD_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class _Record:
    version: int
    step: int
    payload_bytes: int
    meta_bytes: int
    meta_crc: int


class Segment:
    """One mapped segment. Make it with `create` (by its owner) or `open` (by a worker or a reader)."""

    def __init__(self, path: Path, fd: int, *, owner: bool) -> None:
        self.path = path
        self.owner = owner
        self._fd = fd
        self._writing = False
        size = os.fstat(fd).st_size
        if size < PAGE_BYTES:
            raise SegmentError(f"{path}: not a segment, or one that is just being made")
        self._map = mmap.mmap(fd, size)
        self._memory: Bytes = np.frombuffer(self._map, dtype=np.uint8)
        head = self._map[: _SUPER.size]
        self.run: bytes
        self.num_slots: int
        self.payload_bytes: int
        self.meta_bytes: int
        magic, format_, self.run, self.num_slots, self.payload_bytes, self.meta_bytes = _SUPER.unpack(head)
        (crc,) = _CRC.unpack_from(self._map, _SUPER.size)
        if magic != _SUPER_MAGIC or crc != crc32c(head) or format_ != FORMAT or size != self._size():
            raise SegmentError(f"{path}: not a segment of format {FORMAT}, or one that is just being made")

    @classmethod
    def create(
        cls, run: bytes, label: str, *, num_slots: int, payload_bytes: int, meta_bytes: int, folder: str = FOLDER
    ) -> "Segment":
        """A new segment with all its memory reserved, so that no later write can fail. `run`: 16 bytes.

        SegmentError where the name is taken, NoRoom where the memory is not there.
        """
        name = f"atoll-{run.hex()}-{label}"
        if not NAME.fullmatch(name) or not 2 <= num_slots <= 255 or payload_bytes < 1 or meta_bytes < 0:
            raise ValueError(f"segment {name}: {num_slots} slots (2 to 255) of {payload_bytes} + {meta_bytes} bytes")
        path = Path(folder, name)
        payload_bytes, meta_bytes = _pages(payload_bytes), _pages(meta_bytes)
        size = _total(num_slots, payload_bytes, meta_bytes)
        free = os.statvfs(folder)
        if size > free.f_bavail * free.f_frsize:
            raise NoRoom(_no_room(path, size, free.f_bavail * free.f_frsize))
        fd = create_locked(path)
        try:
            os.posix_fallocate(fd, 0, size)
            head = _SUPER.pack(_SUPER_MAGIC, FORMAT, run, num_slots, payload_bytes, meta_bytes)
            os.pwrite(fd, head + _CRC.pack(crc32c(head)), 0)
            return cls(path, fd, owner=True)
        except BaseException as error:
            path.unlink(missing_ok=True)
            os.close(fd)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise NoRoom(_no_room(path, size, free.f_bavail * free.f_frsize)) from error
            raise

    @classmethod
    def open(cls, path: str | Path) -> "Segment":
        """An existing segment, to write or to read."""
        fd = open_private(Path(path))
        try:
            return cls(Path(path), fd, owner=False)
        except BaseException:
            os.close(fd)
            raise

    def begin(self, version: int, step: int, keep: Collection[int] = ()) -> "Draft":
        """Start to write `version`; never over a version in `keep`. A draft that is not committed leaves nothing.

        SegmentError where another process writes to the segment.
        """
        if not self._writing:
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _writer_lock(fcntl.F_WRLCK))
            except BlockingIOError:
                raise SegmentError(f"{self.path}: another process is writing to it") from None
            self._writing = True
        slots = [record.version if (record := self._record(slot)) else None for slot in range(self.num_slots)]
        newest = max((held for held in slots if held is not None), default=-1)
        if version <= newest:
            raise ValueError(f"version {version} after {newest}: versions must rise")
        slot = slot_for(slots, keep)
        self._erase_record(slot)
        return Draft(self, slot, version, step)

    def committed(self) -> list["Version"]:
        """The versions that are there, newest first. Their payload is not checked: that is what its headers are for."""
        found = []
        for slot in range(self.num_slots):
            record = self._record(slot)
            if record is None or record.meta_bytes > self.meta_bytes or record.payload_bytes > self.payload_bytes:
                continue
            start = self._slot(slot)
            meta = self._memory[start : start + record.meta_bytes].tobytes()
            if crc32c(meta) == record.meta_crc and record == self._record(slot):
                found.append(Version(self, slot, record, meta))
        return sorted(found, key=lambda version: version.version, reverse=True)

    def discard(self, version: int) -> None:
        """Make `version` not exist, if it does: one that was given up, before older ones are written again."""
        for slot in range(self.num_slots):
            record = self._record(slot)
            if record is not None and record.version == version:
                self._erase_record(slot)

    def close(self) -> None:
        """Unmap, and give up ownership: the file is a leftover then. Views still in use keep the memory mapped."""
        if self._fd >= 0:
            # Explicitly: the mapping has a duplicate of the descriptor, which shares the locks and may live on.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _writer_lock(fcntl.F_UNLCK))
            del self._memory
            try:
                self._map.close()
            except BufferError:
                pass  # the last view to go unmaps it
            os.close(self._fd)
            self._fd = -1

    def destroy(self) -> None:
        """Remove the segment; by its owner. Who has it mapped keeps the memory until it unmaps."""
        assert self.owner, "only its owner removes a segment"
        self.path.unlink(missing_ok=True)
        self.close()

    def _erase_record(self, slot: int) -> None:
        start = PAGE_BYTES * (1 + slot)
        self._memory[start : start + _RECORD_BYTES] = 0

    def _slot(self, slot: int) -> int:
        return PAGE_BYTES * (1 + self.num_slots) + slot * _stride(self.payload_bytes, self.meta_bytes)

    def slot_memory(self, slot: int) -> Bytes:
        """A slot's whole payload, for those who write their part of a draft that another process has begun."""
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"{self.path}: slot {slot} of {self.num_slots}")
        return self._payload(slot, self.payload_bytes)

    def _payload(self, slot: int, size: int) -> Bytes:
        start = self._slot(slot) + self.meta_bytes
        return self._memory[start : start + size]

    def _size(self) -> int:
        return _total(self.num_slots, self.payload_bytes, self.meta_bytes)

    def _seal(self, slot: int, body: bytes) -> bytes:
        return _CRC.pack(crc32c(self.run, bytes([slot]), body))

    def _record(self, slot: int) -> _Record | None:
        start = PAGE_BYTES * (1 + slot)
        raw = self._memory[start : start + _RECORD.size + _CRC.size].tobytes()
        body = raw[: _RECORD.size]
        magic, version, step, payload_bytes, meta_bytes, meta_crc = _RECORD.unpack(body)
        if magic != _RECORD_MAGIC or raw[_RECORD.size :] != self._seal(slot, body):
            return None
        return _Record(
            version=version, step=step, payload_bytes=payload_bytes, meta_bytes=meta_bytes, meta_crc=meta_crc
        )

    def _commit(self, slot: int, version: int, step: int, payload_bytes: int, meta: bytes) -> None:
        start = self._slot(slot)
        self._memory[start : start + len(meta)] = np.frombuffer(meta, dtype=np.uint8)
        body = _RECORD.pack(_RECORD_MAGIC, version, step, payload_bytes, len(meta), crc32c(meta))
        record = np.frombuffer(body + self._seal(slot, body), dtype=np.uint8)
        start = PAGE_BYTES * (1 + slot)
        self._memory[start : start + len(record)] = record


class Draft:
    """A version that is being written. `payload`: the slot's bytes, page-aligned, still those of an older version."""

    def __init__(self, segment: Segment, slot: int, version: int, step: int) -> None:
        self._segment, self.slot, self.version, self.step = segment, slot, version, step
        self.payload = segment._payload(slot, segment.payload_bytes)

    def commit(self, meta: bytes, payload_bytes: int | None = None) -> None:
        """The version is there from now on. `payload_bytes`: how much of the payload it uses; all of it by default."""
        used = len(self.payload) if payload_bytes is None else payload_bytes
        if len(meta) > self._segment.meta_bytes or not 0 <= used <= len(self.payload):
            raise ValueError(
                f"meta of {len(meta)} and payload of {used} bytes: the segment has room for "
                f"{self._segment.meta_bytes} and {len(self.payload)}"
            )
        self._segment._commit(self.slot, self.version, self.step, used, meta)


@dataclass(frozen=True)
class Version:
    """A committed version in a segment."""

    segment: Segment
    slot: int
    _record: _Record
    meta: bytes

    @property
    def version(self) -> int:
        return self._record.version

    @property
    def step(self) -> int:
        return self._record.step

    @property
    def payload(self) -> Bytes:
        """The memory itself, page-aligned; a writer may reuse it."""
        return self.segment._payload(self.slot, self._record.payload_bytes)


def _writer_lock(kind: int) -> bytes:
    """`struct flock` for a lock of the open file, which is apart from flock's, and which no other close releases."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, PAGE_BYTES, 1, 0)


def _pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def _total(num_slots: int, payload_bytes: int, meta_bytes: int) -> int:
    return PAGE_BYTES * (1 + num_slots) + num_slots * _stride(payload_bytes, meta_bytes)


def _stride(payload_bytes: int, meta_bytes: int) -> int:
    """From slot to slot."""
    return -(-(payload_bytes + meta_bytes) // STRIDE_BYTES) * STRIDE_BYTES


def _no_room(path: Path, size: int, free: int) -> str:
    return (
        f"{path}: snapshots need {size} bytes of shared memory, {free} are free; enlarge the mount (docker run "
        "--shm-size, atoll submit kuberay --shm), lower checkpoint.parity, or set checkpoint.snapshot_every_steps=0"
    )
