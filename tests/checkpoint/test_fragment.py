"""A fragment is what was sealed, or it is an erasure."""

import os
import signal

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import crc
from checkpoint.crc import crc32c, piece_crcs
from checkpoint.erasure import aligned_empty, isal
from checkpoint.snapshots.fragment import FORMAT, FragmentDamaged, FragmentHeader, FragmentId
from offload import hostpool

_ID = FragmentId(run=bytes(range(16)), k=4, m=2, element=1, group=3, stripe=5, step=2**40, version=2**33)
_PIECE, _SIZE = 4096, 5 * 4096 + 100


def _payload(seed: int = 0, size: int = _SIZE) -> np.ndarray:
    payload = aligned_empty(size)
    payload[:] = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return payload


def _header(payload: np.ndarray) -> FragmentHeader:
    crcs = tuple(piece_crcs(payload, _PIECE))
    return FragmentHeader(id=_ID, payload_bytes=len(payload), piece_bytes=_PIECE, crcs=crcs)


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 10_000])
def test_a_header_survives_its_bytes(size: int):
    header = _header(_payload(size=size))
    assert FragmentHeader.loads(header.dumps()) == header
    assert len(header.crcs) == -(-size // 4096)


def test_every_flipped_bit_of_a_header_is_found():
    content = _header(_payload()).dumps()
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            with pytest.raises(FragmentDamaged):
                FragmentHeader.loads(bytes(damaged))


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_noise_is_no_header(content: bytes):
    with pytest.raises(FragmentDamaged):
        FragmentHeader.loads(content)


def test_a_header_that_vouches_for_nonsense_is_refused():
    """Its CRC is right, as a stranger's could be; its numbers are not."""
    body = _header(_payload()).dumps()[:-4]
    for offset, value in (
        (8, FORMAT + 1),
        (28, 254),
        (32, 6),
        (58, 0xFFFF),
        (66, 0),
    ):  # format, k, element, payload, piece
        damaged = bytearray(body)
        damaged[offset : offset + 2] = value.to_bytes(2, "little")
        with pytest.raises(FragmentDamaged):
            FragmentHeader.loads(bytes(damaged) + crc32c(bytes(damaged)).to_bytes(4, "little"))


@pytest.mark.parametrize("position", [0, 4095, 4096, 3 * 4096 + 7, _SIZE - 1])
def test_a_flipped_bit_is_located_to_its_piece(position: int):
    payload = _payload()
    header = _header(payload)
    assert header.bad_pieces(payload) == []
    payload[position] ^= 1
    assert header.bad_pieces(payload) == [position // _PIECE]


def test_a_payload_of_another_size_is_refused():
    header = _header(_payload())
    with pytest.raises(FragmentDamaged, match="were sealed"):
        header.bad_pieces(_payload()[:-1])


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("size", [0, 1, 4096, 9 * 4096, 9 * 4096 + 5, 4097])
def test_checksums_are_those_of_google_crc32c(size: int, threads: int):
    payload = _payload(size=size)
    expected = [google_crc32c.value(payload[start : start + 4096].tobytes()) for start in range(0, size, 4096)]
    assert piece_crcs(payload, 4096, threads) == piece_crcs(payload, 4096, threads, niceness=5) == expected
    whole = payload.tobytes()
    for cut in (0, 1, 5000, 3 * 4096):
        assert crc32c(whole[:cut], payload[cut:]) == google_crc32c.value(whole)


@pytest.mark.parametrize("native", ["c", "no c", "no isal"])
@settings(deadline=None)
@given(draw=st.data())
def test_what_is_copied_is_checked_as_it_passes(native: str, draw: st.DataObject):
    """Copies of any length at any place, in any order, with bytes between them that were there before."""
    gaps = draw.draw(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 40_000)), max_size=8))
    payload = _payload(size=sum(gap + length for gap, length in gaps) + draw.draw(st.integers(0, 9000)))
    expected, copies, end = payload.copy(), [], 0
    for gap, length in gaps:
        source = np.random.default_rng(end).integers(0, 256, length, dtype=np.uint8)
        part = slice(end + gap, end + gap + length)
        expected[part], end = source, part.stop
        copies.append((payload[part], source))
    order = draw.draw(st.permutations(copies))
    with pytest.MonkeyPatch.context() as patched:
        if native == "no c":
            patched.setattr(hostpool, "_library", lambda: None)
            patched.setattr(crc, "_pool", crc._pool.__wrapped__)
        if native == "no isal":
            patched.setattr(isal, "load", lambda: "not there")
        found = crc.copied_crcs(payload, order, 4096, 2, 5)
    assert np.array_equal(payload, expected)
    assert found == [google_crc32c.value(expected[at : at + 4096].tobytes()) for at in range(0, len(expected), 4096)]


def test_a_fork_makes_checksums_with_threads_of_its_own():
    payload = _payload()
    expected = piece_crcs(payload, 4096, threads=2)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        os._exit(7 if piece_crcs(payload, 4096, threads=2) == expected else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_without_isal_the_checksums_are_the_same(monkeypatch: pytest.MonkeyPatch):
    payload = _payload()
    expected = piece_crcs(payload, 4096, threads=2)
    monkeypatch.setattr(isal, "load", lambda: "not there")
    assert piece_crcs(payload, 4096, threads=2) == expected
