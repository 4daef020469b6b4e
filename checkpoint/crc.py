"""CRC-32C (Castagnoli), the checksum of every byte in a checkpoint.

By ISA-L where it is there: it frees the GIL meanwhile and makes 20 GB/s a core (docs/erasure.md). google_crc32c,
which holds the GIL, is the fallback, the oracle (`isal.load` holds one against the other), and what is called for short
content, where ctypes costs more than the work.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from checkpoint.erasure import isal
from offload.hostpool import HostPool

Bytes = NDArray[np.uint8]

_SLICE_BYTES = 4 << 20
"""Longest call that holds the GIL."""
_SHORT_BYTES = 4 << 10
_PART_BYTES = 16 << 20
"""Copied by a thread at a time."""


def crc32c(*parts: bytes | Bytes) -> int:
    """CRC-32C of the concatenation of `parts`; arrays are contiguous."""
    crc, library = 0, isal.load()
    for part in parts:
        if isinstance(library, isal.Isal) and len(part) > _SHORT_BYTES:
            array = np.frombuffer(part, dtype=np.uint8)
            for start in range(0, len(array), 1 << 30):
                crc = library.crc32c(array.ctypes.data + start, min(1 << 30, len(array) - start), crc)
        else:
            for start in range(0, len(part), _SLICE_BYTES):
                crc = google_crc32c.extend(crc, part[start : start + _SLICE_BYTES])
    return crc


def piece_crcs(payload: Bytes, piece_bytes: int, threads: int = 1, niceness: int = 0) -> list[int]:
    """CRC-32C of each `piece_bytes` of `payload`, contiguous.

    `threads` share the work, each nicer than the caller by `niceness`: threads in C, which leave the GIL to others
    (`_in_c`), or Python's where no C can be built. Without ISA-L they do not help.
    """
    if not payload.flags.c_contiguous:
        raise ValueError("the payload must be contiguous")
    library = isal.load()
    if not isinstance(library, isal.Isal):
        return [crc32c(payload[start : start + piece_bytes]) for start in range(0, len(payload), piece_bytes)]
    if len(payload) <= piece_bytes or (threads == 1 and not niceness):
        return _some(library, payload, piece_bytes)
    pool = _pool(threads, niceness, os.getpid())
    if pool.native:
        return _in_c(pool, library, payload, piece_bytes)
    return _in_python(library, payload, piece_bytes, threads, niceness)


def copied_crcs(
    payload: Bytes, copies: Sequence[tuple[Bytes, Bytes]], piece_bytes: int, threads: int, niceness: int
) -> list[int]:
    """`piece_crcs`, once each of `copies` is there: where to, a part of `payload`, and what, as long; both contiguous,
    the parts apart. In C what is copied is checked as it passes, so that it is read from memory once."""
    pool, library = _pool(threads, niceness, os.getpid()), isal.load()
    if pool.native and isinstance(library, isal.Isal):
        return _in_c(pool, library, payload, piece_bytes, copies)
    copy_arrays(copies, threads)
    return piece_crcs(payload, piece_bytes, threads, niceness)


def copy_arrays(copies: Sequence[tuple[Bytes, Bytes]], threads: int) -> None:
    """Where to, and what. By numpy: it frees the GIL, and does not start torch's threads on a second set of cores."""
    parts = [
        (target[start : start + _PART_BYTES], source[start : start + _PART_BYTES])
        for target, source in copies
        for start in range(0, len(target), _PART_BYTES)
    ]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda part: np.copyto(*part), parts):
            pass


def _some(library: isal.Isal, payload: Bytes, piece_bytes: int) -> list[int]:
    address, size = payload.ctypes.data, len(payload)
    return [library.crc32c(address + at, min(piece_bytes, size - at)) for at in range(0, size, piece_bytes)]


class _Checking(ctypes.Structure):
    """As in `offload/native/kernels.c`."""

    _fields_ = [
        ("function", ctypes.c_void_p), ("start", ctypes.c_void_p),
        ("size_bytes", ctypes.c_int64), ("piece_bytes", ctypes.c_int64),
        ("copies", ctypes.c_void_p), ("num_copies", ctypes.c_int64),
        ("crcs", ctypes.c_void_p),
    ]  # fmt: skip


def _in_c(
    pool: HostPool, library: isal.Isal, payload: Bytes, piece_bytes: int, copies: Sequence[tuple[Bytes, Bytes]] = ()
) -> list[int]:
    """One call for all pieces. A call for each takes the GIL for each, 10 us or more of it a MiB: from several threads
    at once that is all there is of it, and a thread that launches kernels waits."""
    crcs = np.empty(-(-len(payload) // piece_bytes), dtype=np.uint32)
    function = ctypes.cast(library.library.crc32_iscsi, ctypes.c_void_p)
    spans = sorted((into.ctypes.data, source.ctypes.data, len(into)) for into, source in copies)
    table = np.array(spans, dtype=np.int64)
    arguments = (payload.ctypes.data, len(payload), piece_bytes, table.ctypes.data, len(spans), crcs.ctypes.data)
    pool.call("checksums", _Checking(function, *arguments))
    found: list[int] = crcs.tolist()
    return found


def _in_python(library: isal.Isal, payload: Bytes, piece_bytes: int, threads: int, niceness: int) -> list[int]:
    share = -(-len(payload) // piece_bytes // threads) * piece_bytes
    parts = [payload[start : start + share] for start in range(0, len(payload), share)]
    # On Linux niceness is a thread's own.
    with ThreadPoolExecutor(threads, initializer=os.nice, initargs=(niceness,)) as pool:
        return [crc for crcs in pool.map(lambda part: _some(library, part, piece_bytes), parts) for crc in crcs]


@functools.cache
def _pool(threads: int, niceness: int, process: int) -> HostPool:
    """Of this process, kept: it sleeps while there is nothing to check, and does not survive a fork."""
    return HostPool(threads, niceness=niceness)


def idle_threads() -> int:
    """Of a node's cores, how many the background may take: a quarter, 2 to 4."""
    return max(2, min(4, len(os.sched_getaffinity(0)) // 4))
