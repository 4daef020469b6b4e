"""Optimizer states that live in host memory or on NVMe, and are updated there while the device goes on.

A `Shard` is one range of parameters whose fp32 master weights and moments (12 bytes a parameter) are away from the
device. Beside them it has a *slot* in host memory, one element a parameter: the gradient lands there as the backward
brings it, the update overwrites it with the new weight, and from there the weight goes back. `AwayStates` owns the
memory (one arena, cut once), the drives, the threads, and the order of things:

    take(shard, grad)       gradient -> slot, on a stream of its own; the device's memory is free at once
    update([...], scale)    from then on, shard by shard in the order given: load · AdamW · store · weight -> device
    Update.finish()         the caller's stream sees the new weights of a shard; the host waits only if it must

[Note: just in time] The factor that clips by the global norm is known when the last gradient is. Shards are therefore
updated in the order in which the next forward asks for them, while it runs. The factor itself is awaited by the
updating thread: whoever calls `update` does not wait for the device.

[Note: NVMe] A shard's states lie in chunks of ``[master | exp_avg | exp_avg_sq]``. A ring of buffers in the arena is
read ahead across shards and written behind; the tier answers loads as if in the order asked, so that a chunk may be
asked for while its last store is under way.

Sources: Fuyou, arXiv 2403.06504, section 4 (updates beside the device's work); GreedySnake, arXiv 2512.17570 (the
optimizer step beside the next forward).
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from offload.adamw import State, adamw
from offload.arena import ALIGN, Arena, layout
from offload.hostpool import HostPool
from offload.nvme import NvmeTier
from offload.space import round_up
from offload.state import MASTER

KINDS = (MASTER, "exp_avg", "exp_avg_sq")
CHUNK = (4 << 20) + 1184
"""Parameters in a chunk on NVMe: its arrays begin 4736 bytes apart modulo 64 KiB, see `offload/arena.py`."""
RING = 5
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class AdamW:
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


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

    @property
    def done(self) -> bool:
        """Whether `finish` will not make the host wait."""
        return self.answer.done()

    def finish(self) -> None:
        """Let what the caller does next, on its current stream, see the new weights. Raises what went wrong."""
        if event := self.answer.result():
            torch.cuda.current_stream().wait_event(event)


@dataclass(eq=False, kw_only=True)
class Shard:
    """`numel` parameters whose states are away. `AwayStates.add` makes it."""

    numel: int
    on_nvme: bool
    dtype: torch.dtype
    """Of the slot: the dtype in which gradients leave and weights come back."""
    slot: Tensor = field(init=False)
    target: Tensor | None = None
    """Where on the device new weights go; None: they stay in the slot."""
    state: State = field(init=False)
    """In host memory, unless it is on NVMe."""
    place: int = 0
    """Bytes from the start of the tier."""
    arrived: torch.cuda.Event | None = None
    """After which the gradient is in the slot."""
    left: torch.cuda.Event | None = None
    """After which the weights in the slot have been read."""

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Elements ``start:stop`` and the place in the tier of each chunk."""
        place = self.place
        for start in range(0, self.numel, CHUNK):
            stop = min(start + CHUNK, self.numel)
            yield start, stop, place
            place += chunk_bytes(stop - start)


def chunk_bytes(numel: int) -> int:
    return round_up(12 * numel, _BLOCK)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    work: Sequence[tuple[Shard, Sequence[Run], Update]]
    scale: Tensor | None
    known: torch.cuda.Event | None
    lr: float
    updates: int


