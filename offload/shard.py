"""A range of parameters whose states are away from the device, and the memory that ranges take.

Nothing here moves anything: `offload/states.py` does, and gives shards their memory. So a plan can make shards too.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

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
NEIGHBOURS = 2
"""Shards whose slots have room in host memory on their way to drives, and as many on their way back: one is copied
while the other is stored or loaded."""
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

    def __init__(self, gradient: Tensor | None) -> None:
        self.gradient = gradient
        """In host memory, where it is there."""
        self.answer: Future[torch.cuda.Event | None] = Future()
        """The weights are there, after the event where they go to a GPU."""
        self.states: Future[None] = Future()
        """The new states are there too."""

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
    weights_first: bool = False
    """Whether an update makes the weights and leaves the states, in host memory, for later."""
    stays: bool = False
    """Whether the weights have no `target`: they are used from where the update leaves them."""
    slot_follows: bool = False
    """Whether the slot is on NVMe where the states are."""
    slot: Tensor = field(init=False)
    """In host memory, if it is not `slot_on_nvme`."""
    target: Tensor | None = None
    """Where on the device new weights go; None: they stay in host memory."""
    apart: Tensor | None = None
    """Host memory for the weights of a ping-pong shard, where they stay; they do not take the gradient's place then."""
    spare: Tensor = field(init=False)
    """Of a shard that is updated weights first: what was, and will be, the slot. See `turn`."""
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
    def slot_on_nvme(self) -> bool:
        return self.on_nvme and self.slot_follows

    @property
    def weight(self) -> Tensor:
        """Where the update leaves new weights in host memory."""
        return self.slot if self.apart is None else self.apart

    def turn(self) -> Tensor | None:
        """The gradient in the slot, if that is in host memory. Where the states are made from it after the weights the
        two slots change places: the weights go to the other, as will the next gradient."""
        if self.slot_on_nvme:
            return None
        gradient = self.slot
        if self.weights_first:
            self.slot, self.spare = self.spare, self.slot
        return gradient

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of the arrays that a shard in host memory has, the slot last."""
        weights = 2 if self.weights_first or (self.pingpong and self.stays) else 1
        return [torch.float32] * (6 if self.pingpong else 3) + [self.dtype] * weights

    @property
    def host_bytes(self) -> int:
        if self.slot_on_nvme:
            return 0
        if self.on_nvme:
            return round_up(self.numel * self.dtype.itemsize, ALIGN)
        return _together(self.numel, tuple(self.dtypes))

    @property
    def nvme_bytes(self) -> int:
        return sum(count * chunk.size_bytes for count, chunk in self.cut()) if self.on_nvme else 0

    @property
    def slot_bytes(self) -> int:
        """On NVMe: what a gradient takes to be stored, and the weights to be loaded."""
        return sum(count * chunk.slot_bytes for count, chunk in self.cut()) if self.slot_on_nvme else 0

    @property
    def passing_bytes(self) -> int:
        """Of weights that pass through host memory to the device apart from the slot."""
        return self.numel * self.dtype.itemsize if self.pingpong and not self.stays else 0

    def chunks(self) -> "Iterator[Chunk]":
        """In their order, of a shard on NVMe."""
        place = self.place
        for start in range(0, self.numel, CHUNK):
            stop = min(start + CHUNK, self.numel)
            chunk = Chunk(start, stop, place, self.dtype, self.slot_follows)
            yield chunk
            place += chunk.size_bytes

    def cut(self) -> "list[tuple[int, Chunk]]":
        """How many chunks there are of each size, the larger first; without their places."""
        whole, rest = divmod(self.numel, CHUNK)
        sizes = [(whole, CHUNK), (min(1, rest), rest)]
        return [(count, Chunk(0, numel, 0, self.dtype, self.slot_follows)) for count, numel in sizes if count]


@dataclass(frozen=True)
class Chunk:
    """Elements ``start:stop`` of a shard, as they lie on a drive: ``master | exp_avg | exp_avg_sq`` (fp32) in whole
    blocks, and ``slot`` in whole blocks, where that is there too."""

    start: int
    stop: int
    place: int
    """Bytes from the start of the tier."""
    dtype: torch.dtype
    """Of the slot."""
    has_slot: bool

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def states_bytes(self) -> int:
        return round_up(12 * self.numel, BLOCK)

    @property
    def slot_bytes(self) -> int:
        return round_up(self.numel * self.dtype.itemsize, BLOCK) if self.has_slot else 0

    @property
    def size_bytes(self) -> int:
        return self.states_bytes + self.slot_bytes

    @property
    def slot_place(self) -> int:
        return self.place + self.states_bytes

    def states_in(self, buffer: Tensor) -> State:
        """The states in bytes that were loaded from `place`."""
        master, exp_avg, exp_avg_sq = buffer[: 12 * self.numel].view(torch.float32).split(self.numel)
        return master, exp_avg, exp_avg_sq

    def slot_in(self, buffer: Tensor) -> Tensor:
        """The slot in bytes that were loaded from `slot_place`."""
        return buffer[: self.numel * self.dtype.itemsize].view(self.dtype)


class Section(NamedTuple):
    """Elements of a shard from `start` on, in host memory for a moment, or there for good."""

    start: int
    state: State
    weight: Tensor
    """Where the update leaves new weights; on NVMe the gradient was there."""


@lru_cache
def _together(numel: int, dtypes: tuple[torch.dtype, ...]) -> int:
    return layout(numel, dtypes)[1]


@dataclass(frozen=True)
class Buffers:
    """Host memory between drives and what is done with what comes from them; see `offload/states_on_drives.py` and
    `offload/slots_on_drives.py`."""

    chunk_bytes: int
    """Of each of the `RING` that states pass through."""
    piece_bytes: int
    """A chunk's slot."""
    num_pieces: int
    """Of gradients, and as many of weights."""

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "Buffers":
        largest = [shard.cut()[0][1] for shard in shards if shard.on_nvme]
        cut = sorted((sum(n for n, _ in shard.cut()) for shard in shards if shard.slot_on_nvme), reverse=True)
        return cls(
            chunk_bytes=max((chunk.size_bytes for chunk in largest), default=0),
            piece_bytes=max((chunk.slot_bytes for chunk in largest), default=0),
            num_pieces=max(2, sum(cut[:NEIGHBOURS])) if cut else 0,
        )

    @property
    def size_bytes(self) -> int:
        return RING * self.chunk_bytes + 2 * self.num_pieces * self.piece_bytes


def host_bytes(shards: Sequence[Shard]) -> int:
    """Of host memory that shards take, with the buffers that they share."""
    passing = max((shard.passing_bytes for shard in shards), default=0)
    shared = Buffers.of(shards).size_bytes + outgoing_bytes(passing)
    return sum(shard.host_bytes for shard in shards) + shared


def outgoing_bytes(passing_bytes: int) -> int:
    """Of the buffers for weights that pass through host memory, of which so many are the most of a shard."""
    return OUTGOING * round_up(passing_bytes, ALIGN)


def nvme_bytes(shards: Sequence[Shard]) -> int:
    """On drives, of those whose states are there."""
    return sum(shard.nvme_bytes for shard in shards)
