"""The order in which sequences are visited: a keyed permutation that is computed, never stored.

[Note: the order of samples] Sample ``index`` lies in epoch ``index // size``, at position ``index % size`` of that
epoch's permutation of the ``size`` sequences. A balanced Feistel network permutes the integers below the next power of
four, whatever its round function; a value that lands at or above ``size`` is fed back until it lands below (cycle
walking), which leaves a permutation of exactly ``size`` values (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). So the order takes O(1) memory, any worker computes any part of it, and a resumed run needs
the index alone.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
MIN_HALF_BITS = 3  # fewer leave small permutations measurably uneven; more make the walk down to 2 values longer


def shuffled(indices: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """The sequences, in ``[0, size)``, at the global sample ``indices`` (1-D, not negative)."""
    epochs, positions = np.divmod(indices, size)
    sequences = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        sequences[here] = permuted(positions[here], size, seed, int(epoch))
    return sequences


def permuted(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The images of ``positions`` under the permutation of ``[0, size)`` that (seed, epoch) keys."""
    half_bits = max(MIN_HALF_BITS, (max(size - 1, 1).bit_length() + 1) // 2)
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(epoch,))
    keys = sequence.generate_state(ROUNDS, np.uint64).astype(np.uint64)
    values = _feistel(positions.astype(np.uint64), keys, half_bits)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], keys, half_bits)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); array products wrap modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
