"""A folder in any storage that fsspec knows, with durable and atomic writes.

Owns how bytes reach the storage; knows nothing of what they mean. Paths are relative to the folder. On a local disk a
written file is on the disk (fsync) when `write` returns; elsewhere an object is whole once it is put. May be used from
several threads.
"""

import errno
import fcntl
import os
from collections.abc import Iterable

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from checkpoint.crc import Bytes
from checkpoint.erasure import aligned_empty
from checkpoint.index import PAGE_BYTES
from offload.mounts import try_writing

_DIRECT_BYTES = 1 << 20
"""Shorter content goes by the page cache."""


class Folder:
    """The folder at `path` of the fsspec file system `fs`; it need not exist."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs = fs
        self.path = path.rstrip("/")
        self.local = isinstance(fs, LocalFileSystem)

    @classmethod
    def at(cls, url: str) -> "Folder":
        """Folder at a path or fsspec URL; ValueError where its protocol is unknown or needs a missing package."""
        try:
            fs, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise ValueError(f"checkpoint.url={url!r} needs a package that is not installed: {error}") from error
        except ValueError as error:
            known = "a path, or a URL such as s3://, gs://, abfs://, memory://"
            raise ValueError(f"checkpoint.url={url!r}: {error}; allowed: {known}") from error
        return cls(fs, path)

    def check_writable(self) -> None:
        """ValueError where it is on a local disk and nothing can be written there; elsewhere nothing is asked."""
        if not self.local:
            return
        try:
            try_writing(self.path)
        except OSError as error:
            raise ValueError(
                f"checkpoint.url={self.path}: cannot be written there ({error.strerror}: "
                f"{error.filename or self.path}); choose another folder or URL"
            ) from error

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def child(self, name: str) -> "Folder":
        return Folder(self._fs, f"{self.path}/{name}")

    def names(self) -> list[str]:
        """Names of what lies directly in it; empty where it does not exist."""
        self._fs.invalidate_cache()
        try:
            return [path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self.path, detail=False)]
        except FileNotFoundError:
            return []

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file in it, at any depth."""
        self._fs.invalidate_cache()
        prefix = f"{self.path}/"
        return {path.removeprefix(prefix): info["size"] for path, info in self._fs.find(self.path, detail=True).items()}

    def exists(self, path: str) -> bool:
        return bool(self._fs.exists(f"{self.path}/{path}"))

    def read(self, path: str) -> bytes:
        return bytes(self._fs.cat_file(f"{self.path}/{path}"))

    def load(self, path: str, memory: Bytes | None = None, *, direct: bool = False) -> Bytes:
        """A large file's bytes, on a local disk read straight into memory: into `memory`, page-aligned and of whole
        pages, where they fit. direct: past the page cache, for who reads alone; ranks of one machine often read the
        same."""
        if not self.local:
            return np.frombuffer(bytearray(self.read(path)), dtype=np.uint8)
        fd = os.open(f"{self.path}/{path}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            size, done = os.fstat(fd).st_size, 0
            content = memory if memory is not None and size <= len(memory) else pages_empty(size)
            direct = direct and size >= _DIRECT_BYTES and _set_direct(fd, True)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while done < size:
                if direct and done % PAGE_BYTES:
                    direct = _set_direct(fd, False)
                try:
                    count = os.preadv(fd, [content[done:].data], done)
                except OSError as error:
                    if not direct or error.errno != errno.EINVAL:
                        raise
                    direct = _set_direct(fd, False)
                    continue
                if not count:
                    break
                done += count
            return content[:done]
        finally:
            os.close(fd)

    def make(self, *paths: str) -> None:
        """Make these folders and the ones above them."""
        for path in paths:
            self._fs.makedirs(f"{self.path}/{path}", exist_ok=True)

    def write(self, path: str, *parts: bytes | memoryview) -> None:
        """Write a file, the concatenation of `parts`; its folder exists. OSError names the file."""
        full = f"{self.path}/{path}"
        try:
            if self.local:
                _write_synced(full, parts)
            else:
                self._fs.pipe_file(full, b"".join(parts))
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), full) from error

    def write_atomic(self, path: str, content: bytes) -> None:
        """Write a file that at every instant is either absent or whole."""
        if not self.local:
            self.write(path, content)
            return
        self.write(f"{path}.partial", content)
        os.replace(f"{self.path}/{path}.partial", f"{self.path}/{path}")
        self.sync_folders("")

    def sync_folders(self, *paths: str) -> None:
        """Bring the names of the files that lie in these folders to the disk; nothing to do elsewhere than on one."""
        for path in paths if self.local else ():
            descriptor = os.open(f"{self.path}/{path}", os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self, path: str) -> None:
        """Remove one file, for good before anything that follows."""
        self._fs.rm_file(f"{self.path}/{path}")
        self.sync_folders("")

    def remove_tree(self) -> None:
        """Remove it and all that is in it; nothing to do where it does not exist."""
        if self._fs.exists(self.path):
            self._fs.rm(self.path, recursive=True)


def _write_synced(path: str, parts: Iterable[bytes | memoryview]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            content: Bytes = np.frombuffer(part, dtype=np.uint8)
            done = _write_direct(fd, content)
            while done < len(content):
                done += os.write(fd, content[done:].data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_direct(fd: int, content: Bytes) -> int:
    """Write what can go past the page cache, which would cost a copy and the memory of others; returns how much went.
    Large content from aligned memory does where the file stands at a page and its storage takes it."""
    whole = len(content) // PAGE_BYTES * PAGE_BYTES
    if whole < _DIRECT_BYTES or content.ctypes.data % PAGE_BYTES or os.lseek(fd, 0, os.SEEK_CUR) % PAGE_BYTES:
        return 0
    done = 0
    try:
        while _set_direct(fd, True) and done < whole and done % PAGE_BYTES == 0:
            done += os.write(fd, content[done:whole].data)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        _set_direct(fd, False)
    return done


def _set_direct(fd: int, on: bool) -> bool:
    """Whether what is read and written by `fd` goes past the page cache from now on; not every storage can."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | (os.O_DIRECT if on else 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return on


def pages_empty(size: int) -> Bytes:
    """Uninitialized, page-aligned memory of whole pages for `size` bytes."""
    return aligned_empty(-(-size // PAGE_BYTES) * PAGE_BYTES)
