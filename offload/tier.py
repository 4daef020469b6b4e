"""What host memory and NVMe have in common: ranges of bytes that are stored and loaded.

[Note: order] Requests are answered in any order, but as if in the order in which they were made: a load of a range
sees the last store to it made before, and a store waits for the loads and stores of its range made before. From a
request until its answer its tensor belongs to the tier: a store's must not change, a load's must not be looked at.
"""

import threading
from concurrent.futures import Future
from typing import Protocol

from torch import Tensor

from offload.adamw import copy
from offload.hostpool import HostPool


class Tier(Protocol):
    """A place that keeps ``size_bytes`` bytes. Every method may be called from any thread."""

    size_bytes: int
    align: int
    """Offsets, sizes and addresses are multiples of it."""

    def store(self, offset: int, values: Tensor) -> Future[Tensor]:
        """Keep `values` (contiguous, on the CPU, any dtype) at bytes ``offset : offset + values.nbytes``.

        The answer is `values`, or the OSError that the store met. ValueError at once for a range outside or unaligned.
        What is hung on an answer (`add_done_callback`) may run on a thread of the tier and must not wait for it.
        """
        ...

    def load(self, offset: int, into: Tensor) -> Future[Tensor]:
        """Fill `into` (as `values` above) from the same bytes. Bytes never stored are zero."""
        ...

    def flush(self) -> None:
        """Wait until all that was asked is done; raise the first error of a store, its answer read or not."""
        ...

    def close(self) -> None:
        """`flush`, then let go of files and threads. A second time does nothing; other calls are ValueErrors then."""
        ...


def check_range(size_bytes: int, align: int, offset: int, tensor: Tensor) -> None:
    """ValueError unless `tensor` may be stored at, or loaded from, `offset` of a tier."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"a tensor on {tensor.device}, strides {tensor.stride()}: must be contiguous and on the CPU")
    if offset < 0 or not tensor.nbytes or offset + tensor.nbytes > size_bytes:
        raise ValueError(f"bytes {offset} to {offset + tensor.nbytes}: must be some of the tier's 0 to {size_bytes}")
    if offset % align or tensor.nbytes % align or tensor.data_ptr() % align:
        raise ValueError(
            f"offset {offset}, {tensor.nbytes} bytes at address {tensor.data_ptr():#x}: each must be a multiple of "
            f"{align}; take the tensor from an Arena with align={align}"
        )


class HostTier:
    """A tier in host memory: one region of an arena, copied past the caches by the threads of a pool.

    It answers before it returns. State that is used where it lies needs no tier; this one is for what comes and goes.
    """

    align = 1

    def __init__(self, memory: Tensor, pool: HostPool) -> None:
        """memory: 1-D uint8, as from ``arena.take``; it belongs to the tier until `close`."""
        self._memory, self._pool = memory, pool
        self.size_bytes = memory.nbytes
        self._lock = threading.Lock()
        self._closed = False

    def store(self, offset: int, values: Tensor) -> Future[Tensor]:
        self._check(offset, values)
        return self._copy(self._memory[offset : offset + values.nbytes], values, values)

    def load(self, offset: int, into: Tensor) -> Future[Tensor]:
        self._check(offset, into)
        return self._copy(into, self._memory[offset : offset + into.nbytes], into)

    def flush(self) -> None:
        self._check_open()

    def close(self) -> None:
        self._closed = True

    def _copy(self, into: Tensor, source: Tensor, answer: Tensor) -> Future[Tensor]:
        with self._lock:
            copy(into, source, pool=self._pool)
        done: Future[Tensor] = Future()
        done.set_result(answer)
        return done

    def _check(self, offset: int, tensor: Tensor) -> None:
        self._check_open()
        check_range(self.size_bytes, self.align, offset, tensor)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this HostTier is closed")
