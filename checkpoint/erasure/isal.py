"""ISA-L, Intel's storage library, by ctypes: it ships inside the wheel of pyeclib, or is the system's own libisal.

Calls pass plain addresses, so they work on any memory, shared memory too, without a copy; ctypes releases the GIL for
each call. The library picks the instructions (SSE to AVX-512 with GFNI, NEON, SVE) when it is first called.

[Note: alignment and order]
`xor_gen` and `pq_gen` load with aligned instructions: an address off by one is a crash, not an error. AVX-512 wants 64
bytes, `pq_gen` a length that is a multiple of 32. `ec_encode_data` takes any address and length. They write with
non-temporal stores, which are not ordered before later ordinary ones; taking the GIL back after the call is a locked
instruction, which drains them. So a commit record that Python writes afterwards is never seen before the parity.

Source: https://github.com/intel/isa-l, include/erasure_code.h, raid.h, crc.h.
"""

import ctypes
import ctypes.util
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from checkpoint.erasure import galois
from checkpoint.erasure.galois import Bytes

ALIGNMENT_BYTES = 64
LENGTH_MULTIPLE = 32
TABLE_BYTES = 32
"""Of one coefficient; the layout inside depends on the processor."""

_INT, _ADDRESS = ctypes.c_int, ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ec_init_tables": (None, [_INT, _INT, _ADDRESS, _ADDRESS]),
    "ec_encode_data": (None, [_INT, _INT, _INT, _ADDRESS, _ADDRESS, _ADDRESS]),
    "xor_gen": (_INT, [_INT, _INT, _ADDRESS]),
    "pq_gen": (_INT, [_INT, _INT, _ADDRESS]),
    "crc32_iscsi": (ctypes.c_uint32, [_ADDRESS, _INT, ctypes.c_uint32]),
}


@dataclass(frozen=True, kw_only=True)
class Isal:
    """The loaded library. Addresses are of arrays of addresses: sources first, then outputs."""

    library: ctypes.CDLL
    name: str
    """Version and where it was found."""

    def tables(self, matrix: Bytes) -> Bytes:
        """What `encode` wants for an (outputs, sources) matrix."""
        rows, columns = matrix.shape
        matrix = np.ascontiguousarray(matrix)
        tables = np.zeros(TABLE_BYTES * rows * columns, dtype=np.uint8)
        self.library.ec_init_tables(columns, rows, matrix.ctypes.data, tables.ctypes.data)
        return tables

    def encode(self, tables: Bytes, num_sources: int, num_outputs: int, size: int, addresses: int) -> None:
        """Any alignment, any size below 2 GiB."""
        outputs = addresses + 8 * num_sources
        self.library.ec_encode_data(size, num_sources, num_outputs, tables.ctypes.data, addresses, outputs)

    def xor(self, num_sources: int, size: int, addresses: int) -> None:
        """At least 2 sources, 1 output; see [Note: alignment and order]."""
        if self.library.xor_gen(num_sources + 1, size, addresses) != 0:
            raise RuntimeError(f"ISA-L's xor_gen refused {num_sources} sources of {size} bytes")

    def xor_and_q(self, num_sources: int, size: int, addresses: int) -> None:
        """Parities 0 and 1 of at least 2 sources; see [Note: alignment and order]."""
        if self.library.pq_gen(num_sources + 2, size, addresses) != 0:
            raise RuntimeError(f"ISA-L's pq_gen refused {num_sources} sources of {size} bytes")

    def crc32c(self, address: int, size: int, crc: int = 0) -> int:
        """CRC-32C of fewer than 2 GiB that follow what has the CRC `crc`."""
        found: int = self.library.crc32_iscsi(address, size, crc ^ 0xFFFFFFFF)
        return found ^ 0xFFFFFFFF


@functools.cache
def load() -> Isal | str:
    """The library, or why there is none. Before it is trusted it is held against the oracle, once a process."""
    problems = []
    for place, path in _candidates():
        try:
            library = ctypes.CDLL(path)
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            isal = Isal(library=library, name=f"ISA-L {_version(library)} ({place})")
        except (OSError, AttributeError) as error:
            problems.append(f"{path}: {error}")
            continue
        wrong = _self_check(isal)
        if not wrong:
            return isal
        problems.append(f"{path}: {wrong} differs from the oracle")
    return "; ".join(problems) or "neither the pyeclib wheel nor the system has libisal"


def _candidates() -> list[tuple[str, str]]:
    found = []
    spec = importlib.util.find_spec("pyeclib")  # finds it without importing it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        libraries = Path(folder).parent / "pyeclib.libs"
        found += [("pyeclib's wheel", str(path)) for path in sorted(libraries.glob("libisal*.so*"))]
    system = ctypes.util.find_library("isal")
    return [*found, ("the system's", system)] if system else found


def _version(library: ctypes.CDLL) -> str:
    try:
        function = library.isal_get_version_str
    except AttributeError:
        return "before 2.31"
    function.restype = ctypes.c_char_p
    return str(function().decode()).strip()


def _self_check(isal: Isal) -> str:
    """Name of the function that computes something else than the oracle; empty if none does."""
    k, m, size = 5, 3, 96
    pad = -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    rows = aligned_empty((k + m) * pad).reshape(k + m, pad)
    rows[:] = np.arange(rows.size, dtype=np.uint32).reshape(rows.shape) * 2654435761 >> 11 & 255
    addresses = (rows.ctypes.data + pad * np.arange(k + m)).astype(np.uint64)
    matrix, expected = galois.parity_matrix(k, m), np.empty((m, size), dtype=np.uint8)
    galois.combine(matrix, list(rows[:k, :size]), list(expected))
    data, tables = addresses.ctypes.data, isal.tables(matrix)
    calls: list[tuple[str, int, Callable[[], None]]] = [
        ("ec_encode_data", 3, lambda: isal.encode(tables, k, m, size, data)),
        ("pq_gen", 2, lambda: isal.xor_and_q(k, size, data)),
        ("xor_gen", 1, lambda: isal.xor(k, size, data)),
    ]
    for name, num_rows, call in calls:
        rows[k:] = 0
        call()
        if not np.array_equal(rows[k : k + num_rows, :size], expected[:num_rows]):
            return name
    content, address = rows.tobytes(), rows.ctypes.data
    found = isal.crc32c(address + 100, len(content) - 100, isal.crc32c(address, 100))
    return "" if found == google_crc32c.value(content) else "crc32_iscsi"


def aligned_empty(size: int, alignment: int = 4096) -> Bytes:
    """`size` uninitialized bytes that begin at a multiple of `alignment`."""
    buffer = np.empty(size + alignment, dtype=np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size]
