"""Collectives between shards, as chains that run beside compute.

[Note: chains]
A shard travels over one level after the other: what one level delivers is what the next one sends. Such a chain is a
generator that yields wherever it would wait. A `Lane` runs it:

- on CUDA at once, on a side stream that first waits for the compute stream. The host never blocks; `Chain.finish` makes
  the compute stream wait for the chain. Because every chain waits for the compute stream before it starts, memory that
  compute has let go of may be written by a later chain without further events. A chain that must make the host wait,
  for a drive, yields `WHEN_FINISHED` before: what follows is issued by `Chain.finish`, on the same stream.
- on CPU by asynchronous gloo work. A chain moves on only in `launch` and `finish`, which every rank calls in the same
  order: moving on whenever work happens to be done would let two ranks issue collectives of one group in
  different orders.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Generator

import torch
import torch.distributed as dist
from torch import Tensor


class _WhenFinished:
    """See [Note: chains]."""

    def wait(self) -> None:
        """Nothing: whoever goes on waits."""


WHEN_FINISHED = _WhenFinished()
Step = dist.Work | _WhenFinished
Steps = Generator[Step, None, None]
Group = dist.ProcessGroup

# torch 2.13 renamed both; 2.11 has the old names alone
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(out: Tensor, shard: Tensor, group: Group) -> Steps:
    """``out`` (n * k) from each rank's ``shard`` (k); the shard may be its own place in ``out``."""
    work = _all_gather(_bytes(out), _bytes(shard), group=group, async_op=out.device.type == "cpu")
    if work is not None:
        yield work


def reduce_scatter(flat: Tensor, group: Group) -> Generator[Step, None, Tensor]:
    """The sum over ranks of this rank's part (k) of ``flat`` (n * k)."""
    n = group.size()
    if flat.device.type == "cuda":
        out = flat.new_empty(flat.numel() // n)
        _reduce_scatter(out, flat, group=group)
        return out
    # gloo's own reduce_scatter moves as much as an all-reduce; an all-to-all and a local sum move half
    received = torch.empty_like(flat)
    yield from all_to_all(received, flat, group)
    return received.view(n, -1).sum(0)


def all_to_all(out: Tensor, flat: Tensor, group: Group) -> Steps:
    """Part i of ``flat`` (n * k) goes to rank i; ``out`` (n * k) has what each rank sent here."""
    work = dist.all_to_all_single(_bytes(out), _bytes(flat), group=group, async_op=out.device.type == "cpu")
    if work is not None:
        yield work


def all_reduce(flat: Tensor, group: Group) -> Steps:
    """Sum ``flat`` over the ranks, in place, the same bits on each."""
    work = dist.all_reduce(flat, group=group, async_op=flat.device.type == "cpu")
    if work is not None:
        yield work


def _bytes(tensor: Tensor) -> Tensor:
    """gloo moves no bf16, but any bytes."""
    return tensor.view(torch.uint8) if tensor.device.type == "cpu" else tensor


class Chain:
    """A chain of collectives under way, see [Note: chains]."""

    def __init__(self, steps: Steps, stream: torch.cuda.Stream | None) -> None:
        self._steps, self._stream = steps, stream
        self._work: Step | None = None
        self._event: torch.cuda.Event | None = None
        self.done = False
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        self.advance()

    def advance(self) -> None:
        """Wait for the collective under way and issue the next; on a stream, all that the host need not wait for."""
        if self._stream is not None:
            self._issue(self._stream)
            return
        if self._work is not None:
            self._work.wait()
        self._work = next(self._steps, None)
        self.done = self._work is None

    def _issue(self, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for work in self._steps:
                if work is WHEN_FINISHED:
                    return
                work.wait()
            self._event = stream.record_event()
        self.done = True

    def finish(self) -> None:
        """Let what follows on this thread (CPU) or stream (CUDA) see the chain's result."""
        while not self.done:
            self.advance()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class Lane:
    """Where chains run beside compute: a side stream on CUDA, gloo's threads on CPU. Without `overlap` each is finished
    at once, on the compute stream.
    """

    def __init__(self, device: torch.device, *, overlap: bool = True) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and overlap else None
        self._overlap = overlap
        self.scratch = BufferPool(device)
        """Memory for chains of this lane alone, between their steps: one stream or thread, so no events are needed."""

    def launch(self, steps: Steps) -> Chain:
        """Start a chain; whoever needs its result finishes it."""
        chain = Chain(steps, self._stream)
        if not self._overlap:
            chain.finish()
        return chain


class Queue(Lane):
    """A lane whose chains are finished in order, at most `depth` of them under way. Each launch moves the others on."""

    def __init__(self, device: torch.device, depth: int, *, overlap: bool = True) -> None:
        super().__init__(device, overlap=overlap)
        self._depth = depth
        self._under_way: deque[Chain] = deque()

    def launch(self, steps: Steps) -> Chain:
        for chain in self._under_way:
            if not chain.done:
                chain.advance()
        while self._under_way and (self._under_way[0].done or len(self._under_way) >= self._depth):
            self._under_way.popleft().finish()
        self._under_way.append(super().launch(steps))
        return self._under_way[-1]

    def finish(self) -> None:
        """Finish every chain, the oldest first."""
        while self._under_way:
            self._under_way.popleft().finish()


class BufferPool:
    """Flat buffers that are used again and again, kept by size and dtype.

    A buffer given back may still be read by a chain: `give` takes the chain, and `take` finishes it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[tuple[int, torch.dtype], deque[tuple[Tensor, Chain | None]]] = defaultdict(deque)
        self._made: Counter[tuple[int, torch.dtype]] = Counter()

    @property
    def size_bytes(self) -> int:
        return sum(numel * dtype.itemsize * count for (numel, dtype), count in self._made.items())

    def take(self, numel: int, dtype: torch.dtype, *, ring: int = 1) -> Tensor:
        """A buffer: a new one while there are fewer than `ring` or none is free, else the one given back first."""
        key = numel, dtype
        if not self._free[key] or self._made[key] < ring:
            self._made[key] += 1
            return torch.empty(numel, dtype=dtype, device=self._device)
        buffer, reader = self._free[key].popleft()
        if reader is not None:
            reader.finish()
        return buffer

    def give(self, buffer: Tensor, reader: Chain | None = None) -> None:
        """Give a buffer back that `take` made. reader: a chain under way that still reads it."""
        self._free[buffer.numel(), buffer.dtype].append((buffer, reader))
