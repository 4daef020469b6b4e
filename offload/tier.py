"""What a tier below host memory is: ranges of bytes that are stored and loaded.

[Note: order] Requests are answered in any order, but as if in the order in which they were made: a load of a range
sees the last store to it made before, and a store waits for the loads and stores of its range made before. From a
request until its answer its tensor belongs to the tier: a store's must not change, a load's must not be looked at.
"""

from concurrent.futures import Future
from typing import Protocol

from torch import Tensor


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
