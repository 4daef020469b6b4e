"""A fragment is what was sealed, or it is an erasure; and a stripe is repaired piece by piece."""

import dataclasses

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.crc import crc32c, piece_crcs
from checkpoint.erasure import ReedSolomon, TooManyErasures, aligned_empty, isal
from checkpoint.erasure.repair import Fragment, repair_stripe
from checkpoint.fragment import FragmentDamaged, FragmentHeader, FragmentId, seal

_ID = FragmentId(run=bytes(range(16)), k=4, m=2, element=1, group=3, stripe=5, step=2**40, version=2**33)
_PIECE, _SIZE = 4096, 5 * 4096 + 100


def _payload(seed: int = 0, size: int = _SIZE) -> np.ndarray:
    payload = aligned_empty(size)
    payload[:] = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return payload


def _stripe(k: int = 4, m: int = 2) -> tuple[ReedSolomon, dict[int, Fragment]]:
    code, payloads = ReedSolomon(k, m), [_payload(seed) for seed in range(k + m)]
    code.encode(payloads[:k], payloads[k:])
    ids = [dataclasses.replace(_ID, k=k, m=m, element=number) for number in range(k + m)]
    headers = [seal(id_, payload, piece_bytes=_PIECE) for id_, payload in zip(ids, payloads, strict=True)]
    return code, {number: Fragment(*both) for number, both in enumerate(zip(headers, payloads, strict=True))}


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 10_000])
def test_a_header_survives_its_bytes(size: int):
    header = seal(_ID, _payload(size=size), piece_bytes=4096)
    assert FragmentHeader.loads(header.dumps()) == header
    assert len(header.crcs) == -(-size // 4096)


def test_every_flipped_bit_of_a_header_is_found():
    content = seal(_ID, _payload(), piece_bytes=_PIECE).dumps()
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
    body = seal(_ID, _payload(), piece_bytes=_PIECE).dumps()[:-4]
    for offset, value in ((8, 2), (28, 254), (32, 6), (58, 0xFFFF), (66, 0)):  # format, k, element, payload, piece
        damaged = bytearray(body)
        damaged[offset : offset + 2] = value.to_bytes(2, "little")
        with pytest.raises(FragmentDamaged):
            FragmentHeader.loads(bytes(damaged) + crc32c(bytes(damaged)).to_bytes(4, "little"))


@pytest.mark.parametrize("position", [0, 4095, 4096, 3 * 4096 + 7, _SIZE - 1])
def test_a_flipped_bit_is_located_to_its_piece(position: int):
    payload = _payload()
    header = seal(_ID, payload, piece_bytes=_PIECE)
    assert header.bad_pieces(payload) == []
    payload[position] ^= 1
    assert header.bad_pieces(payload) == [position // _PIECE]
    with pytest.raises(FragmentDamaged, match=rf"wrong CRC-32C in pieces \[{position // _PIECE}\] of 6"):
        header.check(payload)


def test_a_payload_of_another_size_is_refused():
    header = seal(_ID, _payload(), piece_bytes=_PIECE)
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


def test_without_isal_the_checksums_are_the_same(monkeypatch: pytest.MonkeyPatch):
    payload = _payload()
    expected = piece_crcs(payload, 4096, threads=2)
    monkeypatch.setattr(isal, "load", lambda: "not there")
    assert piece_crcs(payload, 4096, threads=2) == expected


def test_bad_pieces_in_every_fragment_are_repaired_in_place():
    code, fragments = _stripe()
    good = {number: fragment.payload.copy() for number, fragment in fragments.items()}
    hits = {0: [0, 5], 1: [0], 2: [1], 3: [1], 4: [2], 5: [5]}  # never more than two in one place
    for number, pieces in hits.items():
        for piece in pieces:
            fragments[number].payload[piece * _PIECE + 11] ^= 0x40
    assert repair_stripe(code, fragments) == hits
    assert all(np.array_equal(fragments[number].payload, good[number]) for number in good)


def test_a_lost_fragment_is_made_although_another_is_damaged():
    code, fragments = _stripe()
    lost = fragments.pop(2)
    fragments[5].payload[4096] ^= 1
    out = _payload(seed=99)
    assert repair_stripe(code, fragments, [2], [out], expected={2: lost.header}) == {5: [1]}
    assert np.array_equal(out, lost.payload)


def test_too_much_damage_in_one_place_says_where():
    code, fragments = _stripe()
    for number in (0, 3, 4):
        fragments[number].payload[3 * _PIECE] ^= 1
    with pytest.raises(TooManyErasures, match=r"pieces 3 to 3: .*lost elements \[0, 3, 4\]: at most 2"):
        repair_stripe(code, fragments)


def test_too_few_fragments_are_refused():
    code, fragments = _stripe()
    with pytest.raises(TooManyErasures, match=r"only elements \[0, 1, 2\] are left"):
        repair_stripe(code, {number: fragments[number] for number in range(3)}, [3], [_payload()])


def test_what_was_made_is_held_against_its_own_header():
    """Every fragment is what its header says, but one was sealed after the parities were made: found, not trusted."""
    code, fragments = _stripe()
    lost = fragments.pop(0)
    fragments[1].payload[9] ^= 1
    fragments[1] = Fragment(
        seal(fragments[1].header.id, fragments[1].payload, piece_bytes=_PIECE), fragments[1].payload
    )
    with pytest.raises(FragmentDamaged, match="element 0"):
        repair_stripe(code, fragments, [0], [_payload()], expected={0: lost.header})


def test_fragments_of_two_versions_are_never_mixed():
    code, fragments = _stripe()
    old = dataclasses.replace(fragments[3].header.id, version=7)
    fragments[3] = Fragment(seal(old, fragments[3].payload, piece_bytes=_PIECE), fragments[3].payload)
    with pytest.raises(ValueError, match="not of one stripe of one version"):
        repair_stripe(code, fragments)


def test_a_fragment_in_anothers_place_is_refused():
    code, fragments = _stripe()
    fragments[0], fragments[1] = fragments[1], fragments[0]
    with pytest.raises(ValueError, match=r"element 0 of RS\(4\+2\) expected"):
        repair_stripe(code, fragments)
