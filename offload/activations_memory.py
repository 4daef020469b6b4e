"""Where activations lie while they are away, and the two buffers on the device that they come back to.

[Note: made for the longest] Every block that swaps takes one slot of host memory a forward; slots are as large as the
largest and are cut from one arena, made when the first block has run, since only then sizes are known. What a block
leaves grows as the number of its tokens ([Note: varying lengths] in offload/plan/requests.py), so slots and buffers are
made for the most tokens that are to come, whatever came first: then no length makes new ones, and none is moved. Where
that is not known a longer sequence makes new slots, and the old arena is let go of.

Rule: whoever gives memory back says after which event nobody uses it any more, and whoever takes it waits for that.
"""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offload.activations_tape import Source
from offload.arena import Arena, ArenaError
from offload.hostpool import HostPool
from offload.space import round_up

ALIGN = 512
GPU_SHARE = 0.97
"""Of the GPU's memory, or what is allowed of it, what is filled: the rest is for kernels' workspaces and holes."""
POISON = 0xFF
"""Every byte of it is a NaN in any floating-point format."""
Event = torch.cuda.Event | None
"""None on CPU, where everything is done when it returns."""


@dataclass
class Memory:
    """A buffer on the device, or a slot in host memory."""

    data: Tensor
    """1-D uint8."""
    free: Event = None
    """After it, nobody uses what is in there."""
    home: "_Slots | None" = None


@dataclass
class _Slots:
    """Equal pieces of an arena."""

    arena: Arena
    slot_bytes: int
    most: int
    num: int = 0
    """Cut so far, of `most`."""
    free: list[Memory] = field(default_factory=list)

    def close_if_idle(self) -> None:
        if len(self.free) == self.num:
            self.free.clear()
            self.arena.close()


class Pools:
    """Buffers and slots of one device. One thread at a time."""

    def __init__(
        self, device: torch.device, host_bytes: int | None, *, threads: int | None = None, poison: bool
    ) -> None:
        """host_bytes: the most for slots. threads: that take the pages of host memory, None: one for each core that
        this process may use. poison: fill with NaN what is given back."""
        self.device, self.host_bytes, self.threads, self.poison = device, host_bytes, threads, poison
        self.num_buffers = 0
        self.buffer_bytes = 0
        """Of all buffers, free or not."""
        self._buffers: list[Memory] = []
        self._slots: _Slots | None = None

    def size_bytes(self) -> dict[str, int]:
        """On the device, free ones alone, and ``host``."""
        return {
            "buffers": sum(memory.data.numel() for memory in self._buffers),
            "host": self._slots.arena.size_bytes if self._slots else 0,
        }

    def take_buffer(self, size_bytes: int, longest_bytes: int = 0) -> Memory:
        """The buffer that has been free longest; a larger one in its place if it is too small. longest_bytes: what a
        new one is made for at least."""
        wanted = max(size_bytes, longest_bytes)
        if self._buffers:
            memory = self._buffers.pop(0)
            if memory.data.numel() >= size_bytes:
                return memory
            wait(self.device, None, memory.free)  # the allocator hands it out again in the order of this stream
            self.buffer_bytes -= memory.data.numel()
        else:
            self.num_buffers += 1
        self.buffer_bytes += wanted
        return Memory(torch.empty(wanted, dtype=torch.uint8, device=self.device), mark(self.device, None))

    def give_buffer(self, memory: Memory) -> None:
        """What the current stream has to do so far may still use it."""
        if self.poison:
            memory.data.fill_(POISON)
        memory.free = mark(self.device, None)
        self._buffers.append(memory)

    def take_slot(self, size_bytes: int, num: int, longest_bytes: int = 0) -> Memory:
        """One of `num` or more, new ones of at least `longest_bytes`. ValueError where they are more than `host_bytes`,
        MemoryError when all are in use."""
        if self._slots is None or self._slots.slot_bytes < size_bytes or self._slots.most < num:
            self._make_slots(num, max(size_bytes, longest_bytes, self._slots.slot_bytes if self._slots else 0))
        slots = self._slots
        assert slots is not None
        if slots.free:
            return slots.free.pop()
        if slots.num == slots.most:
            raise MemoryError(
                f"all {slots.num} slots of {slots.slot_bytes} bytes for activations are in use: a forward came before "
                "the backward of the last; run each backward before the next forward, or use "
                "offload.activations.mode=recompute"
            )
        slots.num += 1
        return Memory(slots.arena.take(slots.slot_bytes, torch.uint8, align=ALIGN), home=slots)

    def give_slot(self, memory: Memory, free: Event) -> None:
        slots = memory.home
        assert slots is not None
        if self.poison and self.device.type == "cpu":
            memory.data.fill_(POISON)
        memory.free = free
        slots.free.append(memory)
        if slots is not self._slots:
            slots.close_if_idle()

    def _make_slots(self, num: int, slot_bytes: int) -> None:
        slot_bytes = round_up(slot_bytes, ALIGN)
        wanted = num * slot_bytes
        if self.host_bytes is not None and wanted > self.host_bytes:
            raise ValueError(
                f"offload.activations.host_bytes={self.host_bytes}: {num} blocks swap {slot_bytes} bytes each, "
                f"{wanted} in all; raise it, lower offload.activations.alpha, or use "
                "offload.activations.mode=input, which swaps least, or recompute"
            )
        old, self._slots = self._slots, None
        if old is not None:
            old.close_if_idle()  # first, or both would have to fit
        register = self.device if self.device.type == "cuda" else None
        try:
            with HostPool(self.threads) as pool:  # for this alone: slots are made once, or a few times
                self._slots = _Slots(Arena(wanted, register=register, pool=pool), slot_bytes, num)
        except ArenaError as error:
            raise ArenaError(
                error.errno,
                f"{num} blocks swap {slot_bytes} bytes each: {error.strerror}. Lower offload.activations.alpha or "
                "train.micro_batch_size, or use offload.activations.mode=input, which swaps least, or recompute",
            ) from error

    def close(self) -> None:
        self.buffer_bytes -= sum(memory.data.numel() for memory in self._buffers)
        self._buffers.clear()
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.close_if_idle()


