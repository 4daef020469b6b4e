"""The one copy of a rank's state in host memory from which a checkpoint is written.

[Note: who may touch the staging buffers]
`Staged.copy` fills the buffers, in the training thread, and the writer's thread reads each chunk once it is whole, so
that the disk does not wait for the copy of all. `Checkpoints.save` waits for the last write before it copies again. So
they are reused save after save: the pages are faulted in (and, for a GPU, page-locked) once.
"""

import logging
from collections.abc import Iterable, Sequence
from queue import SimpleQueue

import torch

from checkpoint.crc import Bytes
from checkpoint.erasure import aligned_empty
from checkpoint.errors import CheckpointWriteError
from checkpoint.index import DTYPES, ArrayLayout, Index, Lengths, span_of
from checkpoint.persisted.chunks import ChunkWriter
from offload.state import Piece

_log = logging.getLogger(__name__)


_Whole = tuple[ArrayLayout, int, Sequence[torch.cuda.Event]]
"""A chunk that has been copied once these events are over."""


class Staged:
    """A copy of a rank's pieces, being made: `index` says what lies where in the buffers, one for each zarr array."""

    def __init__(self, pieces: Sequence[Piece], index: Index, buffers: dict[tuple[str, str], torch.Tensor]) -> None:
        self._pieces, self._index, self._buffers = pieces, index, buffers
        self._whole: SimpleQueue[_Whole | None] = SimpleQueue()

    def copy(self) -> None:
        """Copy the pieces; returns once the copy is whole."""
        try:
            self._copy()
        except BaseException:
            self._whole.put(None)  # or the writer waited for ever
            raise

    def write(self, chunks: ChunkWriter) -> Index:
        for _ in range(sum(array.num_chunks for array in self._index.arrays.values())):
            whole = self._whole.get()
            if whole is None:
                raise CheckpointWriteError("the state could not be copied to host memory")
            array, number, events = whole
            for event in events:
                event.synchronize()
            chunks.put(array.name, number, self._chunk(array, number), array.chunk * array.item_bytes)
        return self._index

    def _copy(self) -> None:
        devices = {piece.tensor.device for piece in self._pieces if piece.tensor.is_cuda}
        done = dict.fromkeys(self._index.arrays, 0)
        for piece, span in zip(self._pieces, self._index.spans, strict=True):
            if span.stop == span.start:
                continue
            key, end = (span.kind, span.dtype), span.offset + span.stop - span.start
            array = self._index.arrays[key]
            # On the current stream, after the update that made the values; one wait for all of them below.
            self._buffers[key][span.offset : end].copy_(piece.tensor, non_blocking=True)
            num_whole = array.num_chunks if end == array.length else end // array.chunk
            if num_whole > done[key]:
                events = [_event(device) for device in devices]
                for number in range(done[key], num_whole):
                    self._whole.put((array, number, events))
                done[key] = num_whole
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def _chunk(self, array: ArrayLayout, number: int) -> Bytes:
        """The bytes of one chunk, without the padding of the last."""
        data: Bytes = self._buffers[array.kind, array.dtype].view(torch.uint8).numpy()
        chunk_bytes = array.chunk * array.item_bytes
        return data[number * chunk_bytes : (number + 1) * chunk_bytes]


class Staging:
    """Host buffers, one for each kind and dtype, as large as the rank's state."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._pinned: set[tuple[str, str]] = set()

    def stage(self, pieces: Iterable[Piece]) -> Staged:
        """Room for a copy of `pieces`, which `Staged.copy` makes; what was staged before is overwritten then."""
        pieces = list(pieces)
        index = self._lay_out(pieces)
        for key in set(self._buffers) - set(index.arrays):
            self._drop(key)
        pinned = any(piece.tensor.is_cuda for piece in pieces)
        for key, array in index.arrays.items():
            self._make(key, array.length, pinned=pinned)
        return Staged(pieces, index, dict(self._buffers))

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


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # whoever waits for it leaves the core to others
    event.record(torch.cuda.current_stream(device))
    return event


def _register(buffer: torch.Tensor) -> bool:
    """Page-lock `buffer` as it is: torch's own pinned allocator would round its size up to a power of two."""
    result = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    if int(result) != 0:
        _log.warning(
            "page-locking %d bytes for checkpoints failed (%s): their copies are slower", buffer.nbytes, result
        )
    return int(result) == 0
