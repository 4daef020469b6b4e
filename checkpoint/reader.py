"""Reading a committed checkpoint, by ranges and checked.

Sizes and metadata are checked when it is opened, a chunk when it is read, everything by `verify`. Nothing read is
executed: files hold numbers and JSON alone, and every path that is read is made here or matched a strict pattern.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NoReturn, TypeVar

import torch

from checkpoint import values
from checkpoint.crc import Bytes, crc32c
from checkpoint.errors import CheckpointDamaged, CheckpointError
from checkpoint.folder import PAGE_BYTES, Folder, pages_empty
from checkpoint.layout import COMMIT, CRC_BYTES, DTYPES, META, ArrayLayout, Commit, Index, Span, is_chunk, shard_folder

_THREADS = 4
_CACHE_BYTES = 512 << 20
"""Checked chunks in memory, those that are read ahead among them: many small parameters share a chunk, and a rank reads
several kinds side by side."""

_T = TypeVar("_T")
_Chunk = tuple[int, ArrayLayout, int]
"""Rank that wrote it, its array, its number."""
_Job = tuple[_Chunk, slice, slice]
"""A chunk, which of its bytes, and where they go in the result."""


class CheckpointReader:
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
        self._spans = self._assemble()
        self._cache: OrderedDict[_Chunk, tuple[Future[Bytes], Bytes]] = OrderedDict()
        """Checked bytes, and the memory they lie in, which is used again: whoever gets them copies them at once."""
        self._current: _Chunk | None = None

    def rank_state(self, rank: int) -> dict[str, Any]:
        """What that rank passed to `save`. KeyError where it was written by fewer ranks."""
        if not 0 <= rank < self.world:
            raise KeyError(
                f"the checkpoint of step {self.step} was written by {self.world} ranks; there is no rank {rank}"
            )
        return self._json(f"{shard_folder(rank)}/rank_state.json")

    def names(self) -> list[str]:
        """Names of all parameters and buffers, in the order they were saved."""
        return list(dict.fromkeys(name for name, _ in self._spans))

    def kinds(self, name: str) -> list[str]:
        """Kinds of state that are there of one parameter."""
        return [kind for found, kind in self._spans if found == name]

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        return self._of(name, kind)[0][1].shape

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return DTYPES[self._of(name, kind)[0][1].dtype].torch

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start:stop`` as a 1-D CPU tensor in the dtype they were saved in (`offload.state.Read`).

        KeyError where there is no such state, ValueError where the range is not in it.
        """
        spans = self._of(name, kind)
        numel = math.prod(spans[0][1].shape)
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"elements {start}:{stop} of {name} ({kind}), which has {numel}")
        out = torch.empty(stop - start, dtype=self.dtype(name, kind))
        self._fill(out.view(torch.uint8).numpy(), self._jobs(spans, start, stop))
        return out

    def verify(self) -> None:
        """Read and check every byte."""
        for _ in self._pool.map(self._checked, self._commit.files):
            pass

    def _of(self, name: str, kind: str) -> list[tuple[int, Span]]:
        try:
            return self._spans[name, kind]
        except KeyError:
            raise KeyError(f"the checkpoint of step {self.step} has no {kind} of {name}") from None

    def _jobs(self, spans: list[tuple[int, Span]], start: int, stop: int) -> list[_Job]:
        """One for every overlap of the range with a chunk."""
        jobs: list[_Job] = []
        for rank, span in spans:
            array = self._indexes[rank].arrays.get((span.kind, span.dtype))
            first, last = max(start, span.start), min(stop, span.stop)
            while array is not None and first < last:
                number, inner = divmod(span.offset + first - span.start, array.chunk)
                count = min(array.chunk - inner, last - first)
                source = _bytes(inner, inner + count, array.item_bytes)
                jobs.append(
                    ((rank, array, number), source, _bytes(first - start, first - start + count, array.item_bytes))
                )
                first += count
        return jobs

    def _fill(self, out: Bytes, jobs: list[_Job]) -> None:
        by_chunk: dict[_Chunk, list[_Job]] = {}
        for job in jobs:
            by_chunk.setdefault(job[0], []).append(job)

        chunks = list(by_chunk)
        for place, chunk in enumerate(chunks):
            self._current, data = chunk, self._chunk(chunk)
            room = _CACHE_BYTES // (chunk[1].chunk * chunk[1].item_bytes)
            for ahead in chunks[place + 1 : place + min(_THREADS, room)] or self._after(chunk):
                self._chunk(ahead)
            content = data.result()
            for _, source, target in by_chunk[chunk]:
                out[target] = content[source]

    def _after(self, chunk: _Chunk) -> list[_Chunk]:
        """What is most likely asked for next: the rest of the array, of which there is one for each kind of state."""
        rank, array, number = chunk
        fits = 2 * _THREADS * array.chunk * array.item_bytes <= _CACHE_BYTES
        return [(rank, array, number + 1)] if fits and number + 1 < array.num_chunks else []

    def _chunk(self, chunk: _Chunk) -> Future[Bytes]:
        """A chunk's elements and padding, checked, from memory or storage."""
        if chunk in self._cache:
            self._cache.move_to_end(chunk)
            return self._cache[chunk][0]
        rank, array, number = chunk
        memory = self._memory(array.chunk * array.item_bytes + CRC_BYTES)
        found = self._pool.submit(self._checked, f"{shard_folder(rank)}/{array.chunk_file(number)}", memory)
        self._cache[chunk] = found, memory
        return found

    def _memory(self, size: int) -> Bytes:
        """For one more chunk of `size` bytes: that of the chunk that was not used for longest, where there is no room.
        Fresh memory has to be zeroed page by page first, which costs as much as a copy."""
        found = None
        while self._cache and size + sum(len(memory) for _, memory in self._cache.values()) > _CACHE_BYTES:
            oldest = next((chunk for chunk in self._cache if chunk != self._current), None)
            if oldest is None:
                break
            future, memory = self._cache.pop(oldest)
            wait([future])
            found = memory if size <= len(memory) < size + PAGE_BYTES else found
        return pages_empty(size) if found is None else found

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

    def _assemble(self) -> dict[tuple[str, str], list[tuple[int, Span]]]:
        """By name and kind the ranks and spans that make up the whole, in order."""
        found: dict[tuple[str, str], list[tuple[int, Span]]] = {}
        for rank, index in enumerate(self._indexes):
            for span in index.spans:
                found.setdefault((span.name, span.kind), []).append((rank, span))
        for (name, kind), spans in found.items():
            spans.sort(key=lambda entry: (entry[1].start, entry[1].stop))
            if len({(span.shape, span.dtype) for _, span in spans}) > 1:
                self._damaged("shards", f"the ranks disagree about shape or dtype of {name} ({kind})")
            ends = [0] + [span.stop for _, span in spans]
            starts = [span.start for _, span in spans] + [math.prod(spans[0][1].shape)]
            if ends != starts:
                self._damaged("shards", f"the pieces of {name} ({kind}) leave gaps or overlap")
        return found

    def _damaged(self, file: str, problem: object) -> NoReturn:
        raise CheckpointDamaged(self.step, f"{self._folder.path}/{file}", str(problem), self._good_step())


def _bytes(start: int, stop: int, item_bytes: int) -> slice:
    return slice(start * item_bytes, stop * item_bytes)
