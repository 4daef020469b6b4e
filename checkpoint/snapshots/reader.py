"""Reading a snapshot from the memory of the nodes, by ranges and checked, as if it were a persisted checkpoint.

What lies on a node that is there comes from that node; what lay on a lost node, and every piece whose CRC-32C is wrong,
is decoded on the way from k other elements of its stripe. So any number of ranks reads what any other number wrote, and
nothing has to be rebuilt first: the ranks take a new snapshot of what they have restored.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from checkpoint import values
from checkpoint.crc import Bytes, crc32c, piece_crcs
from checkpoint.erasure import ReedSolomon, TooManyErasures, aligned_empty
from checkpoint.errors import CheckpointError
from checkpoint.index import Index
from checkpoint.snapshots.area import AreaDamaged, Blob, Manifest, Written, manifest_bytes
from checkpoint.snapshots.fragment import PIECE_BYTES, FragmentDamaged, FragmentHeader
from checkpoint.snapshots.places import array_offsets
from checkpoint.snapshots.recovery import Found
from checkpoint.snapshots.wire import Refused, Wire, WireError
from checkpoint.state_reader import StateReader
from offload.state import Piece

_RUN_PIECES = 8
"""Fetched by one request."""
_CACHED_PIECES = 32
"""Many small parameters share a piece, and a rank reads several kinds side by side."""


class SnapshotReader(StateReader):
    """One version, with the surface of `checkpoint.CheckpointReader`. Reads from one thread at a time."""

    def __init__(self, found: Found, token: bytes) -> None:
        self.step, self.world, self._found = found.step, found.plan.world, found
        self._groups = [_Group(found, token, number) for number in range(len(found.plan.groups))]
        self._parts: dict[int, tuple[_Group, int, Written]] = {}
        for group in self._groups:
            for place in range(group.layout.n):
                for part in group.manifest(place, self.world).ranks:
                    self._parts[part.rank] = (group, place, part)
        if sorted(self._parts) != list(range(self.world)):
            raise CheckpointError(f"{found}: it has ranks {sorted(self._parts)} of {self.world}")
        self._blobs = {rank: self._blob(rank) for rank in self._parts}
        self.meta: dict[str, Any] = values.loads(self._blobs[0].meta)
        indexes = {rank: Index.loads(blob.index) for rank, blob in self._blobs.items()}
        self._offsets = {rank: array_offsets(index)[0] for rank, index in indexes.items()}
        super().__init__(f"the snapshot of step {self.step}", indexes)

    def rank_state(self, rank: int) -> dict[str, Any]:
        """What that rank passed to `save`. KeyError where it was written by fewer ranks."""
        if rank not in self._blobs:
            raise KeyError(f"the snapshot of step {self.step} was written by {self.world} ranks; no rank {rank}")
        state: dict[str, Any] = values.loads(self._blobs[rank].rank_state)
        return state

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Put what they name into the pieces' tensors, on any device and of any dtype (`offload.state.Fill`)."""
        for piece in pieces:
            out = piece.tensor.detach()
            if out.device.type == "cpu" and out.dtype == self.dtype(piece.name, piece.kind) and out.is_contiguous():
                self._read_into(out, piece)
            else:
                out.copy_(self.read(piece.name, piece.kind, piece.start, piece.stop))

    def _read_into(self, out: torch.Tensor, piece: Piece) -> None:
        raw, item = out.view(torch.uint8).numpy(), out.element_size()
        for rank, span, first, last in self._overlaps(piece):
            offset = self._offsets[rank][span.kind, span.dtype] + (span.offset + first - span.start) * item
            group, place, part = self._parts[rank]
            group.read(place, part.start + offset, raw[(first - piece.start) * item : (last - piece.start) * item])

    def verify(self) -> None:
        """Read everything, and compare it with the CRCs that the ranks made of their own memory."""
        for rank, (group, place, part) in self._parts.items():
            for number, crc in enumerate(self._blobs[rank].crcs):
                start = number * PIECE_BYTES
                piece = aligned_empty(min(PIECE_BYTES, part.data_bytes - start))
                group.read(place, part.start + start, piece)
                if piece_crcs(piece, PIECE_BYTES) != [crc]:
                    raise AreaDamaged(f"the snapshot of step {self.step}: rank {rank} has a wrong CRC in MiB {number}")

    def close(self) -> None:
        for group in self._groups:
            group.close()

    def _blob(self, rank: int) -> Blob:
        group, place, part = self._parts[rank]
        raw = np.empty(part.blob_bytes, dtype=np.uint8)
        group.read(place, part.start + part.data_bytes, raw)
        if crc32c(raw) != part.blob_crc:
            raise AreaDamaged(f"the snapshot of step {self.step}: rank {rank}'s description has a wrong CRC-32C")
        return Blob.loads(raw.tobytes())

    def _misfit(self, text: str) -> NoReturn:
        raise CheckpointError(f"the snapshot of step {self.step}: {text}")


