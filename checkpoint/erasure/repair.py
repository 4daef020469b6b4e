"""Make again what is lost or damaged in one stripe, piece by piece, and trust nothing that was not checked.

A bad piece is an erasure of that piece alone. So a stripe whose every fragment has a flipped bit somewhere is still
repaired, as long as no more than m are bad in the same place.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checkpoint.erasure.code import ReedSolomon, TooManyErasures
from checkpoint.erasure.galois import Bytes
from checkpoint.fragment import FragmentDamaged, FragmentHeader


@dataclass(frozen=True)
class Fragment:
    """What is there of one element. `payload` is written to where a piece of it is bad."""

    header: FragmentHeader
    payload: Bytes


def repair_stripe(
    code: ReedSolomon,
    fragments: Mapping[int, Fragment],
    wanted: Sequence[int] = (),
    out: Sequence[Bytes] = (),
    *,
    expected: Mapping[int, FragmentHeader] | None = None,
    threads: int = 1,
) -> dict[int, list[int]]:
    """Check every fragment (by element number), repair bad pieces in place, and make `wanted` in `out`.

    All are of one size and cut into the same pieces. `expected` has the headers of lost elements where they are known:
    what is made must agree. Returns the repaired pieces by element. Raises TooManyErasures (some pieces may have been
    repaired by then), FragmentDamaged where what was made is not what had been sealed, ValueError where the fragments
    are not of one stripe.
    """
    sizes = _same_stripe(code, fragments, out)
    if len(fragments) < code.k:
        raise TooManyErasures(f"RS({code.k}+{code.m}): only elements {sorted(fragments)} are left")
    if sizes is None:
        return {}
    payload_bytes, piece_bytes = sizes
    bad = {number: fragment.header.bad_pieces(fragment.payload, threads) for number, fragment in fragments.items()}
    bad_sets: list[list[int]] = [[] for _ in range(-(-payload_bytes // piece_bytes))]
    for number, pieces in bad.items():
        for piece in pieces:
            bad_sets[piece].append(number)
    outputs = dict(zip(wanted, out, strict=True)) | {number: fragments[number].payload for number in fragments}
    for missing, run in itertools.groupby(range(len(bad_sets)), key=bad_sets.__getitem__):
        pieces = list(run)
        where = slice(pieces[0] * piece_bytes, min((pieces[-1] + 1) * piece_bytes, payload_bytes))
        left = {number: f.payload[where] for number, f in fragments.items() if number not in missing}
        try:
            code.reconstruct(left, [*wanted, *missing], [outputs[number][where] for number in [*wanted, *missing]])
        except TooManyErasures as error:
            raise TooManyErasures(f"pieces {pieces[0]} to {pieces[-1]}: {error}") from error
    headers = {number: fragment.header for number, fragment in fragments.items() if bad[number]}
    known = {number: header for number, header in (expected or {}).items() if number in wanted}
    for number, header in (headers | known).items():
        header.check(outputs[number], threads)
    return {number: pieces for number, pieces in bad.items() if pieces}


def _same_stripe(code: ReedSolomon, fragments: Mapping[int, Fragment], out: Sequence[Bytes]) -> tuple[int, int] | None:
    """Payload and piece size that all share; None without fragments."""
    found = set()
    for number, fragment in fragments.items():
        header, id_ = fragment.header, fragment.header.id
        if (id_.k, id_.m, id_.element) != (code.k, code.m, number):
            raise ValueError(f"element {number} of RS({code.k}+{code.m}) expected, got {id_}")
        if len(fragment.payload) != header.payload_bytes:
            raise FragmentDamaged(f"element {number} has {len(fragment.payload)} bytes, not {header.payload_bytes}")
        found.add((id_.run, id_.group, id_.stripe, id_.version, id_.step, header.payload_bytes, header.piece_bytes))
    if len(found) > 1:
        raise ValueError(f"fragments are not of one stripe of one version: {sorted(found)}")
    if not found:
        return None
    *_, payload_bytes, piece_bytes = found.pop()
    if any(len(array) != payload_bytes for array in out):
        raise ValueError(f"outputs of {[len(array) for array in out]} bytes, fragments have {payload_bytes}")
    return payload_bytes, piece_bytes
