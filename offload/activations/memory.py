"""Where activations lie while they are away, and the two buffers on the device that they come back to.

[Note: made for the longest] Every block that swaps takes one slot of host memory a forward; slots are as large as the
largest and are cut from one arena, made when the first block has run, since only then sizes are known; what it has no
room for goes on to drives (`offload/activations/slots.py`). What a block leaves grows as the number of its tokens
([Note: varying lengths] in offload/plan/requests.py), so slots and buffers are made for the most tokens that are to
come, whatever came first: then no length makes new ones, and none is moved. Where that is not known a longer sequence
makes new slots, and the old arena is let go of.

Rule: whoever gives memory back says after which event nobody uses it any more, and whoever takes it waits for that.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.activations.slots import POISON, Drives, Event, Memory, Slots, Stored
from offload.activations.tape import Source
from offload.arena import Arena, ArenaError, capacity_bytes
from offload.drive import BLOCK
from offload.hostpool import HostPool
from offload.space import round_up

ALIGN = 512
GPU_SHARE = 0.97
"""Of the GPU's memory, or what is allowed of it, what is filled: the rest is for kernels' workspaces and holes."""
HOST_SHARE = 0.8
"""Of the memory still available, what is taken where `ActivationOptions.host_bytes` does not say and something else may
be done with the rest."""


@dataclass
class Lease:
    """What a forward that left something holds, and gives back when it is no more."""

    slot: Memory | Stored | None
    """None once what was there is in `buffer`, or used."""
    left: Event
    """After it the sources are in the slot that they left to."""
    buffer: Memory | None = None
    arrived: Event = None
    """After it they are in `buffer`."""


class Pools:
    """Buffers and slots of one device. One thread at a time."""

    def __init__(
        self,
        device: torch.device,
        host_bytes: int | None,
        *,
        drives: Drives | None = None,
        sharing: int = 1,
        threads: int | None = None,
        say: Callable[[str], None],
        poison: bool,
    ) -> None:
        """host_bytes: the most for slots. drives: for those that it has no room for; then None is what `host_room`
        says. sharing: how many ranks take of this machine's memory. threads: that take the pages of host memory, None:
        one for each core that this process may use. say: is told what goes to drives. poison: fill with NaN what is
        given back."""
        self.device, self.host_bytes, self.drives, self.threads = device, host_bytes, drives, threads
        self.sharing, self.poison, self._say = sharing, poison, say
        self.num_buffers = 0
        self.buffer_bytes = 0
        """Of all buffers, free or not."""
        self._buffers: list[Memory] = []
        self._slots: Slots | None = None
        self._written = 0
        """To drives, before the slots that there are now."""
        self._since = time.perf_counter()

    def size_bytes(self) -> dict[str, int]:
        """On the device, free ones alone, ``host`` and ``nvme``."""
        slots = self._slots
        return {
            "buffers": sum(memory.data.numel() for memory in self._buffers),
            "host": slots.arena.size_bytes if slots else 0,
            "nvme": slots.tier.size_bytes if slots and slots.tier else 0,
        }

    @property
    def written_bytes(self) -> int:
        """To drives so far."""
        return self._written + (self._slots.tier.bytes_written if self._slots and self._slots.tier else 0)

    def written_bytes_per_s(self) -> float:
        """To drives, since this was made."""
        return self.written_bytes / (time.perf_counter() - self._since)

    def host_room(self) -> int:
        """The most for slots, those that there are included."""
        if self.host_bytes is not None:
            return self.host_bytes
        return int(HOST_SHARE / self.sharing * (capacity_bytes() + self.size_bytes()["host"]))

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
        """One of `num` or more, new ones of at least `longest_bytes`. ValueError where they are more than `host_bytes`
        and drives may hold, MemoryError when all are in use, DriveError where drives fail or are full."""
        if self._slots is None or self._slots.slot_bytes < size_bytes or self._slots.num_blocks < num:
            self._make_slots(num, max(size_bytes, longest_bytes, self._slots.slot_bytes if self._slots else 0))
        assert self._slots is not None
        return self._slots.take()

    def give_slot(self, slot: Memory | Stored, free: Event) -> None:
        """What a block left is not wanted any more; `free`: after it nobody reads the slot."""
        slots = slot.home
        assert slots is not None
        if isinstance(slot, Stored):
            slots.forget(slot)
        else:
            slots.give(slot, free)
        if slots is not self._slots:
            slots.close_if_idle()

    def pass_on(self, slot: Memory, size_bytes: int, left: Event, number: int, num: int) -> Memory | Stored:
        """What a block left in the first bytes of `slot`, there after `left`: it goes on to drives if host memory is
        wanted by those that come after this block, which is `number` of `num`."""
        slots = slot.home
        assert slots is not None
        return slots.store(slot, size_bytes, left) if number < num - slots.num else slot

    def is_there(self, slot: Memory | Stored) -> bool:
        """Whether `brought` waits for no drive."""
        return isinstance(slot, Memory) or (slot.answer is not None and slot.answer.done())

    def brought(self, slot: Memory | Stored) -> Memory:
        """What a block left, in host memory; DriveError where a drive fails."""
        return slot if isinstance(slot, Memory) else slot.home.load(slot)

    def load_ahead(self) -> None:
        """In the backward, when a slot has been given back: begin to load what is wanted next."""
        if self._slots is not None:
            self._slots.load_ahead()

    def _make_slots(self, num_blocks: int, slot_bytes: int) -> None:
        slot_bytes = round_up(slot_bytes, BLOCK)
        old, self._slots = self._slots, None
        if old is not None:
            self._written += old.tier.bytes_written if old.tier else 0
            old.close_if_idle()  # first, or both would have to fit
        swap = f"{num_blocks} blocks swap {slot_bytes} bytes each"
        num, on_drives = self._split(num_blocks, slot_bytes, swap)
        register = self.device if self.device.type == "cuda" else None
        tier = self.drives.open(on_drives) if self.drives and on_drives else None
        try:
            with HostPool(self.threads) as pool:  # for this alone: slots are made once, or a few times
                arena = Arena(num * slot_bytes, register=register, pool=pool, for_drives=tier is not None)
        except BaseException as error:
            if tier is not None:
                tier.close()
            if isinstance(error, ArenaError):
                raise ArenaError(
                    error.errno,
                    f"{swap}: {error.strerror}. Lower offload.activations.alpha or train.micro_batch_size, use "
                    "offload.activations.mode=input, which swaps least, or recompute, or give drives for what host "
                    "memory does not hold by offload.nvme_path",
                ) from error
            raise
        self._slots = Slots(arena, tier, slot_bytes, num=num, num_blocks=num_blocks)
        self._slots.poison = self.poison
        if on_drives:
            self._say(
                f"activations: {swap}; host memory holds {num} of them ({num * slot_bytes / 1e9:.1f} GB), what the "
                f"first {num_blocks - num} leave goes on to NVMe ({on_drives / 1e9:.1f} GB)"
            )

    def _split(self, num_blocks: int, slot_bytes: int, swap: str) -> tuple[int, int]:
        """How many slots are in host memory, and the bytes of the others. ValueError where that is too much."""
        wanted = num_blocks * slot_bytes
        if self.drives is None:
            if self.host_bytes is not None and wanted > self.host_bytes:
                raise ValueError(
                    f"offload.activations.host_bytes={self.host_bytes}: {swap}, {wanted} in all; raise it, lower "
                    "offload.activations.alpha, use offload.activations.mode=input, which swaps least, or recompute, "
                    "or give drives for the rest by offload.nvme_path"
                )
            return num_blocks, 0
        room, most = self.host_room(), self.drives.most_bytes
        num = min(num_blocks, room // slot_bytes)
        on_drives = wanted - num * slot_bytes
        if num < min(2, num_blocks):
            raise ValueError(
                f"offload.activations.host_bytes={room}: {swap}, and pass through two slots of host memory at least, "
                f"{2 * slot_bytes}; raise it, or use offload.activations.mode=recompute"
            )
        if most is not None and on_drives > most:
            raise ValueError(
                f"offload.nvme_bytes leaves {most} for activations: {swap}, {on_drives} of it more than host memory "
                f"holds ({room}); raise it or offload.activations.host_bytes, or use offload.activations.mode=input, "
                "which swaps least, or recompute"
            )
        return num, on_drives

    def close(self) -> None:
        """Let go of all memory; what is taken afterwards is made anew."""
        self.num_buffers -= len(self._buffers)
        self.buffer_bytes -= sum(memory.data.numel() for memory in self._buffers)
        self._buffers.clear()
        slots, self._slots = self._slots, None
        if slots is not None:
            self._written += slots.tier.bytes_written if slots.tier else 0
            slots.close_drives()
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


def spare_bytes(device: torch.device, limit_bytes: int | None = None) -> int | None:
    """What this process may still take of a GPU, or of `limit_bytes` of it, beside the most that it has held so far;
    None on CPU.

    The most is what PyTorch reserved: a hole in it may not be where it is wanted."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved, allowed = torch.cuda.memory_reserved(device), total
    if hasattr(torch.cuda, "get_per_process_memory_fraction"):
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device.index))
    if limit_bytes is not None:
        allowed = min(allowed, limit_bytes)
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
    """Between two marks: clock readings on CPU, events on a GPU, of which the last is waited for."""
    if isinstance(start, float):
        return float(stop - start)
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def mark(device: torch.device, stream: torch.cuda.Stream | None) -> Event:
    """An event after all that `stream`, None for the current one, has to do."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event(blocking=True)  # who waits on the host does not spin
    event.record(stream or torch.cuda.current_stream(device))
    return event


def wait(device: torch.device, stream: torch.cuda.Stream | None, *events: Event) -> None:
    """Have `stream`, None for the current one, go on after `events`; the host does not wait."""
    for event in events:
        if event is not None:
            (stream or torch.cuda.current_stream(device)).wait_event(event)


def on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
