"""Reed-Solomon over GF(2^8): k data elements, m parity elements, any k of the k + m give back the rest.

Elements are numbered 0 … k-1 (data) and k … k+m-1 (parity). Arrays are 1-D uint8, of any size:

[Note: the padding rule]
The parities all have the same size L, that of the longest data element or more. A data element that is shorter
counts as if zeros followed up to L; they are neither stored nor read. Whoever reconstructs knows each element's size.

Nothing here allocates in proportion to the data, and with ISA-L the GIL is free during the work. The same bytes come
out of every path: XOR for one parity, P+Q for two, the general product for more, for bad alignment and for ragged
ends, and numpy.

Source: see checkpoint/erasure/galois.py, [Note: the matrix].
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from checkpoint.erasure import galois, isal
from checkpoint.erasure.galois import MAX_ELEMENTS, Bytes
from checkpoint.erasure.isal import Isal

_log = logging.getLogger(__name__)

_PAGE = 4096
_ROWS_A_PASS = 6
"""Outputs that ISA-L computes in one pass over the sources (AVX2 and AVX-512)."""
_ONE_PASS_BYTES = 4 << 20
_MANY_PASSES_BYTES = 32 << 10
"""Of each element in one call. Where there are several passes, the sources should stay in the L2 cache for the next."""
_NUMPY_BYTES = 256 << 10


class TooManyErasures(ValueError):
    """Fewer than k elements are left. Raised before anything is written."""


@dataclass(frozen=True)
class _Plan:
    """A product to compute: which rows, how, in which blocks."""

    matrix: Bytes
    kind: str
    """``xor``, ``pq`` or ``general``."""
    tables: Bytes | None
    """ISA-L's, None for numpy."""
    block_bytes: int


