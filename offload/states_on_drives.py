"""States that lie on drives, and the ring of buffers through which they pass.

A shard's states lie in chunks of ``[master | exp_avg | exp_avg_sq]``. The ring is read ahead across shards and written
behind; the tier answers loads as if in the order asked, so that a chunk may be asked for while its last store is under
way.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from offload.adamw import State
from offload.arena import Arena
from offload.drive import BLOCK
from offload.hostpool import HostPool
from offload.nvme import NvmeTier
from offload.shard import RING, Shard, chunk_bytes, nvme_bytes, ring_bytes


class StatesOnDrives:
    """The states of those of `shards` that are `on_nvme`; gives them their places."""

    def __init__(self, shards: Sequence[Shard], folders: Sequence[Path], *, direct: bool, pool: HostPool) -> None:
        """Takes all space and memory at once. ArenaError or DriveError if there is too little."""
        place, size_bytes = 0, ring_bytes(shards)
        for shard in shards:
            shard.place, place = place, place + shard.nvme_bytes
        self._arena = Arena(size_bytes, pool=pool, for_drives=True)
        self._free = deque(self._arena.take(size_bytes // RING, torch.uint8, align=BLOCK) for _ in range(RING))
        self.tier = NvmeTier(folders, nvme_bytes(shards), direct=direct)

    def walk(self, shards: Sequence[Shard], *, write: bool) -> Iterator[tuple[int, State]]:
        """See `AwayStates.walk`."""
        waiting = (chunk for shard in shards if shard.on_nvme for chunk in shard.chunks())
        ahead: deque[tuple[Future[Tensor], Tensor]] = deque()

        def read_ahead() -> None:
            """Ask for what the free buffers can hold."""
            while self._free and (chunk := next(waiting, None)):
                start, stop, place = chunk
                buffer = self._free.popleft()
                ahead.append((self.tier.load(place, buffer[: chunk_bytes(stop - start)]), buffer))

        def go() -> Iterator[tuple[int, State]]:
            stores: deque[tuple[Future[Tensor], Tensor]] = deque()
            try:
                for shard in shards:
                    if not shard.on_nvme:
                        yield 0, shard.state
                        continue
                    for start, stop, place in shard.chunks():
                        while not ahead:
                            self._reclaim(stores)
                            read_ahead()
                        loaded, buffer = ahead[0]
                        chunk = loaded.result()
                        yield start, _arrays(chunk, stop - start)
                        ahead.popleft()
                        if write:
                            stores.append((self.tier.store(place, chunk), buffer))
                        else:
                            self._free.append(buffer)
                        while stores and stores[0][0].done():
                            self._reclaim(stores)
                        read_ahead()
                while stores:
                    self._reclaim(stores)
            finally:  # also of a walk that is given up
                for answer, buffer in (*stores, *ahead):
                    answer.exception()
                    self._free.append(buffer)

        read_ahead()
        return go()

    def close(self) -> None:
        """Let go of drives and memory. A second time does nothing."""
        self._free.clear()
        self.tier.close()
        self._arena.close()

    def _reclaim(self, stores: "deque[tuple[Future[Tensor], Tensor]]") -> None:
        """Wait for the oldest store; its buffer is free again."""
        answer, buffer = stores.popleft()
        answer.result()
        self._free.append(buffer)


def _arrays(buffer: Tensor, numel: int) -> State:
    master, exp_avg, exp_avg_sq = buffer[: 12 * numel].view(torch.float32).split(numel)
    return master, exp_avg, exp_avg_sq
