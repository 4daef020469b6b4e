"""One file on one drive, read and written past the page cache by threads of its own; every result is checked.

The file is scratch memory, not a record: it is removed as soon as it is open, so that whatever kills the process
gives its space back. What must outlive the process is a matter of `checkpoint/`, whose commit spans all tiers.

A system call may do less than it was asked to. It is then asked for the rest, unless it did nothing or stopped within
a block (the file was cut short, or the drive is full): that is an error, as is every errno. See `DriveError`.
"""

import errno
import mmap
import os
import queue
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.mounts import filesystem_of, try_writing

BLOCK = 4096
"""Bytes that offsets, sizes and addresses are multiples of: what direct I/O needs on any drive in use."""

_REMEDIES = {
    errno.ENOSPC: "free some space there, lower offload.nvme_bytes or set offload.nvme_path to another drive",
    errno.EDQUOT: "the user's quota is used up: lower offload.nvme_bytes or set offload.nvme_path elsewhere",
    errno.EFBIG: "this process may not write files so large (ulimit -f), or the file system cannot hold them",
    errno.EIO: "the drive or its link failed (see dmesg, smartctl -a). Set offload.nvme_path to another drive and "
    "resume from the last checkpoint, which this does not touch",
    errno.EINVAL: f"the file system refuses direct I/O in blocks of {BLOCK} bytes: set offload.nvme_path to a folder "
    f"on ext4 or xfs, or offload.nvme_direct=false to go through the page cache",
    errno.EROFS: "the file system is read-only, as after an error of the drive : set offload.nvme_path elsewhere",
    errno.EACCES: "set offload.nvme_path to a folder that this user may write",
    errno.ENOENT: "make the folder, or set offload.nvme_path to one that is there",
}
_GONE = "the drive is gone (see dmesg). Set offload.nvme_path to another and resume from the last checkpoint"


class DriveError(OSError):
    """A system call on a tier's file failed. The message says what, where in which file, and what to do."""


@dataclass(frozen=True, kw_only=True)
class SystemCalls:
    """What a Drive asks of the operating system; the tests let each of them fail."""

    open: Callable[..., int] = os.open
    fallocate: Callable[[int, int, int], None] = os.posix_fallocate
    preadv: Callable[[int, list[Any], int], int] = os.preadv
    pwritev: Callable[[int, list[Any], int], int] = os.pwritev


def drive_error(number: int, what: str, where: str) -> DriveError:
    """With the remedy for that errno. what: failed, in words. where: the file or folder."""
    return DriveError(number, f"{what}: {os.strerror(number)}; {_REMEDIES.get(number, _GONE)}", where)


def check_folder(folder: Path, direct: bool) -> None:
    """ValueError for a folder in memory, DriveError where there is none."""
    if not folder.is_dir():
        raise drive_error(errno.ENOENT, "no such folder", str(folder))
    kind = filesystem_of(folder)
    if direct and kind in ("tmpfs", "ramfs"):
        raise ValueError(
            f"offload.nvme_path={folder}: {kind} is memory, not a drive; use a folder on one, or "
            f"offload.nvme_direct=false to have it anyway"
        )


def check_writable(folder: Path, direct: bool) -> None:
    """As `check_folder`, and DriveError where nothing can be written there."""
    check_folder(folder, direct)
    try:
        try_writing(folder)
    except OSError as error:
        raise drive_error(error.errno or errno.EIO, "no file can be written there", str(folder)) from error


class Drive:
    """`size_bytes` of scratch on the drive that `folder` is on, with `depth` requests under way at once."""

    def __init__(self, folder: Path, size_bytes: int, *, direct: bool, depth: int, calls: SystemCalls) -> None:
        """Raises ValueError for a folder in memory, and DriveError where the space is not to be had or direct I/O
        is refused: all of the space is taken now, and one block is written and read."""
        self.folder, self.size_bytes, self._calls = folder, size_bytes, calls
        self.file = folder / f"atoll-{os.getpid()}-{secrets.token_hex(4)}.state"
        check_folder(folder, direct)
        self._handle = self._open(direct)
        try:
            self._probe()
        except BaseException:
            os.close(self._handle)
            raise
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"drive-{i}", daemon=True)  # must not keep a failed run alive
            for i in range(depth)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        """Have a thread of this drive call `work`, which must not raise."""
        self._queue.put(work)

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill `memory` from `offset`, whole, or raise DriveError."""
        self._transfer(self._calls.preadv, "read", memory, offset)

    def write(self, memory: memoryview, offset: int) -> None:
        """Write all of `memory` at `offset`, or raise DriveError."""
        self._transfer(self._calls.pwritev, "write", memory, offset)

    def close(self) -> None:
        """End the threads after what is queued, and close the file, which frees its space."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._handle)

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
            del work  # it holds the request's tensor

    def _transfer(self, call: Callable[[int, list[Any], int], int], act: str, memory: memoryview, offset: int) -> None:
        done = 0
        while done < len(memory):
            what = f"{act} of {len(memory) - done} bytes at offset {offset + done}"
            try:
                count = call(self._handle, [memory[done:]], offset + done)
            except OSError as error:
                raise drive_error(error.errno or errno.EIO, what, str(self.file)) from error
            done += count
            if count == 0 or (done < len(memory) and done % BLOCK):
                raise drive_error(errno.EIO, f"{what} ended after {count} bytes", str(self.file))

    def _open(self, direct: bool) -> int:
        """A handle of a new file that has all its space, and had no name when that was taken, which may last."""
        flags, creation = os.O_RDWR | os.O_CLOEXEC, f"creation of a file of {self.size_bytes} bytes"
        handles: list[int] = []
        try:
            what = creation
            # fallocate needs a handle without O_DIRECT where the C library has to write the blocks itself
            handles.append(self._calls.open(self.file, flags | os.O_CREAT | os.O_EXCL, 0o600))
            try:
                what = "opening for direct I/O"
                handles.append(self._calls.open(self.file, flags | os.O_DIRECT) if direct else os.dup(handles[0]))
            finally:
                self.file.unlink(missing_ok=True)
            what, stat = creation, os.fstatvfs(handles[0])
            if stat.f_bavail * stat.f_frsize < self.size_bytes:
                what += f" ({stat.f_bavail * stat.f_frsize} are free)"
                raise OSError(errno.ENOSPC, "")
            self._calls.fallocate(handles[0], 0, self.size_bytes)
            return handles.pop()
        except OSError as error:
            raise drive_error(error.errno or errno.EIO, what, str(self.file)) from error
        finally:
            for handle in handles:
                os.close(handle)

    def _probe(self) -> None:
        """Fail now, not in an hour, where blocks of this size are refused."""
        memory = memoryview(mmap.mmap(-1, BLOCK))
        self.write(memory, 0)
        self.read(memory, 0)
