"""Slots that lie on drives: gradients go there and weights come from there, through pieces of host memory.

    depart    gradient -> piece, on a stream · once it is there: store · the piece is free
    ask       load -> piece · `Arrival.into`: -> device, on a stream · once it is there the piece is free

[Note: pieces] A piece holds the slot of a chunk. Gradients and weights have their own, of `offload.shard.NEIGHBOURS`
shards each, so that neither waits for the other. Whoever takes a gradient waits, on the host, for a piece that a store
lets go of; no store waits for the host. Weights are asked for ahead of their use with pieces that are free at once, but
for the last one: that is for who uses weights now. So nobody waits for a piece that is held by one who comes later.

Threads: `depart`, `ask` and `into` are called by one thread at a time; what `depart` returns by another.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from offload.nvme import NvmeTier
from offload.shard import Chunk, Shard


class SlotsOnDrives:
    """The slots of shards that are `slot_on_nvme`."""

    def __init__(self, tier: NvmeTier, gradients: list[Tensor], weights: list[Tensor]) -> None:
        """gradients, weights: pieces, each as large as the largest slot of a chunk; none where there are no slots."""
        self._tier = tier
        self._for_gradients: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for piece in gradients:
            self._for_gradients.put(piece)
        self._for_weights: deque[tuple[Tensor, torch.cuda.Event | None]] = deque((piece, None) for piece in weights)
        """Those given back, and after which event they may be written."""

    def depart(self, shard: Shard, grad: Tensor) -> Iterator[Callable[[], None]]:
        """Copy a gradient (numel) out, piece by piece, on the current stream. Each time what is to be called in this
        order, by a thread that may wait for the device: it has the piece stored."""
        for chunk in shard.chunks():
            piece = self._for_gradients.get()
            chunk.slot_in(piece).copy_(grad[chunk.start : chunk.stop], non_blocking=True)
            copied = torch.cuda.current_stream().record_event() if grad.is_cuda else None
            yield partial(self._store, chunk, piece, copied)

    def _store(self, chunk: Chunk, piece: Tensor, copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            answer = self._tier.store(chunk.slot_place, piece[: chunk.slot_bytes])
        except BaseException:  # nobody may wait for it in vain
            self._for_gradients.put(piece)
            raise
        answer.add_done_callback(lambda _: self._for_gradients.put(piece))

    def ask(self, shard: Shard) -> "Arrival":
        """Start loading a shard's weights. Its last update has been finished."""
        return Arrival(self, shard)

    def load(self, chunk: Chunk, *, ahead: bool) -> "tuple[Tensor, Future[Tensor]] | None":
        """Start loading a chunk's slot: the piece, and the answer. ahead: None rather than wait, or take the last piece
        ([Note: pieces])."""
        if ahead and len(self._for_weights) < 2:
            return None
        piece, copied = self._for_weights[0]
        if copied is not None:
            if ahead and not copied.query():
                return None
            copied.synchronize()
        answer = self._tier.load(chunk.slot_place, piece[: chunk.slot_bytes])
        self._for_weights.popleft()
        return piece, answer

    def give(self, piece: Tensor, copied: torch.cuda.Event | None) -> None:
        self._for_weights.append((piece, copied))

    def close(self) -> None:
        """Let go of memory, once the tier is closed. A second time does nothing."""
        self._for_weights.clear()
        while not self._for_gradients.empty():
            self._for_gradients.get()


class Arrival:
    """A shard's weights on their way from the drives."""

    def __init__(self, slots: SlotsOnDrives, shard: Shard) -> None:
        self._slots = slots
        self._waiting = deque(shard.chunks())
        self._asked: deque[tuple[Chunk, Tensor, Future[Tensor]]] = deque()
        self._ask(ahead=True)

    def into(self, place: Tensor) -> None:
        """Copy them to `place` (numel), on the current stream. The host waits for the drives; once."""
        while self._asked or self._waiting:
            if not self._asked:
                self._ask(ahead=False)
            chunk, piece, answer = self._asked[0]
            answer.result()
            self._asked.popleft()
            place[chunk.start : chunk.stop].copy_(chunk.slot_in(piece), non_blocking=True)
            self._slots.give(piece, torch.cuda.current_stream().record_event() if place.is_cuda else None)
            self._ask(ahead=True)

    def _ask(self, *, ahead: bool) -> None:
        """Ask for what there are pieces for; not `ahead`, for one chunk."""
        while self._waiting and (found := self._slots.load(self._waiting[0], ahead=ahead)):
            self._asked.append((self._waiting.popleft(), *found))
            if not ahead:
                return
