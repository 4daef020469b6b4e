"""States that lie on drives, and the ring of buffers through which they pass.

A shard's states lie in chunks (`offload.shard.Chunk`). The ring is read ahead across shards and written behind; the
tier answers loads as if in the order asked, so that a chunk may be asked for while its last store is under way.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from offload.arena import Arena
from offload.drive import BLOCK
from offload.hostpool import HostPool
from offload.nvme import NvmeTier
from offload.shard import RING, Buffers, Chunk, Section, Shard, nvme_bytes
from offload.slots_on_drives import SlotsOnDrives


class StatesOnDrives:
    """The states of those of `shards` that are `on_nvme`, and the slots that are there too; gives them their places."""

    def __init__(
        self,
        shards: Sequence[Shard],
        folders: Sequence[Path],
        *,
        direct: bool,
        pool: HostPool,
        register: torch.device | None = None,
    ) -> None:
        """Takes all space and memory at once. register: the CUDA device that slots are copied from and to.

        ArenaError or DriveError if there is too little.
        """
        place, buffers = 0, Buffers.of(shards)
        for shard in shards:
            shard.place, place = place, place + shard.nvme_bytes
        register = register if buffers.num_pieces else None
        self.tier = NvmeTier(folders, nvme_bytes(shards), direct=direct)  # before memory, whose pages take a while
        try:
            self._arena = Arena(buffers.size_bytes, register=register, pool=pool, for_drives=True)
        except BaseException:
            self.tier.close()
            raise

        def take(count: int, size_bytes: int) -> list[Tensor]:
            return [self._arena.take(size_bytes, torch.uint8, align=BLOCK) for _ in range(count)]

        self._ring = deque(take(RING, buffers.chunk_bytes))
        gradients, weights = (take(buffers.num_pieces, buffers.piece_bytes) for _ in range(2))
        self.slots = SlotsOnDrives(self.tier, gradients, weights)

    def walk(self, shards: Sequence[Shard], *, write: bool) -> "Walk":
        """See `Walk`; one at a time."""
        return Walk(self.tier, self._ring, shards, write=write)

    def close(self) -> None:
        """Let go of drives and memory. A second time does nothing."""
        self._ring.clear()
        try:
            self.tier.close()
        finally:
            self.slots.close()
            self._arena.close()


class _Passing(NamedTuple):
    """A chunk in a buffer of the ring, or on its way there or back."""

    chunk: Chunk
    buffer: Tensor
    answer: "Future[Tensor]"


class Walk:
    """A pass over all chunks of shards on drives, in their order: a context within which they come by `through`.
    Reading begins at once; at its end all is stored, and the ring whole, also where it is given up."""

    def __init__(self, tier: NvmeTier, ring: deque[Tensor], shards: Sequence[Shard], *, write: bool) -> None:
        """write: whether a chunk is stored again once it has been seen."""
        self._tier, self._ring, self._write = tier, ring, write
        self._waiting = (chunk for shard in shards if shard.on_nvme for chunk in shard.chunks())
        self._ahead: deque[_Passing] = deque()
        self._behind: deque[_Passing] = deque()
        self._seen: _Passing | None = None
        self._read_ahead()

    def through(self, shard: Shard) -> Iterator[Section]:
        """The states of the next shard on drives, part by part, each there until the next is asked for. When they end,
        the stores of all of them have been asked for: who loads a slot from then on finds what is new."""
        for _ in shard.chunks():
            chunk, buffer, _ = self._next()
            weight = chunk.slot_in(buffer[chunk.states_bytes :]) if chunk.has_slot else shard.slot[chunk.start :]
            yield Section(chunk.start, chunk.states_in(buffer), weight[: chunk.numel])
        self._put_back()

    def __enter__(self) -> "Walk":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            while kind is None and self._behind:
                self._reclaim()
        finally:
            for passing in (*self._behind, *self._ahead):
                passing.answer.exception()
            self._ring.extend(passing.buffer for passing in (*self._behind, *self._ahead))
            if self._seen:
                self._ring.append(self._seen.buffer)

    def _next(self) -> _Passing:
        self._put_back()
        while not self._ahead:
            self._reclaim()
            self._read_ahead()
        self._ahead[0].answer.result()
        self._seen = self._ahead.popleft()
        return self._seen

    def _put_back(self) -> None:
        """Hand what was seen last to the drives, or its buffer to the ring."""
        if self._seen is None:
            return
        chunk, buffer, _ = self._seen
        if self._write:
            answer = self._tier.store(chunk.place, buffer[: chunk.size_bytes])
            self._behind.append(_Passing(chunk, buffer, answer))
        else:
            self._ring.append(buffer)
        self._seen = None
        while self._behind and self._behind[0].answer.done():
            self._reclaim()
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Ask for what the free buffers can hold."""
        while self._ring and (chunk := next(self._waiting, None)):
            answer = self._tier.load(chunk.place, self._ring[0][: chunk.size_bytes])
            self._ahead.append(_Passing(chunk, self._ring.popleft(), answer))

    def _reclaim(self) -> None:
        """Wait for the oldest store; its buffer is free again."""
        self._behind[0].answer.result()
        self._ring.append(self._behind.popleft().buffer)
