"""One slab of shared memory a rank, which we cut ourselves.

An Arena is a file in /dev/shm (mode 0600, made with O_EXCL), mapped once, all of its pages taken at once, and
registered with CUDA once, so that copies from and to the GPU need no staging. Nothing is rounded to powers of two as
pinned allocators do: what is asked is what is used, but for the alignment (64 bytes by default).

[Note: who removes the file] Memory in /dev/shm outlives its process until its file is removed *and* nobody maps it. An
arena's file is removed as soon as it is open: whatever kills the process frees it.

[Note: pages are taken at the start] A page of a mapped file that is not there yet is made when it is first touched; if
/dev/shm or the container is full then, the kernel kills the process (SIGBUS, or the OOM killer). So limits are checked
first, with numbers, and every page is taken in the constructor: by MADV_POPULATE_WRITE, which many threads run at
once and which reports an error instead of killing (Linux 5.14), else by posix_fallocate.

[Note: arrays walked side by side] The CPU optimizer walks eight arrays at once. Where their addresses agree in the
lower bits, as they do when each begins a page, loads are taken to depend on stores to other arrays (only 12 bits are
compared) and all streams meet in the same banks of memory: a quarter of the bandwidth is lost (docs/host-state.md).
`take_together` therefore begins each of them 4736 bytes further, modulo 64 KiB.

[Note: memory for drives] To a drive a request is as many pieces of memory as do not lie next to each other, of which
its driver takes some hundred at once. In pages of 4 KiB that is a matter of luck, which each arena has its own of, and
a fifth of the drive's rate or more is lost (docs/host-state.md). In huge pages a request is one piece or two. Shared
memory has none on most machines (``transparent_hugepage/shmem_enabled``), a process's own has where it is asked for
(``enabled``). What drives read into and write from is therefore not in /dev/shm, and not there in a fork's child, with
whom its pages would be shared.

What is taken stays taken: whoever makes an arena knows beforehand what it is for.

Threads: `take` may be called from any. A tensor handed out keeps the mapping alive.
"""

import ctypes
import errno
import logging
import mmap
import os
import resource
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.device import host_available_bytes
from offload.hostpool import HostPool
from offload.mounts import filesystem_of
from offload.space import round_up

log = logging.getLogger(__name__)
SHARED = Path("/dev/shm")
ALIGN = 64
"""Bytes: a cache line, the widest vector, and more than CUDA asks."""
PAGE = mmap.PAGESIZE
_MADV_POPULATE_WRITE = 23
STAGGER, STAGGER_SPAN = 4096 + 640, 1 << 16
STAGGER_FROM = 2 << 20
"""Bytes: smaller arrays are packed, or the gaps (under 64 KiB each) would take more than 3%."""
_PORTABLE = 1  # cudaHostRegisterPortable: for every device and context of the process


class ArenaError(OSError):
    """Memory that an arena asked for is not to be had; the message says why and what to do."""


class _Population(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("size_bytes", ctypes.c_int64), ("error", ctypes.c_int32)]


