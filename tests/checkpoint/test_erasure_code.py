"""Any k of the k + m elements give the rest back, by every path the same bytes."""

import itertools
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.erasure import ReedSolomon, TooManyErasures, aligned_empty, galois, isal

_HAVE_ISAL = isinstance(isal.load(), isal.Isal)
_BACKENDS = ["numpy", pytest.param("isal", marks=pytest.mark.skipif(not _HAVE_ISAL, reason=str(isal.load())))]


def _arrays(sizes: list[int], seed: int = 0, misalign: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays = [aligned_empty(size + misalign)[misalign:] for size in sizes]
    for array in arrays:
        array[:] = generator.integers(0, 256, len(array), dtype=np.uint8)
    return arrays


def _slow_product(a: int, b: int) -> int:
    """From the definition: polynomials over GF(2) modulo 0x11d."""
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11D << (bit - 8)
    return product


def test_multiplication_is_that_of_polynomials():
    assert all(galois.multiply(a, b) == _slow_product(a, b) for a in range(256) for b in range(256))


def test_inverse_matrices_multiply_to_one():
    matrix = np.random.default_rng(3).integers(0, 256, (20, 20), dtype=np.uint8)
    identity = np.eye(20, dtype=np.uint8)
    assert np.array_equal(galois.matrix_product(matrix, galois.invert(matrix)), identity)
    matrix[7] = matrix[3]
    with pytest.raises(ValueError, match="singular"):
        galois.invert(matrix)


@pytest.mark.parametrize("k, m", [(k, n - k) for n in range(2, 13) for k in range(1, n)])
def test_every_pattern_of_erasures_can_be_solved(k: int, m: int):
    """Up to 12 elements: each way to keep k of them leaves an invertible matrix."""
    generator = np.concatenate([np.eye(k, dtype=np.uint8), galois.parity_matrix(k, m)])
    for kept in itertools.combinations(range(k + m), k):
        galois.invert(generator[list(kept)])


@pytest.mark.parametrize("k", [2, 3, 100, 128, 250, 253])
def test_the_widest_codes_have_no_singular_minor_of_two(k: int):
    """The ratio of any two rows differs from column to column: no x equals another, or a y."""
    matrix = galois.parity_matrix(k, 255 - k)
    assert matrix.all()
    inverses = np.array([galois.inverse(a) if a else 0 for a in range(256)], dtype=np.uint8)
    for row in range(1, len(matrix)):
        ratios = np.sort(galois.MULTIPLES[matrix[:row], inverses[matrix[row]]], axis=1)
        assert (np.diff(ratios.astype(int)) > 0).all()


@pytest.mark.parametrize("backend", _BACKENDS)
@pytest.mark.parametrize("k, m", [(1, 1), (2, 1), (1, 3), (4, 1), (4, 2), (8, 2), (5, 3), (3, 8)])
def test_all_losses_are_reconstructed(k: int, m: int, backend: str):
    code = ReedSolomon(k, m, backend=backend)
    size = 4096 + 160
    elements = _arrays([size] * (k + m), seed=k)
    code.encode(elements[:k], elements[k:])
    for count in range(1, m + 1):
        for lost in itertools.combinations(range(k + m), count):
            left = {number: array for number, array in enumerate(elements) if number not in lost}
            out = _arrays([size] * count, seed=9)
            code.reconstruct(left, lost, out)
            for number, array in zip(lost, out, strict=True):
                assert np.array_equal(array, elements[number]), (lost, number)


@pytest.mark.skipif(not _HAVE_ISAL, reason=str(isal.load()))
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_isal_makes_the_bytes_of_the_oracle(data: st.DataObject):
    """Any sizes, alignments and numbers of elements; ends that do not meet; then losses."""
    k, m = data.draw(st.integers(1, 9), "k"), data.draw(st.integers(1, 7), "m")
    size_of = st.one_of(st.integers(0, 200), st.sampled_from([4095, 4096, 4097, 8192, 40_000, 300_000]))
    sizes = data.draw(st.lists(size_of, min_size=k, max_size=k), "sizes")
    misalign = data.draw(st.sampled_from([0, 0, 0, 1, 32]), "misalign")
    padded = max(sizes) + data.draw(st.sampled_from([0, 0, 5, 4096]), "padding")
    elements = _arrays(sizes, misalign=misalign) + _arrays([padded] * m, seed=1, misalign=misalign)
    expected = _arrays([padded] * m, seed=2)
    ReedSolomon(k, m, backend="numpy").encode(elements[:k], expected)
    code = ReedSolomon(k, m, backend="isal")
    code.encode(elements[:k], elements[k:])
    for parity, oracle in zip(elements[k:], expected, strict=True):
        assert np.array_equal(parity, oracle)
    lost = data.draw(st.lists(st.integers(0, k + m - 1), max_size=m, unique=True), "lost")
    left = {number: array for number, array in enumerate(elements) if number not in lost}
    out = _arrays([len(elements[number]) for number in lost], seed=3, misalign=misalign)
    code.reconstruct(left, lost, out)
    for number, array in zip(lost, out, strict=True):
        assert np.array_equal(array, elements[number])


@pytest.mark.parametrize("backend", _BACKENDS)
def test_nothing_is_written_beyond_the_outputs(backend: str):
    """An output that ends before the others must not run on into what lies behind it."""
    code, size = ReedSolomon(3, 3, backend=backend), 9000
    elements = _arrays([size] * 6)
    code.encode(elements[:3], elements[3:])
    memory = aligned_empty(2 * 16384)
    memory[:] = 77
    out = [memory[:5000], memory[16384 : 16384 + size]]
    code.reconstruct({number: elements[number] for number in (1, 3, 4, 5)}, [0, 2], out)
    assert np.array_equal(out[0], elements[0][:5000]) and np.array_equal(out[1], elements[2])
    assert (memory[5000:16384] == 77).all() and (memory[16384 + size :] == 77).all()


def test_parities_do_not_depend_on_how_many_there_are():
    data = _arrays([5000] * 6)
    most = _arrays([5000] * 4, seed=1)
    ReedSolomon(6, 4).encode(data, most)
    assert np.array_equal(most[0], np.bitwise_xor.reduce(data))
    for m in (1, 2, 3):
        fewer = _arrays([5000] * m, seed=2)
        ReedSolomon(6, m).encode(data, fewer)
        assert all(np.array_equal(one, other) for one, other in zip(fewer, most, strict=False))


@pytest.mark.parametrize("k, m", [(254, 1), (250, 5), (1, 254)])
def test_the_largest_codes(k: int, m: int):
    elements = _arrays([100] * 255)
    code = ReedSolomon(k, m)
    code.encode(elements[:k], elements[k:])
    lost = list(range(m)) if k >= m else list(range(254))
    left = {number: array for number, array in enumerate(elements) if number not in lost}
    out = _arrays([100] * len(lost), seed=1)
    code.reconstruct(left, lost, out)
    assert all(np.array_equal(array, elements[number]) for number, array in zip(lost, out, strict=True))


def test_more_losses_than_parity_are_refused_before_anything_is_written():
    elements, out = _arrays([100] * 4), _arrays([100] * 3, seed=1)
    before = [array.copy() for array in out]
    with pytest.raises(TooManyErasures, match=r"lost elements \[0, 1, 5\]: at most 2"):
        ReedSolomon(4, 2).reconstruct(dict(zip((2, 3, 4), elements[:3], strict=True)), [0, 1, 5], out)
    assert all(np.array_equal(one, other) for one, other in zip(out, before, strict=True))


@pytest.mark.parametrize("k, m", [(0, 1), (1, -1), (200, 56)])
def test_impossible_codes_are_refused(k: int, m: int):
    with pytest.raises(ValueError, match=rf"RS\({k}\+{m}\).*checkpoint.parity"):
        ReedSolomon(k, m)


def test_bad_buffers_are_refused():
    code, data = ReedSolomon(2, 1), _arrays([64, 64])
    with pytest.raises(ValueError, match="overlaps"):
        code.encode(data, [data[0]])
    with pytest.raises(ValueError, match=r"parities of \[63\] bytes.*at least 64"):
        code.encode(data, _arrays([63]))
    with pytest.raises(ValueError, match="must be uint8, 1-D, contiguous"):
        code.encode(data, [np.zeros(64, dtype=np.int8)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="must be uint8, 1-D, contiguous"):
        code.encode(data, [np.zeros(128, dtype=np.uint8)[::2]])
    with pytest.raises(ValueError, match="every parity must be as long"):
        code.reconstruct({1: data[1], 2: _arrays([63])[0]}, [0], _arrays([64]))
    with pytest.raises(ValueError, match="distinct, 0 to 2"):
        code.reconstruct({0: data[0], 1: data[1]}, [1], _arrays([64]))


@pytest.mark.skipif(not _HAVE_ISAL, reason=str(isal.load()))
def test_unaligned_buffers_are_slower_and_said_so(caplog: pytest.LogCaptureFixture):
    code, data = ReedSolomon(3, 2), _arrays([4096] * 3, misalign=1)
    parity = _arrays([4096] * 2, misalign=1)
    with caplog.at_level(logging.WARNING):
        code.encode(data, parity)
        code.encode(data, parity)
    assert [record.message for record in caplog.records] == ["erasure code: buffers not aligned to 64 bytes are slower"]
    assert np.array_equal(parity[0], np.bitwise_xor.reduce(data))


def test_without_isal_numpy_is_used_and_says_why():
    """In an interpreter that finds no libisal at all."""
    program = """
import ctypes.util, importlib.util, logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pyeclib" else find(name, *rest)
ctypes.util.find_library = lambda name: None
from checkpoint.erasure import ReedSolomon
print(ReedSolomon(4, 2).backend)
try:
    ReedSolomon(4, 2, backend="isal")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=os.getcwd())
    why = "neither the pyeclib wheel nor the system has libisal"
    assert done.stdout.splitlines() == [
        f"erasure code by numpy, 50 to 100 times slower: {why}; install pyeclib",
        f"numpy: {why}",
        f"ISA-L cannot be used: {why}; install pyeclib",
    ], done.stderr
