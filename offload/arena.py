"""One slab of shared memory a rank, which we cut ourselves.

An Arena is a file in /dev/shm (mode 0600, made with O_EXCL), mapped once, all of its pages taken at once, and
registered with CUDA once, so that copies from and to the GPU need no staging. Nothing is rounded to powers of two as
pinned allocators do: what is asked is what is used, but for the alignment (64 bytes by default).

[Note: who removes the file] Memory in /dev/shm outlives its process until its file is removed *and* nobody maps it.
 - ``Arena(size)`` has no name: its file is removed as soon as it is open, and whatever kills the process frees it.
 - ``Arena(size, path=...)`` is for memory that must outlive the process. `close` leaves the file: the one who gave the
   path (the snapshot process) removes it. Others map it by `Arena.open`.
 - If construction fails, the file is removed in either case.

[Note: pages are taken at the start] A page of a mapped file that is not there yet is made when it is first touched; if
/dev/shm or the container is full then, the kernel kills the process (SIGBUS, or the OOM killer). So limits are checked
first, with numbers, and every page is taken in the constructor: by MADV_POPULATE_WRITE, which many threads run at
once and which reports an error instead of killing (Linux 5.14), else by posix_fallocate.

[Note: arrays walked side by side] The CPU optimizer walks eight arrays at once. Where their addresses agree in the
lower bits, as they do when each begins a page, loads are taken to depend on stores to other arrays (only 12 bits are
compared) and all streams meet in the same banks of memory: a quarter of the bandwidth is lost (docs/host-state.md).
`take_together` therefore begins each of them 4736 bytes further, modulo 64 KiB.

Threads: `take` and `give` may be called from any. A tensor handed out keeps the mapping alive. After `give` the memory
goes to the next `take`: the caller has waited for every copy and every request on it.
"""