class _Group:
    """The states of a group's nodes, each as a range of bytes."""

    def __init__(self, found: Found, token: bytes, number: int) -> None:
        self.layout = found.plan.layout(number)
        self._names = found.plan.groups[number]
        self._found, self._token = found, token
        self._stripes = self.layout.stripes()
        self._code = ReedSolomon(self.layout.k, self.layout.m)
        self._wires: dict[str, Wire] = {}
        self._headers: dict[str, list[FragmentHeader | None]] = {}
        self._bad = {
            (label, fragment, piece)
            for label, fragments in found.bad.items()
            for fragment, pieces in enumerate(fragments)
            for piece in pieces
        }
        self._lost = set(found.lost)
        self._cache: OrderedDict[tuple[int, int, int], Bytes] = OrderedDict()

    def manifest(self, place: int, num_ranks: int) -> Manifest:
        head = np.empty(min(manifest_bytes(num_ranks), self.layout.data_bytes), dtype=np.uint8)
        self.read(place, 0, head)
        return Manifest.loads(head.tobytes())

    def read(self, place: int, start: int, out: Bytes) -> None:
        """Bytes of a node's state, from `start`, into `out`."""
        done, chunk_bytes = 0, self.layout.chunk_bytes
        while done < len(out):
            chunk, within = divmod(start + done, chunk_bytes)
            first = within // PIECE_BYTES
            end = min(within + len(out) - done, chunk_bytes)
            count = min(-(-end // PIECE_BYTES) - first, _RUN_PIECES)
            run = self._run(place, chunk, first, count)
            part = run[within - first * PIECE_BYTES : end - first * PIECE_BYTES]
            out[done : done + len(part)] = part
            done += len(part)

    def close(self) -> None:
        for wire in self._wires.values():
            wire.close()
        self._wires.clear()

    def _run(self, place: int, chunk: int, first: int, count: int) -> Bytes:
        if count == 1 and (place, chunk, first) in self._cache:
            self._cache.move_to_end((place, chunk, first))
            return self._cache[place, chunk, first]
        stripe = self._stripes[(place - self.layout.m - chunk) % self.layout.n]
        run = self._fetch(stripe.number, chunk, first, count)
        if run is None:
            run = self._decode(stripe.number, chunk, first, count)
        self._cache[place, chunk, first + count - 1] = run[(count - 1) * PIECE_BYTES :].copy()
        while len(self._cache) > _CACHED_PIECES:
            self._cache.popitem(last=False)
        return run

    def _fetch(self, stripe: int, number: int, first: int, count: int) -> Bytes | None:
        """Pieces of an element from the node that has it; None where it is lost or any of them is damaged."""
        element = self._stripes[stripe].elements[number]
        label = self._names[element.node]
        fragment = element.offset // self.layout.chunk_bytes + (self.layout.k if element.parity else 0)
        if label in self._lost or any((label, fragment, first + piece) in self._bad for piece in range(count)):
            return None
        offset = fragment * self.layout.chunk_bytes + first * PIECE_BYTES
        size = min(count * PIECE_BYTES, self.layout.chunk_bytes - first * PIECE_BYTES)
        run = aligned_empty(size)
        try:
            header = self._header(label, fragment)
            wire = self._wire(label)
            wire.send({"do": "read", "version": self._found.version, "offset": offset, "size": size})
            wire.answer(run)
        except (WireError, Refused):
            self._lost.add(label)  # gone since it was checked: decoded from the others, if they are enough
            return None
        if header is None:
            return None
        crcs = header.crcs[first : first + count]
        wrong = [piece for piece, crc in enumerate(piece_crcs(run, PIECE_BYTES)) if crc != crcs[piece]]
        self._bad |= {(label, fragment, first + piece) for piece in wrong}
        return None if wrong else run

    def _decode(self, stripe: int, wanted: int, first: int, count: int) -> Bytes:
        runs: dict[int, Bytes] = {}
        for number in range(self.layout.n):
            if number != wanted and len(runs) < self.layout.k:
                run = self._fetch(stripe, number, first, count)
                if run is not None:
                    runs[number] = run
        size = min(count * PIECE_BYTES, self.layout.chunk_bytes - first * PIECE_BYTES)
        out = aligned_empty(size)
        if len(runs) >= self.layout.k:
            self._code.reconstruct(runs, [wanted], [out])
            return out
        if count == 1:
            raise CheckpointError(
                f"the snapshot of step {self._found.step}: stripe {stripe}, piece {first}: {len(runs)} of the "
                f"{self.layout.k} fragments that are needed are good"
            ) from TooManyErasures(f"elements {sorted(runs)} are left")
        for piece in range(count):  # damaged in different pieces: each by itself
            one = self._fetch(stripe, wanted, first + piece, 1)
            one = self._decode(stripe, wanted, first + piece, 1) if one is None else one
            out[piece * PIECE_BYTES : piece * PIECE_BYTES + len(one)] = one
        return out

    def _header(self, label: str, fragment: int) -> FragmentHeader | None:
        if label not in self._headers:
            answer = self._wire(label).ask({"do": "headers", "version": self._found.version})
            self._headers[label] = [_parse(raw) for raw in _texts(answer["headers"])]
        return self._headers[label][fragment]

    def _wire(self, label: str) -> Wire:
        if label not in self._wires:
            self._wires[label] = Wire.connect(self._found.holders[label], self._token)
        return self._wires[label]


def _texts(raw: Any) -> Sequence[str]:
    return [str(text) for text in raw]


def _parse(raw: str) -> FragmentHeader | None:
    try:
        return FragmentHeader.loads(bytes.fromhex(raw))
    except FragmentDamaged:
        return None