class Arena:
    """`size_bytes` of shared memory; see the module."""

    def __init__(
        self,
        size_bytes: int,
        *,
        register: torch.device | None = None,
        pool: HostPool | None = None,
        for_drives: bool = False,
    ) -> None:
        """register: the CUDA device that will copy; None: no registration. pool: threads that take the pages; without
        it one thread does (0.9 s a GB). for_drives: what is in it goes to drives and comes from there, [Note: memory
        for drives].

        Raises ValueError for a size below one byte, and where /dev/shm is no tmpfs; ArenaError where memory is not to
        be had.
        """
        if size_bytes < 1:
            raise ValueError(f"offload.host_bytes={size_bytes}: at least 1")
        self.size_bytes = round_up(size_bytes, PAGE)
        self._memory = _private(self.size_bytes, pool) if for_drives else _shared(self.size_bytes, pool)
        if register is not None:
            _register(self._memory, register)
        self._device = register
        self._lock = threading.Lock()
        self._closed = False
        self._taken_bytes = 0

    def take(self, numel: int, dtype: torch.dtype, *, align: int = ALIGN) -> Tensor:
        """A 1-D tensor of `numel` elements, zero, at an address that is a multiple of `align` (a multiple of 64 that
        divides the page size). It is a storage of its own: autograd counts its changes apart from its neighbours'.

        Raises ArenaError (ENOMEM) when too little is left.
        """
        return self._view(self._cut(numel * dtype.itemsize, align), numel, dtype)

    def take_together(self, numel: int, dtypes: Sequence[torch.dtype], *, align: int = ALIGN) -> list[Tensor]:
        """One tensor of `numel` elements for each of `dtypes`, the first at a multiple of `align`: for arrays that are
        walked side by side, such as the master weights, moments, gradients and weights of a unit; see [Note: arrays
        walked side by side]."""
        offsets, size_bytes = layout(numel, dtypes)
        start = self._cut(size_bytes, align)
        return [self._view(start + offset, numel, dtype) for offset, dtype in zip(offsets, dtypes, strict=True)]

    def _cut(self, size_bytes: int, align: int) -> int:
        """Where so many bytes begin that nobody has yet."""
        if size_bytes < 1 or align < 1 or align % ALIGN or PAGE % align:
            raise ValueError(
                f"{size_bytes} bytes, align={align}: at least one element, align a multiple of {ALIGN} and a divisor "
                f"of {PAGE}"
            )
        with self._lock:
            if self._closed:
                raise ValueError("this Arena is closed")
            start = round_up(self._taken_bytes, align)
            stop = start + round_up(size_bytes, ALIGN)
            if stop > self.size_bytes:
                raise ArenaError(
                    errno.ENOMEM,
                    f"the arena of host memory is full: {size_bytes} bytes asked for, "
                    f"{self.size_bytes - self._taken_bytes} of {self.size_bytes} are free. Give it more by "
                    f"offload.host_bytes (now {self.size_bytes}), or move state to NVMe by offload=nvme",
                )
            self._taken_bytes = stop
        return start

    def _view(self, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=start)

    def close(self) -> None:
        """End the registration with CUDA, after the device is idle. The memory goes back when the last tensor dies."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._device is not None:
                torch.cuda.synchronize(self._device)
                _cuda_check(torch.cuda.cudart().cudaHostUnregister(address_of(self._memory)), "cudaHostUnregister", 0)
            del self._memory  # not close(): that unmaps at once, although torch.frombuffer's tensors refer to it

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def layout(numel: int, dtypes: Sequence[torch.dtype]) -> tuple[list[int], int]:
    """Offsets in bytes of arrays walked side by side, each a multiple of 64, and the size of all."""
    offsets, place = [], 0
    for number, dtype in enumerate(dtypes):
        size_bytes = numel * dtype.itemsize
        if size_bytes >= STAGGER_FROM:
            place += (number * STAGGER - place) % STAGGER_SPAN
        offsets.append(place)
        place = round_up(place + size_bytes, ALIGN)
    return offsets, place


def address_of(memory: mmap.mmap) -> int:
    """Address of a writable mapping."""
    return int(torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr())


def capacity_bytes() -> int:
    """The largest slab that there is memory for now, in /dev/shm and on the machine."""
    stat = os.statvfs(SHARED)
    available = host_available_bytes()
    return min(available, stat.f_bavail * stat.f_frsize) if stat.f_blocks else available


def _shared(size_bytes: int, pool: HostPool | None) -> mmap.mmap:
    check_capacity(size_bytes)
    file = SHARED / f"atoll-{os.getpid()}-{secrets.token_hex(8)}"
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        file.unlink()
        os.ftruncate(handle, size_bytes)
        memory = _mapped(size_bytes, lambda: mmap.mmap(handle, size_bytes))
        _ask_for_huge_pages(memory)  # of use where /dev/shm is mounted with huge=advise, and no harm elsewhere
        _take_pages(memory, pool, lambda: os.posix_fallocate(handle, 0, size_bytes))
    finally:
        os.close(handle)  # the mapping keeps the file
    return memory


def _private(size_bytes: int, pool: HostPool | None) -> mmap.mmap:
    _check_memory(size_bytes)
    memory = _mapped(size_bytes, lambda: mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    memory.madvise(mmap.MADV_DONTFORK)
    _ask_for_huge_pages(memory)
    _take_pages(memory, pool, lambda: torch.frombuffer(memory, dtype=torch.uint8).zero_())
    return memory


def _mapped(size_bytes: int, make: Callable[[], mmap.mmap]) -> mmap.mmap:
    """What `make` maps; ArenaError where the kernel refuses addresses, of which no figure of free memory tells."""
    try:
        return make()
    except OSError as error:
        raise ArenaError(
            error.errno,
            f"could not map {size_bytes} bytes of memory: {os.strerror(error.errno or errno.ENOMEM)}; a limit of this "
            f"process (ulimit -v) or of the machine (vm.overcommit_memory, vm.max_map_count) is reached. Raise it, or "
            f"lower offload.host_bytes",
        ) from error


def _ask_for_huge_pages(memory: mmap.mmap) -> None:
    with suppress(OSError):  # of a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)


def check_capacity(size_bytes: int) -> None:
    """ArenaError (ENOSPC, ENOMEM) unless a slab of `size_bytes` fits in /dev/shm and in memory; ValueError if that is
    no tmpfs."""
    kind = filesystem_of(SHARED)
    if kind != "tmpfs":
        raise ValueError(f"an arena in {SHARED}: {kind}, but only a tmpfs is memory; mount one there")
    stat = os.statvfs(SHARED)
    free = stat.f_bavail * stat.f_frsize
    if stat.f_blocks and size_bytes > free:  # a tmpfs without a limit has no blocks
        raise ArenaError(
            errno.ENOSPC,
            f"offload.host_bytes={size_bytes}: {SHARED} has {free} bytes free of {stat.f_blocks * stat.f_frsize}. "
            f"Remove what is left in it, enlarge it (docker run --shm-size=..., mount -o remount,size=... {SHARED}), "
            f"or lower offload.host_bytes",
        )
    _check_memory(size_bytes)


def _check_memory(size_bytes: int) -> None:
    available = host_available_bytes()
    if size_bytes > available:
        raise ArenaError(
            errno.ENOMEM,
            f"offload.host_bytes={size_bytes}: this machine, or its container, has {available} bytes of memory "
            f"available; lower offload.host_bytes",
        )


def _take_pages(memory: mmap.mmap, pool: HostPool | None, before_linux_5_14: Callable[[], object]) -> None:
    """Make every page exist, [Note: pages are taken at the start]."""
    error = 0
    if pool is not None and pool.native:
        work = _Population(address_of(memory), len(memory), 0)
        pool.call("populate", work)
        error = int(work.error)
    else:
        try:
            memory.madvise(_MADV_POPULATE_WRITE)
        except OSError as refused:
            error = refused.errno or errno.EIO
    if error == errno.EINVAL:
        try:
            before_linux_5_14()
            error = 0
        except OSError as refused:
            error = refused.errno or errno.EIO
    if error:
        raise ArenaError(
            error,
            f"could not take {len(memory)} bytes of memory: {os.strerror(error)}; another process took "
            f"memory at the same time, or the container's limit is lower than it says. Lower offload.host_bytes",
        )


def _register(memory: mmap.mmap, device: torch.device) -> None:
    """Pin the slab for CUDA, once; copies from and to it then run at the link's speed beside everything else."""
    with torch.cuda.device(device):
        status = torch.cuda.cudart().cudaHostRegister(address_of(memory), len(memory), _PORTABLE)
    _cuda_check(status, "cudaHostRegister", len(memory))


def _cuda_check(status: Any, function: str, size_bytes: int) -> None:
    if int(status) == 0:
        return
    soft, hard = (
        "unlimited" if n == resource.RLIM_INFINITY else str(n) for n in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    )
    raise ArenaError(
        errno.ENOMEM,
        f"{function} of {size_bytes} bytes: CUDA error {int(status)} "
        f"({torch.cuda.cudart().cudaGetErrorString(status)}). Where the driver counts locked memory, its limit must "
        f"allow it (ulimit -l: {soft}, at most {hard}; docker run --ulimit memlock=-1); else lower offload.host_bytes",
    )
