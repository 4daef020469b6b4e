"""What lies where in a node's part of a snapshot. Pure, and without torch: the snapshot process reads it too.

    node's state    manifest | area of a rank | area of a rank | …          each begins on a page
    area            the rank's arrays | blob
    blob            four lengths | index | rank state | meta | a CRC-32C for each MiB of the arrays

The manifest says where the areas are. It lies within what the erasure code protects, as all of the node's state does,
so a lost node's part is found again by decoding its first page. The CRCs in the blob are made by the rank and compared
by the snapshot process before it seals anything: a version is verified from the rank's memory to the restored one.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from checkpoint.crc import Bytes, crc32c
from checkpoint.erasure.layout import PAGE_BYTES
from checkpoint.errors import CheckpointError
from checkpoint.fragment import PIECE_BYTES, piece_crcs

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

    def check(self, state: Bytes) -> None:
        """AreaDamaged where the rank's CRCs are not those of `state`, the node's."""
        blob = state[self.start + self.data_bytes :][: self.blob_bytes]
        if len(blob) != self.blob_bytes or crc32c(blob) != self.blob_crc:
            raise AreaDamaged(f"rank {self.rank}: the description of its state has a wrong CRC-32C")
        crcs = Blob.loads(blob.tobytes()).crcs
        found = piece_crcs(state[self.start : self.start + self.data_bytes], PIECE_BYTES)
        if list(crcs) != found:
            bad = [number for number, (one, other) in enumerate(zip(crcs, found, strict=False)) if one != other]
            raise AreaDamaged(f"rank {self.rank}: its state has a wrong CRC-32C in MiB {bad or 'all'}")


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
    return pages(_MANIFEST.size + _RANK_BYTES * (1 + num_ranks))


def pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def areas(capacities: Sequence[tuple[int, int]]) -> tuple[dict[int, tuple[int, int]], int]:
    """By rank, where its area starts and how large it is; and the size of the node's state. Takes (rank, bytes)."""
    found, start = {}, manifest_bytes(len(capacities))
    for rank, size in capacities:
        found[rank] = (start, pages(size))
        start += pages(size)
    return found, start
