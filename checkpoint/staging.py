"""The one copy of a rank's state in host memory from which a checkpoint is written.

[Note: who may touch the staging buffers]
`Staging.copy` fills the buffers and the writer's thread reads them; `Checkpoints.save` waits for the last write before
it copies again. So they are reused save after save: the pages are faulted in (and, for a GPU, page-locked) once.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from checkpoint.chunks import ChunkWriter
from checkpoint.crc import Bytes
from checkpoint.erasure import aligned_empty
from checkpoint.layout import DTYPES, ArrayLayout, Index, Lengths, span_of
from offload.state import Piece

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A copy of a rank's pieces: `index` says what lies where in `data`, one array of bytes for each zarr array."""

    index: Index
    data: dict[tuple[str, str], Bytes]

    def write(self, chunks: ChunkWriter) -> Index:
        for array in self.index.arrays.values():
            for number in range(array.num_chunks):
                chunks.put(array.name, number, self._chunk(array, number), array.chunk * array.item_bytes)
        return self.index

    def _chunk(self, array: ArrayLayout, number: int) -> Bytes:
        """The bytes of one chunk, without the padding of the last."""
        chunk_bytes = array.chunk * array.item_bytes
        return self.data[array.kind, array.dtype][number * chunk_bytes : (number + 1) * chunk_bytes]


class Staging:
    """Host buffers, one for each kind and dtype, as large as the rank's state."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._pinned: set[tuple[str, str]] = set()

    def copy(self, pieces: Iterable[Piece]) -> Staged:
        """Copy `pieces` and return once the copy is whole; what was staged before is overwritten."""
        pieces = list(pieces)
        index = self._lay_out(pieces)
        for key in set(self._buffers) - set(index.arrays):
            self._drop(key)
        on_gpu = {piece.tensor.device for piece in pieces if piece.tensor.is_cuda}
        for key, array in index.arrays.items():
            self._make(key, array.length, pinned=bool(on_gpu))
        for piece, span in zip(pieces, index.spans, strict=True):
            if span.stop > span.start:
                buffer = self._buffers[span.kind, span.dtype]
                # On the current stream, after the update that made the values; one wait for all of them below.
                buffer[span.offset : span.offset + span.stop - span.start].copy_(piece.tensor, non_blocking=True)
        for device in on_gpu:
            torch.cuda.current_stream(device).synchronize()
        return Staged(index=index, data={key: self._buffers[key].view(torch.uint8).numpy() for key in index.arrays})

    def close(self) -> None:
        for key in list(self._buffers):
            self._drop(key)

    def _lay_out(self, pieces: list[Piece]) -> Index:
        lengths: Lengths = {}
        spans = [span_of(piece, lengths) for piece in pieces]
        arrays = {key: ArrayLayout.cut(*key, length, self._chunk_bytes) for key, length in lengths.items() if length}
        return Index(arrays=arrays, spans=spans)

    def _make(self, key: tuple[str, str], length: int, *, pinned: bool) -> None:
        if key in self._buffers and len(self._buffers[key]) == length and (key in self._pinned) == pinned:
            return
        self._drop(key)
        buffer = aligned_tensor(length, DTYPES[key[1]].torch)
        self._buffers[key] = buffer
        if pinned and _register(buffer):
            self._pinned.add(key)

    def _drop(self, key: tuple[str, str]) -> None:
        buffer = self._buffers.pop(key, None)
        if buffer is not None and key in self._pinned:
            self._pinned.remove(key)
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def aligned_tensor(length: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized and page-aligned, so that it can be written past the page cache."""
    return torch.from_numpy(aligned_empty(length * dtype.itemsize)).view(dtype)


def _register(buffer: torch.Tensor) -> bool:
    """Page-lock `buffer` as it is: torch's own pinned allocator would round its size up to a power of two."""
    result = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    if int(result) != 0:
        _log.warning(
            "page-locking %d bytes for checkpoints failed (%s): their copies are slower", buffer.nbytes, result
        )
    return int(result) == 0
