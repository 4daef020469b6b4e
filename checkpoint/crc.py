"""CRC-32C (Castagnoli), the checksum of every byte in a checkpoint."""

import google_crc32c
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_SLICE_BYTES = 4 << 20


def crc32c(*parts: bytes | Bytes) -> int:
    """CRC-32C of the concatenation of `parts`."""
    crc = 0
    for part in parts:
        # google_crc32c holds the GIL (10 GB/s and more): in slices, so that the training thread is not kept waiting.
        for start in range(0, len(part), _SLICE_BYTES):
            crc = google_crc32c.extend(crc, part[start : start + _SLICE_BYTES])
    return crc