class ReedSolomon:
    """RS(k + m). Safe to use from several threads.

    `backend`: ``auto`` takes ISA-L and falls back to numpy with a warning, ``isal`` raises RuntimeError where it is not
    there, ``numpy`` is the oracle (50 to 100 times slower).
    """

    def __init__(self, k: int, m: int, *, backend: str = "auto") -> None:
        if k < 1 or m < 0 or k + m > MAX_ELEMENTS:
            raise ValueError(
                f"RS({k}+{m}): at least 1 data element, 0 parities and at most {MAX_ELEMENTS} elements in all; "
                "set checkpoint.parity and the group size accordingly"
            )
        if backend not in ("auto", "isal", "numpy"):
            raise ValueError(f"backend={backend!r}: must be auto, isal or numpy")
        self.k, self.m = k, m
        self._isal, self.backend = _choose(backend)
        self._generator = np.concatenate([np.eye(k, dtype=np.uint8), galois.parity_matrix(k, m)])
        self._plan = lru_cache(maxsize=256)(self._make_plan)
        self._zeros, self._waste = isal.aligned_empty(_ONE_PASS_BYTES), isal.aligned_empty(_ONE_PASS_BYTES)
        self._zeros[:] = 0
        self._warned = False

    backend: str
    """What computes, and why, for logs: ``ISA-L 2.31.1 (pyeclib's wheel)``, ``numpy: …``."""

    def encode(self, data: Sequence[Bytes], parity: Sequence[Bytes]) -> None:
        """Fill the m arrays of `parity` from the k of `data`; see [Note: the padding rule] for sizes."""
        if len(data) != self.k or len(parity) != self.m:
            raise ValueError(f"RS({self.k}+{self.m}) got {len(data)} data and {len(parity)} parity arrays")
        self._check({"data": data, "parity": parity})
        sizes = {len(array) for array in parity}
        longest = max(len(array) for array in data)
        if len(sizes) > 1 or min(sizes, default=longest) < longest:
            raise ValueError(f"parities of {sorted(sizes)} bytes: all must have one size, at least {longest}")
        if parity:
            have = tuple(range(self.k))
            self._run(self._plan(have, tuple(range(self.k, self.k + self.m))), data, parity, len(parity[0]))

    def reconstruct(self, fragments: Mapping[int, Bytes], wanted: Sequence[int], out: Sequence[Bytes]) -> None:
        """Fill `out[i]` with element `wanted[i]`, from any k or more of the other elements in `fragments`, by number.

        `out[i]` may be shorter than its element: then it gets the beginning. Raises TooManyErasures.
        """
        known, numbers = set(fragments), [*fragments, *wanted]
        if any(not 0 <= number < self.k + self.m for number in numbers) or known & set(wanted):
            raise ValueError(f"elements {sorted(known)}, wanted {list(wanted)}: distinct, 0 to {self.k + self.m - 1}")
        if len(wanted) != len(out) or len(set(wanted)) != len(wanted):
            raise ValueError(f"wanted {list(wanted)}, into {len(out)} arrays: one array for each, none twice")
        if len(known) < self.k:
            lost = sorted(set(range(self.k + self.m)) - known)
            raise TooManyErasures(f"RS({self.k}+{self.m}) has lost elements {lost}: at most {self.m} may be lost")
        self._check({"fragment": list(fragments.values()), "out": out})
        size = max(len(array) for array in [*fragments.values(), *out])
        if any(number >= self.k and len(fragments[number]) != size for number in fragments):
            raise ValueError(f"every parity must be as long as the longest element, {size} bytes")
        if wanted:
            # The lowest: data before parity, and parity 0 first, so that one lost data element is a plain XOR.
            have = tuple(sorted(known)[: self.k])
            self._run(self._plan(have, tuple(wanted)), [fragments[number] for number in have], out, size)

    def _make_plan(self, have: tuple[int, ...], wanted: tuple[int, ...]) -> _Plan:
        matrix = self._generator[list(wanted)]
        if have != tuple(range(self.k)):
            matrix = galois.matrix_product(matrix, galois.invert(self._generator[list(have)]))
        if self._isal is None:
            return _Plan(matrix, "general", None, _NUMPY_BYTES)
        rows, kind = len(matrix), "general"
        if rows <= 2 <= self.k and np.array_equal(matrix, galois.parity_matrix(self.k, rows)):
            kind = "xor" if rows == 1 else "pq"
        block = _ONE_PASS_BYTES if rows <= _ROWS_A_PASS else _MANY_PASSES_BYTES
        return _Plan(matrix, kind, self._isal.tables(matrix), block)

    def _run(self, plan: _Plan, sources: Sequence[Bytes], outputs: Sequence[Bytes], size: int) -> None:
        arrays = [*sources, *outputs]
        aligned = all(array.ctypes.data % isal.ALIGNMENT_BYTES == 0 for array in arrays)
        if not aligned and plan.kind != "general" and not self._warned:
            self._warned = True  # correct all the same, by ec_encode_data
            _log.warning("erasure code: buffers not aligned to %d bytes are slower", isal.ALIGNMENT_BYTES)
        blocks = _blocks([len(array) for array in arrays], size, plan.block_bytes)
        self._work(plan, sources, outputs, blocks, aligned)

    def _work(
        self,
        plan: _Plan,
        sources: Sequence[Bytes],
        outputs: Sequence[Bytes],
        blocks: Sequence[tuple[int, int]],
        aligned: bool,
    ) -> None:
        if self._isal is None:
            for start, stop in blocks:
                parts = [_part(source, self._zeros, start, stop) for source in sources]
                combined = [_part(output, np.empty(stop - start, np.uint8), start, stop) for output in outputs]
                galois.combine(plan.matrix, parts, combined)
            return
        assert plan.tables is not None
        bases = _addresses([*sources, *outputs])
        ends = np.array([len(array) for array in [*sources, *outputs]])
        ended = _addresses([self._zeros] * len(sources) + [self._waste] * len(outputs))
        addresses = np.empty_like(bases)
        for start, stop in blocks:
            np.add(bases, np.uint64(start), out=addresses)
            np.copyto(addresses, ended, where=ends <= start)
            fast = aligned and start % _PAGE == 0 and (stop - start) % isal.LENGTH_MULTIPLE == 0
            kind = plan.kind if fast else "general"
            if kind == "xor":
                self._isal.xor(len(sources), stop - start, addresses.ctypes.data)
            elif kind == "pq":
                self._isal.xor_and_q(len(sources), stop - start, addresses.ctypes.data)
            else:
                count = len(sources), len(outputs)
                self._isal.encode(plan.tables, *count, stop - start, addresses.ctypes.data)

    @staticmethod
    def _check(groups: Mapping[str, Sequence[Bytes]]) -> None:
        for what, arrays in groups.items():
            for array in arrays:
                if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
                    raise ValueError(f"{what}: {array.dtype}, shape {array.shape}: must be uint8, 1-D, contiguous")
        sources, outputs = groups.values()
        for number, output in enumerate(outputs):
            if not output.flags.writeable:
                raise ValueError(f"output {number} cannot be written")
            # Both are contiguous ranges, for which bounds are exact.
            if any(np.may_share_memory(output, other) for other in [*sources, *outputs[:number]]):
                raise ValueError(f"output {number} overlaps another array")


def _choose(backend: str) -> tuple[Isal | None, str]:
    if backend == "numpy":
        return None, "numpy: asked for"
    loaded = isal.load()
    if isinstance(loaded, Isal):
        return loaded, loaded.name
    if backend == "isal":
        raise RuntimeError(f"ISA-L cannot be used: {loaded}; install pyeclib")
    _log.warning("erasure code by numpy, 50 to 100 times slower: %s; install pyeclib", loaded)
    return None, f"numpy: {loaded}"


def _blocks(lengths: Sequence[int], size: int, block_bytes: int) -> list[tuple[int, int]]:
    """Cut 0:size so that within a block no array ends, and nearly all blocks begin and end on pages."""
    cuts = {0, size}
    for length in {*lengths, size}:
        cuts |= {min(cut, size) for cut in (length // _PAGE * _PAGE, length, -(-length // _PAGE) * _PAGE)}
    edges = sorted(cuts)
    return [
        (start, min(start + block_bytes, after))
        for before, after in zip(edges, edges[1:], strict=False)
        for start in range(before, after, block_bytes)
    ]


def _addresses(arrays: Sequence[Bytes]) -> NDArray[np.uint64]:
    return np.array([array.ctypes.data for array in arrays], dtype=np.uint64)


def _part(array: Bytes, instead: Bytes, start: int, stop: int) -> Bytes:
    return array[start:stop] if len(array) > start else instead[: stop - start]
