"""GF(2^8) in numpy: the field, the code's matrix, and the arithmetic that every faster path is held against.

[Note: the matrix]
Elements are bytes, addition is XOR, multiplication is that of polynomials modulo x^8+x^4+x^3+x^2+1 (0x11d); 2
generates all 255 nonzero elements. Parity p of data d_0 … d_{k-1} is the sum over j of C[p,j]·d_j, with

    C[0,j] = 1            C[1,j] = 2^j            C[p,j] = 1 / (2^(p-1) + 2^-j)   for p >= 2

These are the rows of one Cauchy matrix 1/(x_p + y_j) with y_j = 2^-j and x_0 = infinity, x_1 = 0, x_p = 2^(p-1)
(row 0 scaled by x_0). All x and y differ as long as k + m <= 255, so every square submatrix is invertible and any k of
the k + m elements give the data back. Infinity and 0 are chosen because row 0 is then a plain XOR and rows 0 and 1 are
RAID-6's P and Q, for which there are faster kernels. A row does not depend on k or m: RS(k+1) is RS(k+2) without its
last parity.

Sources: I. S. Reed, G. Solomon, "Polynomial Codes over Certain Finite Fields", 1960; J. Blömer et al., "An XOR-Based
Erasure-Resilient Coding Scheme", ICSI TR-95-048, 1995 (Cauchy); H. P. Anvin, "The mathematics of RAID-6".
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

POLYNOMIAL = 0x11D
MAX_ELEMENTS = 255


def _powers() -> list[int]:
    powers = [1]
    while len(powers) < 255:
        doubled = powers[-1] << 1
        powers.append(doubled ^ POLYNOMIAL if doubled > 255 else doubled)
    return powers


_EXP = _powers()
_LOG = {power: exponent for exponent, power in enumerate(_EXP)}


def multiply(a: int, b: int) -> int:
    """In GF(2^8)."""
    return _EXP[(_LOG[a] + _LOG[b]) % 255] if a and b else 0


def inverse(a: int) -> int:
    """ZeroDivisionError for 0."""
    if a == 0:
        raise ZeroDivisionError("0 has no inverse in GF(2^8)")
    return _EXP[-_LOG[a] % 255]


MULTIPLES: Bytes = np.array([[multiply(a, b) for b in range(256)] for a in range(256)], dtype=np.uint8)
"""(256, 256): MULTIPLES[a][b] is a·b."""


def parity_matrix(k: int, m: int) -> Bytes:
    """(m, k), see [Note: the matrix]."""
    matrix = np.empty((m, k), dtype=np.uint8)
    for p in range(m):
        for j in range(k):
            y = _EXP[-j % 255]
            matrix[p, j] = 1 if p == 0 else inverse(y) if p == 1 else inverse(_EXP[p - 1] ^ y)
    return matrix


def matrix_product(a: Bytes, b: Bytes) -> Bytes:
    """(rows, inner) times (inner, columns)."""
    product: Bytes = np.bitwise_xor.reduce(MULTIPLES[a[:, :, None], b[None, :, :]], axis=1)
    return product


def invert(matrix: Bytes) -> Bytes:
    """Inverse of a square matrix, by Gauss and Jordan. ValueError where it is singular."""
    size = len(matrix)
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        pivots = np.flatnonzero(work[column:, column])
        if not len(pivots):
            raise ValueError("the matrix is singular over GF(2^8)")
        pivot = column + int(pivots[0])
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = MULTIPLES[inverse(int(work[column, column]))][work[column]]
        for row in range(size):
            if row != column and work[row, column]:
                work[row] ^= MULTIPLES[work[row, column]][work[column]]
    return work[:, size:].copy()


def combine(matrix: Bytes, sources: Sequence[Bytes], outputs: Sequence[Bytes]) -> None:
    """outputs[i][:] = the sum over j of matrix[i, j]·sources[j]; all of one length. The oracle, and the fallback."""
    for row, output in zip(matrix, outputs, strict=True):
        output[:] = 0
        for factor, source in zip(row, sources, strict=True):
            if factor:
                output ^= source if factor == 1 else MULTIPLES[factor][source]
