"""Reading a committed checkpoint, by ranges and checked.

Sizes and metadata are checked when it is opened, a chunk when it is read, everything by `verify`. Nothing read is
executed: files hold numbers and JSON alone, and every path that is read is made here or matched a strict pattern.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from checkpoint import values
from checkpoint.crc import Bytes, crc32c
from checkpoint.errors import CheckpointDamaged, CheckpointError
from checkpoint.index import DTYPES, ArrayLayout, Index
from checkpoint.persisted.folder import Folder, pages_empty
from checkpoint.persisted.layout import COMMIT, CRC_BYTES, META, Commit, is_chunk, shard_folder
from checkpoint.state_reader import StateReader
from offload.state import Piece

_THREADS = 4
_CACHE_BYTES = 512 << 20
"""Checked chunks in memory, those that are read ahead among them: many small parameters share a chunk, and a rank reads
several kinds side by side."""

_T = TypeVar("_T")
_Chunk = tuple[int, ArrayLayout, int]
"""Rank that wrote it, its array, its number."""
_Job = tuple[slice, torch.Tensor]
"""Which bytes of a chunk, and the elements that they are of what is filled."""


class CheckpointReader(StateReader):
    """One committed checkpoint. Reads may come from one thread at a time; others read ahead.

    CheckpointDamaged where it is not what was written: names the step, the file, the problem, and the step before it to
    use instead, which `good_step` finds.
    """

    def __init__(
        self, folder: Folder, step: int, good_step: Callable[[], int | None] = lambda: None, *, alone: bool = False
    ) -> None:
        """alone: no other rank reads the same."""
        self.step, self._alone = step, alone
        self._folder = folder
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="restore")
        self._good_step = good_step
        self._commit = self._parse(COMMIT, self._fetch(COMMIT).tobytes(), Commit.loads)
        self.world = self._commit.world
        """Number of ranks that wrote it."""
        self._check_sizes()
        self.meta: dict[str, Any] = self._json(META)
        self._indexes = [self._index(rank) for rank in range(self.world)]
        super().__init__(f"the checkpoint of step {step}", dict(enumerate(self._indexes)))
        self._cache: OrderedDict[_Chunk, tuple[Future[Bytes], Bytes]] = OrderedDict()
        """Checked bytes, and the memory they lie in, which is used again."""
        self._spare: list[Bytes] = []
        arrays = [array for index in self._indexes for array in index.arrays.values()]
        self._chunk_bytes = max((array.chunk * array.item_bytes + CRC_BYTES for array in arrays), default=0)

    def rank_state(self, rank: int) -> dict[str, Any]:
        """What that rank passed to `save`. KeyError where it was written by fewer ranks."""
        if not 0 <= rank < self.world:
            raise KeyError(
                f"the checkpoint of step {self.step} was written by {self.world} ranks; there is no rank {rank}"
            )
        return self._json(f"{shard_folder(rank)}/rank_state.json")

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Put what they name into the pieces' tensors, on any device and of any dtype (`offload.state.Fill`).

        Chunk by chunk: each is read once, checked, and only then copied to where it is wanted, some of them at once.
        KeyError and ValueError as of `read`, before any tensor is touched; where it raises CheckpointError some are.
        """
        jobs: dict[_Chunk, list[_Job]] = {}
        for piece in pieces:
            for chunk, job in self._jobs(piece):
                jobs.setdefault(chunk, []).append(job)
        under_way: deque[tuple[_Chunk, Future[Bytes]]] = deque()
        try:
            for chunk in sorted(jobs, key=lambda chunk: chunk[2]):  # kinds side by side: what comes next begins there
                if len(under_way) == _THREADS:
                    self._settle(*under_way.popleft(), jobs)
                under_way.append((chunk, self._deliver(chunk, jobs[chunk])))
            for chunk in self._after(jobs):
                self._deliver(chunk, [])
            while under_way:
                self._settle(*under_way.popleft(), jobs)
        finally:
            wait([delivered for _, delivered in under_way])  # nobody writes into the tensors any more

    def verify(self) -> None:
        """Read and check every byte."""
        for _ in self._pool.map(self._checked, self._commit.files):
            pass

    def _jobs(self, piece: Piece) -> Iterator[tuple[_Chunk, _Job]]:
        """One for every overlap of the piece with a chunk."""
        for rank, span, first, last in self._overlaps(piece):
            array = self._indexes[rank].arrays[span.kind, span.dtype]
            while first < last:
                number, inner = divmod(span.offset + first - span.start, array.chunk)
                count = min(array.chunk - inner, last - first)
                source = slice(inner * array.item_bytes, (inner + count) * array.item_bytes)
                target = piece.tensor.detach()[first - piece.start : first - piece.start + count]
                yield (rank, array, number), (source, target)
                first += count

    def _after(self, chunks: Iterable[_Chunk]) -> list[_Chunk]:
        """What is most likely asked for next: the rest of each array."""
        last = {(rank, array): number for rank, array, number in chunks}
        ahead = [(*key, number + 1) for key, number in last.items() if number + 1 < key[1].num_chunks]
        size = sum(array.chunk * array.item_bytes for _, array, _ in ahead)
        return ahead if 2 * size <= _CACHE_BYTES else []

    def _deliver(self, chunk: _Chunk, wanted: list[_Job]) -> Future[Bytes]:
        """Copy from a chunk, checked, from memory or storage; what is returned then are its elements and padding."""
        rank, array, number = chunk
        earlier, memory = self._cache.pop(chunk, None) or (None, self._memory())
        path, dtype = f"{shard_folder(rank)}/{array.chunk_file(number)}", DTYPES[array.dtype].torch

        def deliver() -> Bytes:
            content = earlier.result() if earlier else self._checked(path, memory)
            for source, target in wanted:
                _copy(target, content[source], dtype)
            return content

        delivered = self._pool.submit(deliver)
        self._cache[chunk] = delivered, memory
        return delivered

    def _settle(self, chunk: _Chunk, delivered: Future[Bytes], jobs: dict[_Chunk, list[_Job]]) -> None:
        """Wait for a chunk. State is read from the front on, so one that is read to its end is done with."""
        content = delivered.result()
        if chunk in self._cache and max(source.stop for source, _ in jobs[chunk]) == len(content):
            self._spare.append(self._cache.pop(chunk)[1])

    def _memory(self) -> Bytes:
        """For one more chunk: that of one that is done with, or was not used for longest, or as long as there is room
        new. Fresh memory has to be zeroed page by page first, which costs as much as a copy."""
        if self._spare:
            return self._spare.pop()
        if not self._cache or (len(self._cache) + 1) * self._chunk_bytes <= _CACHE_BYTES:
            return pages_empty(self._chunk_bytes)
        _, (future, memory) = self._cache.popitem(last=False)
        wait([future])
        return memory

    def _checked(self, path: str, memory: Bytes | None = None) -> Bytes:
        """A file's bytes, of a chunk without its own CRC, after both CRCs were compared."""
        entry = self._commit.files.get(path)
        if entry is None:
            self._damaged(COMMIT, f"does not name {path}")
        content = self._fetch(path, memory)
        if len(content) != entry.size:
            self._damaged(path, f"has {len(content)} bytes instead of {entry.size}")
        end = len(content) - CRC_BYTES if is_chunk(path) else len(content)
        sealed = end == len(content) or content[end:].tobytes() == entry.crc.to_bytes(CRC_BYTES, "little")
        if not sealed or crc32c(content[:end]) != entry.crc:
            self._damaged(path, "its CRC-32C is wrong: bytes have changed since it was written")
        return content[:end]

    def _fetch(self, path: str, memory: Bytes | None = None) -> Bytes:
        try:
            return self._folder.load(path, memory, direct=self._alone)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            self._damaged(path, "is missing")
        except OSError as error:
            raise CheckpointError(f"{self._folder.path}/{path} cannot be read: {error}") from error

    def _parse(self, path: str, content: bytes, loads: Callable[[bytes], _T]) -> _T:
        try:
            return loads(content)
        except ValueError as error:
            self._damaged(path, error)

    def _json(self, path: str) -> dict[str, Any]:
        return self._parse(path, self._checked(path).tobytes(), values.loads)

    def _check_sizes(self) -> None:
        if self._commit.step != self.step:
            self._damaged(COMMIT, f"is of step {self._commit.step}")
        sizes = self._folder.sizes()
        for path, entry in self._commit.files.items():
            if path not in sizes:
                self._damaged(path, "is missing")
            if sizes[path] != entry.size:
                self._damaged(path, f"has {sizes[path]} bytes instead of {entry.size}")

    def _index(self, rank: int) -> Index:
        path = f"{shard_folder(rank)}/index.json"
        index = self._parse(path, self._checked(path).tobytes(), Index.loads)
        for array in index.arrays.values():
            for number in range(array.num_chunks):
                entry = self._commit.files.get(f"{shard_folder(rank)}/{array.chunk_file(number)}")
                if entry is None or entry.size != array.chunk * array.item_bytes + CRC_BYTES:
                    self._damaged(path, f"disagrees with {COMMIT} about {array.chunk_file(number)}")
        return index

    def _misfit(self, text: str) -> NoReturn:
        self._damaged("shards", text)

    def _damaged(self, file: str, problem: object) -> NoReturn:
        raise CheckpointDamaged(self.step, f"{self._folder.path}/{file}", str(problem), self._good_step())


def _copy(out: torch.Tensor, content: Bytes, dtype: torch.dtype) -> None:
    """Elements of `dtype` into `out`; on the host by this thread alone, several of which copy at once."""
    if out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous():
        np.copyto(out.view(torch.uint8).numpy(), content)
    else:
        out.copy_(torch.from_numpy(content).view(dtype))
