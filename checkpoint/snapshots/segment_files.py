"""The files behind shared memory segments: made, opened, locked, found again and removed.

[Note: owners and leftovers]
The owner holds an flock on the file; the kernel releases it at death, whatever the cause, so a segment whose lock is
free is a leftover. (A pid would not do: pids are reused, and mean nothing in another container.) Creating and sweeping
may race: each locks, then looks whether the name still means the file it has locked.
A child that is forked without exec shares its parent's locks until it ends, so owners do not fork.

Mode 0600; opened without following links; a file of another user or mode is refused.
"""

import fcntl
import os
import re
import stat
from pathlib import Path

from checkpoint.errors import CheckpointError

FOLDER = "/dev/shm"
NAME = re.compile(r"atoll-([0-9a-f]{32})-([A-Za-z0-9_.-]{1,80})")


class SegmentError(CheckpointError):
    """A segment cannot be made, opened or written."""


class NoRoom(SegmentError):
    """There is too little shared memory."""


def remove_leftovers(folder: str = FOLDER) -> list[Path]:
    """Delete this user's segments without a living owner, found by name; returns what was deleted."""
    found = []
    for path in sorted(Path(folder).iterdir()):
        if not NAME.fullmatch(path.name):
            continue
        try:
            fd = open_private(path)
        except (SegmentError, OSError):
            continue  # another user's, or gone meanwhile
        try:
            if try_lock(fd) and is_at(fd, path):
                path.unlink()
                found.append(path)
        finally:
            os.close(fd)
    return found


def create_locked(path: Path) -> int:
    """A new empty file whose lock this process holds."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise SegmentError(
                f"{path} exists: another process of this run made it, or left it and its leftovers were not removed"
            ) from None
        fcntl.flock(fd, fcntl.LOCK_EX)
        if is_at(fd, path):
            return fd
        os.close(fd)  # swept before it was locked


def open_private(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o177:
        os.close(fd)
        raise SegmentError(f"{path}: must be a file of this user with mode 0600, is {stat.filemode(status.st_mode)}")
    return fd


def try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
