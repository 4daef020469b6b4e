"""Where a rank's pieces lie in its area of a slot, and which of them are there already.

An update can leave state in host memory in the slot itself (`offload.state.Movable`). Its extents lie in the area as
they do at home, gaps between pieces included, so what is there need not be copied. Extents of one kind follow each
other, and the arrays of kinds, which an update walks side by side, begin apart (`offload/arena.py`, [Note: arrays
walked side by side]).
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from checkpoint.crc import Bytes
from checkpoint.index import ArrayLayout, Index, Lengths, dtype_name, span_of
from offload.arena import STAGGER, STAGGER_FROM, STAGGER_SPAN
from offload.space import round_up
from offload.state import Piece

ALIGN_BYTES = 64
Extents = Sequence[tuple[str, Tensor]]
"""As in `offload.state.Movable`."""


def lay_out(pieces: Iterable[Piece], extents: Extents = ()) -> Index:
    """What lies where in a rank's area: extents as they are, and behind them, by kind and dtype, the other pieces."""
    lengths: Lengths = {}
    starts = _place(extents, lengths)
    homes = sorted((t.data_ptr(), t.nbytes, start) for (_, t), start in zip(extents, starts, strict=True))
    spans = []
    for piece in pieces:
        address, offset = piece.tensor.data_ptr(), None
        number = bisect_right(homes, (address, float("inf"))) - 1
        if number >= 0 and piece.stop > piece.start:
            home, size_bytes, start = homes[number]
            if address < home + size_bytes:
                offset = start + (address - home) // piece.tensor.element_size()
        spans.append(span_of(piece, lengths, offset))
    arrays = {
        (kind, dtype): ArrayLayout(kind=kind, dtype=dtype, length=length, chunk=length)
        for (kind, dtype), length in lengths.items()
        if length
    }
    return Index(arrays=arrays, spans=spans)


def array_offsets(index: Index) -> tuple[Mapping[tuple[str, str], int], int]:
    """Where each array of an index begins in its rank's area, in bytes, and where the last one ends."""
    offsets, end = {}, 0
    for number, (key, array) in enumerate(index.arrays.items()):
        size_bytes = array.length * array.item_bytes
        if size_bytes >= STAGGER_FROM:
            end += (number * STAGGER - end) % STAGGER_SPAN
        offsets[key] = end
        end += round_up(size_bytes, ALIGN_BYTES)
    return offsets, end


def berths(extents: Extents, index: Index, area: Bytes) -> list[Tensor]:
    """The memory in an area that `lay_out` gave to each extent."""
    offsets, found = array_offsets(index)[0], []
    for (kind, tensor), start in zip(extents, _place(extents, {}), strict=True):
        begin = offsets[kind, dtype_name(tensor.dtype)] + start * tensor.element_size()
        found.append(torch.from_numpy(area[begin : begin + tensor.nbytes]).view(tensor.dtype))
    return found


def _place(extents: Extents, lengths: Lengths) -> list[int]:
    """The first element of each in its array; `lengths` grows."""
    starts = []
    for kind, tensor in extents:
        key = kind, dtype_name(tensor.dtype)
        starts.append(round_up(lengths.get(key, 0), ALIGN_BYTES // tensor.element_size()))
        lengths[key] = starts[-1] + tensor.numel()
    return starts


def to_copy(pieces: Iterable[Piece], index: Index, area: Bytes) -> Iterator[tuple[Bytes, Tensor]]:
    """Of every piece that is not in the area already, where it goes and its bytes; it must be the one that the index
    says."""
    offsets = array_offsets(index)[0]
    for piece, span in zip(pieces, index.spans, strict=True):
        given = (piece.name, piece.kind, piece.start, piece.stop, dtype_name(piece.tensor.dtype))
        assert given == (span.name, span.kind, span.start, span.stop, span.dtype), f"{given} is saved as {span}"
        if span.stop > span.start:
            source = piece.tensor.detach()
            start = offsets[span.kind, span.dtype] + span.offset * source.element_size()
            target = area[start : start + source.nbytes]
            if source.is_cuda or source.data_ptr() != target.ctypes.data:
                yield target, source.view(torch.uint8)
