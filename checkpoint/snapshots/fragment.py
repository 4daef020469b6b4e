"""A fragment: one element of a stripe, and the header by which it is recognised and checked.

[Note: the header]
Plain numbers, little endian, never a pickle: what it is of (run, code, group, stripe, element, step, version), how
large it is, a CRC-32C for every piece (1 MiB) of the payload, and last a CRC-32C of the header itself. Header and
payload need not lie side by side: a node's k chunks are one contiguous range of its state, their headers lie elsewhere.

What fails its check is an erasure: a bad header costs the fragment, a bad piece that piece alone
(`checkpoint/snapshots/reader.py`). The headers say what they belong to, so that a fragment of another version, or in
another one's place, is found too: compare `header.id` with what was expected.
"""

import struct
from dataclasses import astuple, dataclass

from checkpoint.crc import Bytes, crc32c, piece_crcs
from checkpoint.errors import CheckpointError
from checkpoint.snapshots.format import FORMAT

PIECE_BYTES = 1 << 20

_MAGIC = b"ATOLLFRG"
_FIXED = struct.Struct("<8sI16s3H2I2QQI")
_CRC = struct.Struct("<I")


class FragmentDamaged(CheckpointError):
    """A fragment is not what was sealed. It counts as lost."""


@dataclass(frozen=True, kw_only=True)
class FragmentId:
    """What a fragment is a part of. All numbers are unsigned."""

    run: bytes
    """16 bytes that no other run has."""
    k: int
    m: int
    element: int
    """Number in its stripe: 0 … k-1 data, k … k+m-1 parity."""
    group: int
    stripe: int
    step: int
    """Steps of training done."""
    version: int
    """Of the snapshot; rises with each attempt and is never used twice in a run."""

    def __post_init__(self) -> None:
        if len(self.run) != 16 or not 0 <= self.element < self.k + self.m <= 255:
            raise ValueError(f"impossible fragment: {self}")


@dataclass(frozen=True, kw_only=True)
class FragmentHeader:
    id: FragmentId
    payload_bytes: int
    piece_bytes: int
    crcs: tuple[int, ...]
    """CRC-32C of each piece of the payload; the last one may be shorter."""

    def dumps(self) -> bytes:
        body = _FIXED.pack(_MAGIC, FORMAT, *astuple(self.id), self.payload_bytes, self.piece_bytes)
        body += struct.pack(f"<{len(self.crcs)}I", *self.crcs)
        return body + _CRC.pack(crc32c(body))

    @classmethod
    def loads(cls, content: bytes) -> "FragmentHeader":
        """Raises FragmentDamaged for anything but the bytes that `dumps` made."""
        if len(content) < _FIXED.size + _CRC.size:
            raise FragmentDamaged(f"a fragment's header has {len(content)} bytes, too few")
        body = content[: -_CRC.size]
        magic, format_, *id_, payload_bytes, piece_bytes = _FIXED.unpack_from(content)
        if magic != _MAGIC or _CRC.unpack(content[-_CRC.size :])[0] != crc32c(body):
            raise FragmentDamaged("a fragment's header has a wrong CRC-32C")
        if format_ != FORMAT:
            raise FragmentDamaged(f"a fragment has format {format_}; this version reads format {FORMAT}")
        num_pieces = -(-payload_bytes // piece_bytes) if piece_bytes else -1
        if len(body) != _FIXED.size + _CRC.size * num_pieces:
            raise FragmentDamaged(f"a fragment's header has {len(content)} bytes for {num_pieces} pieces")
        run, k, m, element, group, stripe, step, version = id_
        try:
            fragment = FragmentId(
                run=run, k=k, m=m, element=element, group=group, stripe=stripe, step=step, version=version
            )
        except ValueError as error:
            raise FragmentDamaged(str(error)) from error
        crcs = struct.unpack_from(f"<{num_pieces}I", body, _FIXED.size)
        return cls(id=fragment, payload_bytes=payload_bytes, piece_bytes=piece_bytes, crcs=crcs)

    def bad_pieces(self, payload: Bytes, threads: int = 1) -> list[int]:
        """Numbers of the pieces of `payload` whose CRC is wrong; FragmentDamaged where its size is."""
        if len(payload) != self.payload_bytes:
            raise FragmentDamaged(f"a fragment has {len(payload)} bytes, {self.payload_bytes} were sealed")
        found = piece_crcs(payload, self.piece_bytes, threads)
        return [number for number, (one, other) in enumerate(zip(found, self.crcs, strict=True)) if one != other]
