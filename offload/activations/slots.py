"""Slots of host memory for what blocks leave, and the drives behind them.

[Note: which blocks go on to drives] Where host memory holds fewer slots than blocks leave, what the first blocks left
is stored on NVMe and their slots go to later blocks: it is wanted last, so that it has the longest time both ways. The
backward begins with what is still in host memory, and as a slot has been read it is filled from the drives with what
is wanted next. So as many blocks as there are slots are written behind, and read ahead.

    forward   0 1 2 3 4 5      3 slots: what 0, 1 and 2 left is stored, what 3, 4 and 5 left stays
    backward  5 4 3 2 1 0      once 5 is on the device, its slot is filled with what 2 left, and so on

A thread waits for the device's copies and asks the drives (`offload/nvme.py`), in the order in which it was told. Who
wants a slot that is still being stored waits for that, who wants what is still being loaded for that, nobody else.
After a store has failed the next who asks for a slot or a load gets its DriveError.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.arena import Arena
from offload.drive import BLOCK, DriveError, SystemCalls
from offload.mounts import space_of
from offload.nvme import NvmeTier
from offload.space import round_up

POISON = 0xFF
"""Every byte of it is a NaN in any floating-point format."""
MEASURED_BYTES = 1 << 30
Event = torch.cuda.Event | None
"""None on CPU, where everything is done when it returns."""


@dataclass
class Memory:
    """A buffer on the device, or a slot in host memory."""

    data: Tensor
    """1-D uint8."""
    free: Event = None
    """After it, nobody uses what is in there."""
    home: "Slots | None" = None


@dataclass(frozen=True, kw_only=True)
class Drives:
    """Where slots may be stored: what `offload.options` say of drives."""

    folders: Sequence[Path]
    """One a drive."""
    direct: bool = True
    most_bytes: int | None = None
    """On all together. None: what is needed."""
    sharing: int = 1
    """How many ranks take of what is free there."""
    calls: SystemCalls | None = None

    def open(self, size_bytes: int) -> NvmeTier:
        """DriveError where they have no room for it."""
        return NvmeTier(self.folders, size_bytes, direct=self.direct, calls=self.calls)

    def room_bytes(self) -> float:
        """What they may hold, and have free for one of the ranks."""
        free, _ = space_of(self.folders)
        return min(free // self.sharing, math.inf if self.most_bytes is None else self.most_bytes)

    def bytes_per_s(self) -> float:
        """What they take, or twice what they give where that is less: a backward lasts twice as long as a forward, or
        longer. Measured on 1 GiB, or what they have room for, the better of two rounds; seconds."""
        size_bytes = int(min(MEASURED_BYTES, self.room_bytes())) // BLOCK * BLOCK
        if not size_bytes:
            return 0.0
        rates = []
        with Arena(size_bytes, for_drives=True) as arena, self.open(size_bytes) as tier:
            memory = arena.take(size_bytes, torch.uint8, align=BLOCK)
            for _ in range(2):
                start = time.perf_counter()
                tier.store(0, memory).result()
                stored = time.perf_counter()
                tier.load(0, memory).result()
                rates.append(size_bytes / max(stored - start, (time.perf_counter() - stored) / 2))
            del memory
        return max(rates)


@dataclass(eq=False)
class Stored:
    """What a block left, on the drives or on its way."""

    home: "Slots"
    place: int
    """Which piece of the drives."""
    size_bytes: int
    memory: Memory | None = None
    """Where it is loaded to, once `answer` is there."""
    answer: "Future[None] | None" = None
    """None: not asked for yet."""


class Slots:
    """Equal pieces of an arena, fewer than blocks leave where there is a tier behind. One thread at a time."""

    def __init__(self, arena: Arena, tier: NvmeTier | None, slot_bytes: int, *, num: int, num_blocks: int) -> None:
        """arena: of `num` slots. tier: of the other blocks' of `num_blocks`; both belong to this from now on."""
        self.arena, self.tier, self.slot_bytes, self.num, self.num_blocks = arena, tier, slot_bytes, num, num_blocks
        self.num_cut = 0
        self.free: deque[Memory] = deque()
        """Longest first."""
        self.poison = False
        self._places = list(range(num_blocks - num))
        self._storing: deque[tuple[Future[None], Memory]] = deque()
        self._stored: list[Stored] = []
        """Not asked for yet, in the order of their forwards."""
        self._thread = ThreadPoolExecutor(1, "activations-nvme") if tier else None

    def take(self) -> Memory:
        """A free slot. MemoryError where all hold what a backward will want, DriveError after a failed store."""
        memory = self._next(wait=True)
        if memory is None:
            raise MemoryError(
                f"all {self.num} slots of {self.slot_bytes} bytes for activations are in use: a forward came before "
                "the backward of the last; run each backward before the next forward, or use "
                "offload.activations.mode=recompute"
            )
        return memory

    def give(self, memory: Memory, free: Event) -> None:
        """Nobody uses it after `free`."""
        if self.poison and free is None:
            memory.data.fill_(POISON)
        memory.free = free
        self.free.append(memory)

    def store(self, memory: Memory, size_bytes: int, left: Event) -> Stored:
        """Have the first bytes of a slot stored once `left` has come; the slot is this object's again."""
        stored = Stored(self, self._places.pop(), round_up(size_bytes, BLOCK))
        self._storing.append((self._tell(NvmeTier.store, stored, memory, left), memory))
        self._stored.append(stored)
        return stored

    def load_ahead(self) -> None:
        """Begin to load what is wanted next, as far as slots are free."""
        while self._stored and (memory := self._next(wait=False)):
            self._load(self._stored[-1], memory)

    def load(self, stored: Stored) -> Memory:
        """Wait until it is in host memory; the caller gives the slot back. DriveError where that fails."""
        if stored.answer is None:
            self._load(stored, self.take())
        assert stored.answer is not None and stored.memory is not None
        _check(stored.answer)
        return stored.memory

    def forget(self, stored: Stored) -> None:
        """Nobody wants it any more."""
        if stored.memory is None:
            self._stored.remove(stored)
            self._places.append(stored.place)
        else:
            assert stored.answer is not None
            wait_for([stored.answer])
            self.give(stored.memory, None)

    def close_if_idle(self) -> None:
        """Let go of host memory and drives once every slot is back and nothing is on its way."""
        if not self._stored and len(self.free) + len(self._storing) == self.num_cut:
            self.close_drives()
            self.free.clear()
            self._storing.clear()
            self.arena.close()

    def close_drives(self) -> None:
        """What is still to be stored is not."""
        if self.tier is None or self._thread is None:
            return
        self._thread.shutdown(cancel_futures=True)
        with suppress(DriveError):  # of a store that nobody has asked for since, or who did was told
            self.tier.close()

    def _next(self, *, wait: bool) -> Memory | None:
        """A free slot, or a new one; `wait` for one that is being stored if there is no other."""
        while self._storing and (self._storing[0][0].done() or (wait and not self.free and self.num_cut == self.num)):
            answer, memory = self._storing.popleft()
            wait_for([answer])
            self.give(memory, None)
            _check(answer)
        if self.free:
            return self.free.popleft()
        if self.num_cut == self.num:
            return None
        self.num_cut += 1
        return Memory(self.arena.take(self.slot_bytes, torch.uint8, align=BLOCK), home=self)

    def _load(self, stored: Stored, memory: Memory) -> None:
        self._stored.remove(stored)
        stored.memory, stored.answer = memory, self._tell(NvmeTier.load, stored, memory, memory.free)
        self._places.append(stored.place)  # what is stored there next waits for this, [Note: order] in offload/tier.py

    def _tell(self, act: Callable[..., Any], stored: Stored, memory: Memory, after: Event) -> "Future[None]":
        assert self._thread is not None
        offset, data = stored.place * self.slot_bytes, memory.data[: stored.size_bytes]

        def move() -> None:
            if after is not None:
                after.synchronize()
            act(self.tier, offset, data).result()

        return self._thread.submit(move)


def _check(answer: "Future[None]") -> None:
    """Wait, and raise what failed: a copy, or a Future that a graph leads to would hold that graph by the frames that
    its error passes, where no collector sees it."""
    if (error := answer.exception()) is not None:
        raise copy(error) from error
