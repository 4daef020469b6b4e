"""What lies where in a node's part of a snapshot. Pure, and without torch: the snapshot process reads it too.

    node's state    manifest | area of a rank | area of a rank | …          each of whole pieces (1 MiB)
    area            the rank's arrays | blob
    blob            four lengths | index | rank state | meta | a CRC-32C for each MiB of the arrays

The manifest says where the areas are. It lies within what the erasure code protects, as all of the node's state does,
so a lost node's part is found again by decoding its first page.

[Note: one pass]
The CRCs in the blob are made by the rank, once, right behind its copy. Areas and chunks begin and end with a piece, so
the same numbers seal the fragments: the snapshot process reads no state, and a version is verified from the rank's
memory to the restored one. A bit that flips between is found by who encodes the chunk, or by who restores it.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from checkpoint.crc import Bytes, crc32c
from checkpoint.erasure.layout import PAGE_BYTES
from checkpoint.errors import CheckpointError
from checkpoint.snapshots.fragment import PIECE_BYTES

_MANIFEST = struct.Struct("<8sII")
_MAGIC = b"ATOLLMAN"
_LENGTHS = struct.Struct("<4Q")
_RANK_BYTES = 256
"""Of the manifest, for one rank."""


class AreaDamaged(CheckpointError):
    """A rank's part of a snapshot is not what the rank wrote."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a rank has written: `data_bytes` of arrays from `start` of the node's state, and behind them the blob."""

    rank: int
    start: int
    data_bytes: int
    blob_bytes: int
    blob_crc: int

    def sealed(self, state: Bytes) -> list[int]:
        """Of `state`, the node's, the CRCs of the pieces from `start` that the rank's arrays fill, as the rank made
        them. AreaDamaged where their description is not what the rank wrote."""
        blob = state[self.start + self.data_bytes :][: self.blob_bytes]
        if len(blob) != self.blob_bytes or crc32c(blob) != self.blob_crc:
            raise AreaDamaged(f"rank {self.rank}: the description of its state has a wrong CRC-32C")
        crcs = Blob.loads(blob.tobytes()).crcs
        if len(crcs) != -(-self.data_bytes // PIECE_BYTES):
            raise AreaDamaged(f"rank {self.rank}: {len(crcs)} CRCs for {self.data_bytes} bytes")
        return list(crcs[: self.data_bytes // PIECE_BYTES])


@dataclass(frozen=True, kw_only=True)
class Manifest:
    version: int
    step: int
    world: int
    ranks: tuple[Written, ...]

    def dumps(self) -> bytes:
        body = json.dumps(asdict(self)).encode()
        return _MANIFEST.pack(_MAGIC, len(body), crc32c(body)) + body

    @classmethod
    def loads(cls, content: bytes) -> "Manifest":
        """`content` may be longer. AreaDamaged where it is no manifest."""
        magic, size, crc = _MANIFEST.unpack_from(content)
        body = content[_MANIFEST.size : _MANIFEST.size + size]
        if magic != _MAGIC or crc32c(body) != crc:
            raise AreaDamaged("the manifest of a node's snapshot has a wrong CRC-32C")
        tree = json.loads(body)
        ranks = tuple(Written(**rank) for rank in tree["ranks"])
        return cls(version=tree["version"], step=tree["step"], world=tree["world"], ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class Blob:
    """What describes a rank's arrays: `index`, `rank_state` and `meta` as in a persisted checkpoint."""

    index: bytes
    rank_state: bytes
    meta: bytes
    crcs: Sequence[int]

    def dumps(self) -> bytes:
        parts = [self.index, self.rank_state, self.meta, np.asarray(self.crcs, dtype="<u4").tobytes()]
        return _LENGTHS.pack(*map(len, parts)) + b"".join(parts)

    @classmethod
    def loads(cls, content: bytes) -> "Blob":
        sizes = _LENGTHS.unpack_from(content)
        if _LENGTHS.size + sum(sizes) != len(content):
            raise AreaDamaged("the description of a rank's state has another size than it says")
        parts, start = [], _LENGTHS.size
        for size in sizes:
            parts.append(content[start : start + size])
            start += size
        index, rank_state, meta, crcs = parts
        return cls(index=index, rank_state=rank_state, meta=meta, crcs=np.frombuffer(crcs, dtype="<u4").tolist())


def manifest_bytes(num_ranks: int) -> int:
    return whole(_MANIFEST.size + _RANK_BYTES * (1 + num_ranks), PAGE_BYTES)


def whole(size: int, unit: int = PIECE_BYTES) -> int:
    """`size`, rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def areas(capacities: Sequence[tuple[int, int]]) -> tuple[dict[int, tuple[int, int]], int]:
    """By rank, where its area starts and how large it is; and the size of the node's state. Takes (rank, bytes)."""
    found, start = {}, whole(manifest_bytes(len(capacities)))
    for rank, size in capacities:
        found[rank] = (start, whole(size))
        start += whole(size)
    return found, start