class AwayStates:
    """All shards of a rank whose states are away from the device."""

    def __init__(
        self,
        adamw: AdamW,
        *,
        device: torch.device,
        pool: HostPool,
        nvme_folders: Sequence[Path] = (),
        nvme_direct: bool = True,
    ) -> None:
        self._adamw, self._device, self.pool = adamw, device, pool
        self._folders, self._direct = nvme_folders, nvme_direct
        self.shards: list[Shard] = []
        self._extra_bytes = 0
        self.arena: Arena | None = None
        self._tier: NvmeTier | None = None
        self._cuda = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if self._cuda else None
        self._in = torch.cuda.Stream(device) if self._cuda else None
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._under_way: list[Update] = []
        self.update_s = 0.0
        """Seconds that the last updates took, from when their gradients and the factor were known."""
        self._ring: deque[Tensor] = deque()

    # ------------------------------------------------------------------------------------------------ memory

    def add(self, numel: int, dtype: torch.dtype, *, on_nvme: bool) -> Shard:
        """A shard to be; its memory comes with `allocate`."""
        shard = Shard(numel=numel, on_nvme=on_nvme, dtype=dtype)
        self.shards.append(shard)
        return shard

    def reserve(self, size_bytes: int) -> None:
        """Make the arena larger by what the caller will `take` from it."""
        self._extra_bytes += round_up(size_bytes, ALIGN)

    @property
    def host_bytes(self) -> int:
        """What the arena needs for the shards added and the memory reserved."""
        return self._extra_bytes + sum(map(self._shard_bytes, self.shards)) + self._ring_bytes()

    @property
    def nvme_bytes(self) -> int:
        return sum(chunk_bytes(stop - start) for s in self.shards if s.on_nvme for start, stop, _ in s.chunks())

    @property
    def tier(self) -> NvmeTier | None:
        return self._tier

    def allocate(self) -> None:
        """Take all memory at once, host and NVMe, and give each shard its own. ArenaError or DriveError if there is too
        little."""
        if not self.host_bytes:
            return
        self.arena = Arena(self.host_bytes, register=self._device if self._cuda else None, pool=self.pool)
        if self.nvme_bytes:
            self._tier = NvmeTier(self._folders, self.nvme_bytes, direct=self._direct)
        largest = self._largest_chunk()
        for _ in range(RING if largest else 0):
            self._ring.append(self.arena.take(chunk_bytes(largest), torch.uint8, align=_BLOCK))
        place = 0
        for shard in self.shards:
            if shard.on_nvme:
                shard.slot, shard.place = self.arena.take(shard.numel, shard.dtype), place
                place += sum(chunk_bytes(stop - start) for start, stop, _ in shard.chunks())
            else:
                *state, shard.slot = self.arena.take_together(shard.numel, self._dtypes(shard))
                shard.state = (state[0], state[1], state[2])
        self._thread = threading.Thread(target=self._work, name="offload-update", daemon=True)
        self._thread.start()

    def _dtypes(self, shard: Shard) -> list[torch.dtype]:
        return [torch.float32, torch.float32, torch.float32, shard.dtype]

    def _shard_bytes(self, shard: Shard) -> int:
        if shard.on_nvme:
            return round_up(shard.numel * shard.dtype.itemsize, ALIGN)
        return layout(shard.numel, self._dtypes(shard))[1]

    def _largest_chunk(self) -> int:
        return max((min(CHUNK, shard.numel) for shard in self.shards if shard.on_nvme), default=0)

    def _ring_bytes(self) -> int:
        largest = self._largest_chunk()
        return (RING * chunk_bytes(largest) + _BLOCK) if largest else 0

    # ------------------------------------------------------------------------------------------------ a step

    def take(self, shard: Shard, grad: Tensor) -> None:
        """Start moving a gradient (numel, on the device) into the shard's slot; the caller may let go of it.

        The shard's last update has been finished.
        """
        if self._out is None:
            shard.slot.copy_(grad)
            return
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            if shard.left is not None:
                self._out.wait_event(shard.left)
            shard.slot.copy_(grad, non_blocking=True)
            shard.arrived = self._out.record_event()
        grad.record_stream(self._out)

    def update(
        self, work: Sequence[tuple[Shard, Sequence[Run]]], *, scale: Tensor | None, lr: float, updates: int
    ) -> list[Update]:
        """Start updating shards from the gradients in their slots, in this order.

        scale: None, or a 0-dim tensor on the device that gradients are multiplied by. updates: how many there were,
        this one included. What no run covers keeps its state, and its weight is put into the slot again.
        """
        known = None
        if scale is not None and self._cuda:
            host = torch.empty((), dtype=scale.dtype, pin_memory=True)
            host.copy_(scale, non_blocking=True)
            scale, known = host, torch.cuda.current_stream().record_event()
        answers = [Update() for _ in work]
        batch = [(shard, runs, answer) for (shard, runs), answer in zip(work, answers, strict=True)]
        self._under_way = answers
        self._batches.put(_Batch(work=batch, scale=scale, known=known, lr=lr, updates=updates))
        return answers

    def settle(self) -> None:
        """Wait until no update is under way."""
        for update in self._under_way:
            update.answer.result()
        self._under_way = []

    def close(self) -> None:
        """Let go of threads, drives and memory. A second time does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._batches.put(None)
            thread.join()
        if self._tier is not None:
            self._tier.close()
        if self.arena is not None:
            self.arena.close()

    def _work(self) -> None:
        if self._cuda:
            torch.cuda.set_device(self._device)
        while batch := self._batches.get():
            answers = deque(answer for *_, answer in batch.work)
            try:
                for event in self._update(batch):
                    answers.popleft().answer.set_result(event)
            except BaseException as error:
                for answer in answers:
                    answer.answer.set_exception(error)

    def _update(self, batch: _Batch) -> Iterator[torch.cuda.Event | None]:
        """Update the shards of a batch; yields each one's event."""
        states = self.walk([shard for shard, *_ in batch.work], write=True)
        if batch.known is not None:
            batch.known.synchronize()
        scale = 1.0 if batch.scale is None else float(batch.scale)
        start_s = time.perf_counter()
        for shard, runs, _ in batch.work:
            if shard.arrived is not None:
                shard.arrived.synchronize()
            done = 0
            while done < shard.numel:
                start, state = next(states)
                done = start + state[0].numel()
                self._step(shard, start, state, runs, scale, batch)
            yield self._send(shard)
        next(states, None)  # hands the last chunk to the drives
        self.update_s = time.perf_counter() - start_s

    def _step(self, shard: Shard, start: int, state: State, runs: Sequence[Run], scale: float, batch: _Batch) -> None:
        stop, place = start + state[0].numel(), start
        for run in runs:
            low, high = max(start, run.start), min(stop, run.stop)
            if low >= high:
                continue
            self._restore(shard, state, start, place, low)
            part, place = slice(low - start, high - start), high
            master, exp_avg, exp_avg_sq = state
            adamw(
                master[part],
                exp_avg[part],
                exp_avg_sq[part],
                shard.slot[low:high],
                shard.slot[low:high],
                scale=scale,
                lr=batch.lr,
                beta1=self._adamw.beta1,
                beta2=self._adamw.beta2,
                eps=self._adamw.eps,
                weight_decay=self._adamw.weight_decay if run.decays else 0.0,
                updates=batch.updates,
                pool=self.pool,
            )
        self._restore(shard, state, start, place, stop)

    @staticmethod
    def _restore(shard: Shard, state: State, origin: int, start: int, stop: int) -> None:
        """Weights that get no update: back into the slot, where a gradient may have been."""
        if start < stop:
            shard.slot[start:stop] = state[0][start - origin : stop - origin]

    def _send(self, shard: Shard) -> torch.cuda.Event | None:
        """Start bringing the weights in the slot to the device."""
        if shard.target is None:
            return None
        if self._in is None:
            shard.target.copy_(shard.slot)
            return None
        with torch.cuda.stream(self._in):
            shard.target.copy_(shard.slot, non_blocking=True)
            shard.left = self._in.record_event()
        return shard.left

    # ------------------------------------------------------------------------------------------------ state

    def walk(self, shards: Sequence[Shard], *, write: bool) -> Iterator[tuple[int, State]]:
        """The states of shards, one after the other, in parts ``(first element, (master, exp_avg, exp_avg_sq))``.

        A part on NVMe is there until the next is asked for; with `write` it is then stored again. Reading begins with
        the call. One walk at a time.
        """
        waiting = (chunk for shard in shards if shard.on_nvme for chunk in shard.chunks())
        ahead: deque[tuple[Future[Tensor], Tensor]] = deque()

        def read_ahead() -> None:
            """Ask for what the free buffers can hold."""
            while self._ring and (chunk := next(waiting, None)):
                assert self._tier is not None
                start, stop, place = chunk
                buffer = self._ring.popleft()
                ahead.append((self._tier.load(place, buffer[: chunk_bytes(stop - start)]), buffer))

        def go() -> Iterator[tuple[int, State]]:
            stores: deque[tuple[Future[Tensor], Tensor]] = deque()
            for shard in shards:
                if not shard.on_nvme:
                    yield 0, shard.state
                    continue
                assert self._tier is not None
                for start, stop, place in shard.chunks():
                    while not ahead:
                        self._reclaim(stores)
                        read_ahead()
                    loaded, buffer = ahead.popleft()
                    chunk = loaded.result()
                    yield start, _arrays(chunk, stop - start)
                    if write:
                        stores.append((self._tier.store(place, chunk), buffer))
                    else:
                        self._ring.append(buffer)
                    while stores and stores[0][0].done():
                        self._reclaim(stores)
                    read_ahead()
            while stores:
                self._reclaim(stores)

        read_ahead()
        return go()

    def _reclaim(self, stores: "deque[tuple[Future[Tensor], Tensor]]") -> None:
        """Wait for the oldest store; its buffer is free again."""
        answer, buffer = stores.popleft()
        answer.result()
        self._ring.append(buffer)


def _arrays(buffer: Tensor, numel: int) -> State:
    master, exp_avg, exp_avg_sq = buffer[: 12 * numel].view(torch.float32).split(numel)
    return master, exp_avg, exp_avg_sq
