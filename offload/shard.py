"""A range of parameters whose states are away from the device, and the memory that ranges take.

Nothing here moves anything: `offload/states.py` does, and gives shards their memory. So a plan can make shards too.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from offload.adamw import State
from offload.arena import ALIGN, layout
from offload.drive import BLOCK
from offload.space import round_up

CHUNK = (4 << 20) + 1184
"""Parameters in a chunk on NVMe: its arrays begin 4736 bytes apart modulo 64 KiB, see `offload/arena.py`."""
LEAVING = 2
"""Gradients on their way to host memory, beside the one that is made."""
RING = 5
"""Buffers of a chunk each, between the drives and the update."""
OUTGOING = 3
"""Buffers for weights of ping-pong shards on their way to the device."""


@dataclass(frozen=True)
class Terms:
    """What an update is made by, beside the gradient."""

    lr: float
    updates: int
    """How many updates there were, this one included."""
    runs: "tuple[Run, ...]"


@dataclass(frozen=True)
class Run:
    """Neighbouring parameters of a shard that are updated alike: elements ``start:stop``."""

    start: int
    stop: int
    decays: bool


class Update:
    """A shard's update under way."""

    def __init__(self) -> None:
        self.answer: Future[torch.cuda.Event | None] = Future()

    def finish(self) -> None:
        """Let what the caller does next, on its current stream, see the new weights. Raises what went wrong."""
        if event := self.answer.result():
            torch.cuda.current_stream().wait_event(event)


@dataclass(eq=False, kw_only=True)
class Shard:
    """`numel` parameters whose states are away; its memory comes with `AwayStates.allocate`."""

    numel: int
    dtype: torch.dtype
    """Of the slot: the dtype in which gradients leave and weights come back."""
    on_nvme: bool
    pingpong: bool = False
    """Whether the states are there twice, in host memory."""
    stays: bool = False
    """Whether the weights have no `target`: they are used from `weight`, in host memory."""
    slot: Tensor = field(init=False)
    target: Tensor | None = None
    """Where on the device new weights go; None: they stay in host memory."""
    apart: Tensor | None = None
    """Host memory for the weights, where they do not take the gradient's place in the slot."""
    homes: list[State] = field(default_factory=list)
    """Its own memory for states: two where they are speculated on, none on NVMe."""
    state: State = field(init=False)
    """The current version: in a home, or where snapshots gave it room."""
    made: tuple[Terms, State] | None = None
    """By which terms the next version was made from the gradient in the slot, and where."""
    place: int = 0
    """Bytes from the start of the tier."""
    arrived: torch.cuda.Event | None = None
    """After which the gradient is in the slot."""
    left: torch.cuda.Event | None = None
    """After which the weights in the slot have been read."""

    @property
    def weight(self) -> Tensor:
        """Where the update leaves new weights in host memory."""
        return self.slot if self.apart is None else self.apart

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of the arrays that a shard in host memory has, the slot last."""
        weights = 2 if self.pingpong and self.stays else 1
        return [torch.float32] * (6 if self.pingpong else 3) + [self.dtype] * weights

    @property
    def host_bytes(self) -> int:
        if self.on_nvme:
            return round_up(self.numel * self.dtype.itemsize, ALIGN)
        return _together(self.numel, tuple(self.dtypes))

    @property
    def nvme_bytes(self) -> int:
        return sum(chunk_bytes(stop - start) for start, stop, _ in self.chunks()) if self.on_nvme else 0

    @property
    def passing_bytes(self) -> int:
        """Of weights that pass through host memory to the device apart from the slot."""
        return self.numel * self.dtype.itemsize if self.pingpong and not self.stays else 0

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Elements ``start:stop`` and the place in the tier of each chunk."""
        place = self.place
        for start in range(0, self.numel, CHUNK):
            stop = min(start + CHUNK, self.numel)
            yield start, stop, place
            place += chunk_bytes(stop - start)


@lru_cache
def _together(numel: int, dtypes: tuple[torch.dtype, ...]) -> int:
    return layout(numel, dtypes)[1]


def chunk_bytes(numel: int) -> int:
    """Of the three states of `numel` elements, fp32, on a drive or in the ring: whole blocks."""
    return round_up(12 * numel, BLOCK)


def largest_chunk(shards: Sequence[Shard]) -> int:
    """Parameters in the largest chunk on NVMe; 0 where there is none."""
    return max((min(CHUNK, shard.numel) for shard in shards if shard.on_nvme), default=0)


def ring_bytes(shards: Sequence[Shard]) -> int:
    """Of host memory, between the drives and the update: `RING` chunks."""
    return RING * chunk_bytes(largest_chunk(shards))


def host_bytes(shards: Sequence[Shard]) -> int:
    """Of host memory that shards take, with the buffers that they share."""
    passing = max((shard.passing_bytes for shard in shards), default=0)
    return sum(shard.host_bytes for shard in shards) + ring_bytes(shards) + OUTGOING * round_up(passing, ALIGN)


def nvme_bytes(shards: Sequence[Shard]) -> int:
    """On drives, of those whose states are there."""
    return sum(shard.nvme_bytes for shard in shards)
