"""CRC-32C (Castagnoli), the checksum of every byte in a checkpoint.

By ISA-L where it is there: it frees the GIL meanwhile and makes 10 to 25 GB/s a core (docs/erasure.md). google_crc32c,
which holds the GIL, is the fallback, the oracle (`isal.load` holds one against the other), and what is called for short
content, where ctypes costs more than the work.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from checkpoint.erasure import isal

Bytes = NDArray[np.uint8]

_SLICE_BYTES = 4 << 20
"""Longest call that holds the GIL."""
_SHORT_BYTES = 4 << 10


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

    `threads` share the work, each nicer than the caller by `niceness`. Without ISA-L they do not help.
    """
    if not payload.flags.c_contiguous:
        raise ValueError("the payload must be contiguous")
    starts = range(0, len(payload), piece_bytes)
    library = isal.load()
    if not isinstance(library, isal.Isal):
        return [crc32c(payload[start : start + piece_bytes]) for start in starts]
    address, size = payload.ctypes.data, len(payload)
    share = -(-len(starts) // threads)

    def some(first: int) -> list[int]:
        mine = starts[first : first + share]
        return [library.crc32c(address + start, min(piece_bytes, size - start)) for start in mine]

    if len(starts) <= 1 or (threads == 1 and not niceness):
        return some(0)
    # On Linux niceness is a thread's own.
    with ThreadPoolExecutor(threads, initializer=os.nice, initargs=(niceness,)) as pool:
        return [crc for crcs in pool.map(some, range(0, len(starts), share)) for crc in crcs]


def idle_threads() -> int:
    """Of a node's cores, how many the background may take: a quarter, 2 to 4."""
    return max(2, min(4, (os.cpu_count() or 1) // 4))