def places(memory: Tensor, sources: Sequence[Source], *, whole: bool) -> list[Tensor]:
    """Where each source lies in `memory`, one after the other: what is stored of it, or the `whole`."""
    start, found = 0, []
    for source in sources:
        size_bytes = source.nbytes if whole else source.stored_bytes
        found.append(memory[start : start + size_bytes].view(source.dtype))
        start += round_up(size_bytes, ALIGN)
    return found


def room(sources: Sequence[Source], *, whole: bool) -> int:
    """Bytes that `places` needs."""
    return sum(round_up(source.nbytes if whole else source.stored_bytes, ALIGN) for source in sources)


def longest_room(sources: Sequence[Source], growth: float, alpha: float, *, whole: bool) -> int:
    """`room` of `growth` times the tokens, 1 or more, of which `alpha` are stored of products, or
    the `whole`."""

    def size_bytes(source: Source) -> int:
        stored = alpha if source.kind == "rest" and not whole else 1.0
        return round_up(math.ceil(growth * stored * source.nbytes), ALIGN)

    return sum(map(size_bytes, sources))


def link_bytes_per_s(device: torch.device, size_bytes: int = 128 << 20) -> float:
    """What a copy from `device` to an arena makes, the best of three; on CPU a copy in memory."""
    cuda, seconds = device.type == "cuda", []
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    with Arena(size_bytes, register=device if cuda else None) as arena:
        target = arena.take(size_bytes, torch.uint8)
        for _ in range(3):
            start = now(device)
            target.copy_(source, non_blocking=True)
            seconds.append(elapsed_s(start, now(device)))
        del target
    return size_bytes / min(seconds)


def spare_bytes(device: torch.device) -> int | None:
    """What this process may still take of a GPU beside the most that it has held so far; None on CPU.

    The most is what PyTorch reserved: a hole in it may not be where it is wanted."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved, allowed = torch.cuda.memory_reserved(device), total
    if hasattr(torch.cuda, "get_per_process_memory_fraction"):
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    most = torch.cuda.max_memory_reserved(device)
    return max(0, int(GPU_SHARE * min(allowed, free + reserved)) - most)


def now(device: torch.device) -> Any:
    """A time for `elapsed_s`: of the device's stream, or of the CPU."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed_s(start: Any, stop: Any) -> float:
    if isinstance(start, float):
        return float(stop - start)
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def mark(device: torch.device, stream: torch.cuda.Stream | None) -> Event:
    """An event after all that `stream`, None for the current one, has to do."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()
    event.record(stream or torch.cuda.current_stream(device))
    return event


def wait(device: torch.device, stream: torch.cuda.Stream | None, *events: Event) -> None:
    """Have `stream`, None for the current one, go on after `events`; the host does not wait."""
    for event in events:
        if event is not None:
            (stream or torch.cuda.current_stream(device)).wait_event(event)


def on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
