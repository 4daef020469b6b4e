"""Writing state from where it lies: for state that fills host memory, or lies on drives.

Training stands still meanwhile, and no more memory is needed than a few chunks. `Staging` is the other way: a copy of
all, then writing in the background.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from checkpoint.index import DTYPES, ArrayLayout, Index, Lengths, span_of
from checkpoint.persisted.chunks import ChunkWriter
from checkpoint.persisted.staging import aligned_tensor
from offload.state import Piece


@dataclass
class _Growing:
    """An array whose length is not known yet, and its last chunk."""

    kind: str
    dtype: str
    chunk: int
    number: int = 0
    filled: int = 0
    buffer: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self.buffer, self.filled = aligned_tensor(self.chunk, DTYPES[self.dtype].torch), 0

    def add(self, values: Tensor, chunks: ChunkWriter) -> None:
        place = 0
        while place < values.numel():
            take = min(self.chunk - self.filled, values.numel() - place)
            self.buffer[self.filled : self.filled + take] = values[place : place + take]
            self.filled, place = self.filled + take, place + take
            if self.filled == self.chunk:
                self._put(chunks)
                self.number += 1
                self._renew()

    def finish(self, chunks: ChunkWriter) -> ArrayLayout:
        """Put what is left. An array of one chunk is as long as it is; else the last is padded."""
        length = self.number * self.chunk + self.filled
        if self.number == 0:
            self.chunk = self.filled
        if self.filled:
            self._put(chunks)
        return ArrayLayout(kind=self.kind, dtype=self.dtype, length=length, chunk=self.chunk)

    def _put(self, chunks: ChunkWriter) -> None:
        data = self.buffer[: self.filled].view(torch.uint8).numpy()
        chunks.put(f"{self.kind}.{self.dtype}", self.number, data, self.chunk * self.buffer.itemsize)


class Stream:
    """Pieces, each copied into a chunk and let go before the next is asked for."""

    def __init__(self, pieces: Iterable[Piece], chunk_bytes: int) -> None:
        self._pieces, self._chunk_bytes = pieces, chunk_bytes

    def write(self, chunks: ChunkWriter) -> Index:
        lengths: Lengths = {}
        arrays: dict[tuple[str, str], _Growing] = {}
        spans = []
        for piece in self._pieces:
            spans.append(span := span_of(piece, lengths))
            if span.stop == span.start:
                continue
            key = span.kind, span.dtype
            if key not in arrays:
                arrays[key] = _Growing(*key, chunk=self._chunk_bytes // DTYPES[span.dtype].torch.itemsize)
            arrays[key].add(piece.tensor, chunks)
        return Index(arrays={key: array.finish(chunks) for key, array in arrays.items()}, spans=spans)