import ctypes
import errno
import logging
import mmap
import os
import resource
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.device import host_available_bytes
from offload.hostpool import HostPool
from offload.mounts import filesystem_of
from offload.space import Space, SpaceError, round_up

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


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where a tensor lies in an arena; another process makes the same tensor from it by `Arena.view`."""

    offset: int
    """Bytes from the start of the arena."""
    numel: int
    dtype: torch.dtype


class _Population(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("size_bytes", ctypes.c_int64), ("error", ctypes.c_int32)]


class Arena:
    """`size_bytes` of shared memory; see the module."""

    _device: torch.device | None = None

    def __init__(
        self,
        size_bytes: int,
        *,
        path: Path | None = None,
        register: torch.device | None = None,
        pool: HostPool | None = None,
    ) -> None:
        """path: a new file on a tmpfs, kept after `close`; None: no name. register: the CUDA device that will copy;
        None: no registration. pool: threads that take the pages; without it one thread does (0.9 s a GB).

        Raises ValueError for a size below one byte or a path not on a tmpfs, FileExistsError for a path that is
        there, and ArenaError where memory is not to be had.
        """
        if size_bytes < 1:
            raise ValueError(f"offload.host_bytes={size_bytes}: at least 1")
        self.size_bytes = round_up(size_bytes, PAGE)
        self.path = path
        folder = SHARED if path is None else path.parent
        check_capacity(self.size_bytes, folder)
        file = path or folder / f"atoll-{os.getpid()}-{secrets.token_hex(8)}"
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if path is None:
                file.unlink()
            os.ftruncate(handle, self.size_bytes)
            self._map(handle)
            _take_pages(self._memory, handle, pool, file)
            if register is not None:
                _register(self._memory, register)
        except BaseException:
            if path is not None:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)  # the mapping keeps the file
        self._device = register

    @classmethod
    def open(cls, path: Path, *, register: torch.device | None = None) -> "Arena":
        """Map the arena that another process made at `path`, with all that is in it. What it holds is told by
        Regions; `take` is for its maker alone and finds no space here."""
        self = cls.__new__(cls)
        self.path = path
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.size_bytes = os.fstat(handle).st_size
            self._map(handle)
        finally:
            os.close(handle)
        self._space = Space(0, align=ALIGN)
        if register is not None:
            _register(self._memory, register)
        self._device = register
        return self

    def _map(self, handle: int) -> None:
        self._memory = mmap.mmap(handle, self.size_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:  # of use where /dev/shm is mounted with huge=advise, and no harm elsewhere
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without them
                pass
        self._space = Space(self.size_bytes, align=ALIGN)
        self._lock = threading.Lock()
        self._closed = False
        self._address = address_of(self._memory)

    @property
    def used_bytes(self) -> int:
        """Bytes of regions in use, alignment included."""
        return self._space.taken_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that `used_bytes` ever was."""
        return self._space.peak_bytes

    def take(self, numel: int, dtype: torch.dtype, *, align: int = ALIGN) -> Tensor:
        """A 1-D tensor of `numel` elements, at an address that is a multiple of `align` (a multiple of 64 that
        divides the page size). What is in it is left from before; a fresh arena is zero.

        Raises ArenaError (ENOMEM) when no free range is long enough.
        """
        if numel < 1 or PAGE % align:
            raise ValueError(f"numel={numel}, align={align}: at least one element, align a divisor of {PAGE}")
        with self._lock:
            self._check_open()
            if not self._space.size_bytes:
                raise ValueError(f"the arena {self.path} was made by another process, which alone cuts it")
            try:
                offset = self._space.take(numel * dtype.itemsize, align)
            except SpaceError as error:
                raise ArenaError(
                    errno.ENOMEM,
                    f"the arena of host memory is full: {error}. Give it more by offload.host_bytes (now "
                    f"{self.size_bytes}), or move state to NVMe by offload=nvme",
                ) from error
        return self.view(Region(offset=offset, numel=numel, dtype=dtype))

    def take_together(self, numel: int, dtypes: Sequence[torch.dtype], *, align: int = ALIGN) -> list[Tensor]:
        """One tensor of `numel` elements for each of `dtypes`, for arrays that are walked side by side, such as the
        master weights, moments, gradients and weights of a unit; see [Note: arrays walked side by side].

        They are one region: the first begins at a multiple of `align`, and giving it back gives all.
        """
        offsets, size_bytes = layout(numel, dtypes)
        start = self.region_of(self.take(size_bytes, torch.uint8, align=align)).offset
        regions = (Region(offset=start + o, numel=numel, dtype=d) for o, d in zip(offsets, dtypes, strict=True))
        return [self.view(region) for region in regions]

    def give(self, tensor: Tensor) -> None:
        """Take back what `take` returned: that tensor, or a view that begins where it begins."""
        with self._lock:
            self._space.give(self.region_of(tensor).offset)

    def region_of(self, tensor: Tensor) -> Region:
        """Where in this arena a contiguous tensor lies. ValueError if it does not."""
        offset = tensor.data_ptr() - self._address
        if tensor.device.type != "cpu" or not 0 <= offset <= self.size_bytes - tensor.nbytes:
            raise ValueError(f"a tensor at {tensor.data_ptr():#x} on {tensor.device} is not of this arena")
        return Region(offset=offset, numel=tensor.numel(), dtype=tensor.dtype)

    def view(self, region: Region) -> Tensor:
        """The tensor of a region, a storage of its own: autograd counts its changes apart from its neighbours'."""
        self._check_open()
        return torch.frombuffer(self._memory, dtype=region.dtype, count=region.numel, offset=region.offset)

    def close(self) -> None:
        """End the registration with CUDA, after the device is idle. The memory goes back when the last tensor dies."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._device is not None:
                torch.cuda.synchronize(self._device)
                _cuda_check(torch.cuda.cudart().cudaHostUnregister(self._address), "cudaHostUnregister", 0)
            del self._memory  # not close(): that unmaps at once, although torch.frombuffer's tensors refer to it

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this Arena is closed")

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


def capacity_bytes(folder: Path = SHARED) -> int:
    """The largest slab that there is memory for now, in the tmpfs at `folder` and on the machine."""
    stat = os.statvfs(folder)
    available = host_available_bytes()
    return min(available, stat.f_bavail * stat.f_frsize) if stat.f_blocks else available


def check_capacity(size_bytes: int, folder: Path = SHARED) -> None:
    """ArenaError (ENOSPC, ENOMEM) unless a slab of `size_bytes` fits in the tmpfs at `folder` and in memory; ValueError
    if `folder` is no tmpfs."""
    kind = filesystem_of(folder)
    if kind != "tmpfs":
        raise ValueError(f"an arena at {folder}: {kind}, but only a tmpfs is memory; use a path in {SHARED}")
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if stat.f_blocks and size_bytes > free:  # a tmpfs without a limit has no blocks
        raise ArenaError(
            errno.ENOSPC,
            f"offload.host_bytes={size_bytes}: {folder} has {free} bytes free of {stat.f_blocks * stat.f_frsize}. "
            f"Remove what is left in it, enlarge it (docker run --shm-size=..., mount -o remount,size=... {folder}), "
            f"or lower offload.host_bytes",
        )
    available = host_available_bytes()
    if size_bytes > available:
        raise ArenaError(
            errno.ENOMEM,
            f"offload.host_bytes={size_bytes}: this machine, or its container, has {available} bytes of memory "
            f"available; lower offload.host_bytes",
        )


def _take_pages(memory: mmap.mmap, handle: int, pool: HostPool | None, file: Path) -> None:
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
    if error == errno.EINVAL:  # before Linux 5.14
        try:
            os.posix_fallocate(handle, 0, len(memory))
            error = 0
        except OSError as refused:
            error = refused.errno or errno.EIO
    if error:
        raise ArenaError(
            error,
            f"could not take {len(memory)} bytes of memory for {file}: {os.strerror(error)}; another process took "
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
