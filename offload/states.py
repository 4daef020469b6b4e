"""Optimizer states that live in host memory or on NVMe, and are updated there while the device goes on.

A `Shard` is one range of parameters whose fp32 master weights and moments (12 bytes a parameter) are away from the
device. Beside them it has a *slot* in host memory, one element a parameter: the gradient lands there as the backward
brings it, the update overwrites it with the new weight, and from there the weight goes back. `AwayStates` owns the
memory (one arena, cut once), the drives, the threads, and the order of things:

    take(shard, grad)       gradient -> slot, on a stream of its own
    update([...], scale)    from then on, shard by shard in the order given: load · AdamW · store · weight -> device
    Update.finish()         the caller's stream sees the new weights of a shard; the host waits only if it must

[Note: just in time] The factor that clips by the global norm is known when the last gradient is. Shards are therefore
updated in the order in which the next forward asks for them, while it runs. The factor itself is awaited by the
updating thread: whoever calls `update` does not wait for the device.

[Note: speculation] A ping-pong shard has its states twice. Version t is never overwritten: while the backward still
runs, t+1 is made beside it from each gradient that arrives, as if the norm would not ask for clipping. If it does not,
t+1 is there when the backward ends, and has reached the device; if it does, or parameters got no gradient on some rank
alone, t+1 is made again from t, just in time. The bits are the same either way. What the threads have not come to when
the factor is known is made just in time too. After a clipped step the next one is not speculated on: what is made in
vain takes bandwidth. It pays for shards whose gradients come early; the others, which the next forward asks for first,
need no second copy: updated in place, they take their turn while the next forward runs.

[Note: weights first] What the next forward waits for is the weights alone. A shard that is updated weights first has
them made from its states and the gradient, 16 bytes a parameter instead of 28, and when all shards' weights are on
their way the states follow, 26 bytes, beside the device's work until the next factor is known: clipped or not, since
this one is. The gradient is wanted until then, so there are two slots, and the weights go to the one that it is not in.
There the next gradient will take their place, as ever. Both passes do the same operations on the same numbers.

[Note: the other version] Snapshots keep versions of the state in shared memory. Where they have room for the next one,
an update reads the states where they are and writes them there, which takes the bytes of an update in place, and no
copy is made later. The version before is not touched from then on: it is the snapshot. Where there is no room, as no
snapshot is due or its slot is not to be had, states go home, to the arena. What is speculated goes there if the room is
known by then, and nobody waits for it. States on NVMe stay.

[Note: slots on drives] A slot may lie on the drives beside its states. The gradient then goes there through a few
pieces of host memory (`offload/slots_on_drives.py`), the update finds it in the chunk that it loads anyway, and leaves
the new weight there; `fetch` loads it when the unit is to run. The tier answers as if in the order asked, so all that
is needed is to ask in order: gradients are stored by the updating thread, whose queue they are in before the update,
and an update is answered when all its stores have been asked for.

[Note: gradients on their way] A gradient's memory on the device is wanted again at once, and the host is ahead of the
device: it cannot see when a copy is over. So whoever makes gradients waits, on its stream, until no more than `LEAVING`
are on their way. Were memory given back as the host sees copies end, there would be gradients of as many layers as the
host is ahead, which no plan counts.

Sources: Fuyou, arXiv 2403.06504, section 4 (updates beside the device's work); GreedySnake, arXiv 2512.17570 (the
optimizer step beside the next forward).
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.adamw import State, adamw
from offload.arena import ALIGN, Arena
from offload.hostpool import HostPool
from offload.shard import LEAVING, OUTGOING, Buffers, Section, Shard, Terms, Update, host_bytes, nvme_bytes
from offload.slots_on_drives import Arrival
from offload.space import round_up
from offload.state import MASTER, Destination, Movable
from offload.states_on_drives import StatesOnDrives, Walk

KINDS = (MASTER, "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class _Batch:
    work: Sequence[tuple[Shard, Terms, Update]]
    scale: Tensor | None
    known: torch.cuda.Event | None
    room: Destination | None
    """See `Movable`."""
    over: threading.Event = field(default_factory=threading.Event)
    """What it stores is there, and the ring whole, which a walk needs."""

    @property
    def answers(self) -> Iterator[Future[Any]]:
        return (future for *_, update in self.work for future in (update.answer, update.states))


class AwayStates:
    """All shards of a rank whose states are away from the device."""

    def __init__(
        self,
        optimizer: AdamW,
        *,
        device: torch.device,
        pool: HostPool,
        nvme_folders: Sequence[Path] = (),
        nvme_direct: bool = True,
    ) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._adamw, self._device, self.pool = optimizer, device, pool
        self._folders, self._direct = nvme_folders, nvme_direct
        self._clipped = False
        self._submitted = False
        self._known: torch.cuda.Event | None = None
        self.guesses = self.hits = 0
        """Updates of shards made before the factor was known, and how many of them stood."""
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        """See [Note: gradients on their way]."""
        self._outgoing: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.shards: list[Shard] = []
        self._extra_bytes = 0
        self.arena: Arena | None = None
        self._on_drives: StatesOnDrives | None = None
        self._cuda = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if self._cuda else None
        self._in = torch.cuda.Stream(device) if self._cuda else None
        self._compute = torch.cuda.current_stream(device) if self._cuda else None
        """Whose memory gradients are in, if not the caller's of `take`."""
        self._batches: queue.SimpleQueue[_Batch | Callable[[], None] | None] = queue.SimpleQueue()
        """Updates, and what is to be done before them: guesses, gradients that go on to drives."""
        self._thread: threading.Thread | None = None
        self._last: _Batch | None = None
        """Asked for, and not settled yet."""
        self._began: tuple[float, int] | None = None
        """When the first update was asked for, and the bytes that had been written to drives."""
        self.update_s = 0.0
        """Seconds until the last updates' weights were there, from when their gradients and the factor were known."""
        self._movable = Movable(extents=())
        self._moving: dict[Shard, int] = {}
        """With the number of their first extent."""

    # ------------------------------------------------------------------------------------------------ memory

    def add(self, shards: Iterable[Shard]) -> None:
        """Shards to be; their memory comes with `allocate`."""
        self.shards += shards

    def reserve(self, size_bytes: int) -> None:
        """Make the arena larger by what the caller will `take` from it."""
        self._extra_bytes += round_up(size_bytes, ALIGN)

    @property
    def host_bytes(self) -> int:
        """What the shards added and the memory reserved take, in the arena and the buffers for drives."""
        return self._extra_bytes + host_bytes(self.shards)

    @property
    def nvme_bytes(self) -> int:
        return nvme_bytes(self.shards)

    def written_bytes_per_s(self) -> float:
        """To drives, since the first update was asked for."""
        if self._on_drives is None or self._began is None:
            return 0.0
        since_s, before = self._began
        return (self._on_drives.tier.bytes_written - before) / (time.perf_counter() - since_s)

    def allocate(self) -> None:
        """Take all memory at once, host and NVMe, and give each shard its own. ArenaError or DriveError if there is too
        little."""
        if not self.host_bytes:
            return
        register = self._device if self._cuda else None
        try:
            if self.nvme_bytes:
                self._on_drives = StatesOnDrives(
                    self.shards, self._folders, direct=self._direct, pool=self.pool, register=register
                )
            if in_arena := self.host_bytes - Buffers.of(self.shards).size_bytes:
                self.arena = Arena(in_arena, register=register, pool=self.pool)
        except BaseException:
            self.close()
            raise
        for shard in self.shards:
            if shard.slot_on_nvme:
                continue
            assert self.arena is not None
            if shard.on_nvme:
                shard.slot = self.arena.take(shard.numel, shard.dtype)
            else:
                *states, shard.slot = self.arena.take_together(shard.numel, shard.dtypes)
                if shard.weights_first:
                    shard.spare = states.pop()
                elif shard.pingpong and shard.stays:
                    shard.apart = states.pop()
                shard.homes = [(a, b, c) for a, b, c in zip(states[::3], states[1::3], states[2::3], strict=True)]
                shard.state = shard.homes[0]
        if passing := max((shard.passing_bytes for shard in self.shards), default=0):
            assert self.arena is not None
            self._outgoing.extend((self.arena.take(passing, torch.uint8), None) for _ in range(OUTGOING))
        self._thread = threading.Thread(target=self._work, name="offload-update", daemon=True)
        self._thread.start()

    def movable(self, shards: Iterable[Shard]) -> Movable:
        """Let the states of `shards`, those that can, go where there is room, [Note: the other version]."""
        extents: list[tuple[str, Tensor]] = []
        for shard in shards:
            if not shard.on_nvme:
                self._moving[shard] = len(extents)
                extents += zip(KINDS, shard.state, strict=True)
        self._movable = Movable(extents=extents)
        return self._movable

    # ------------------------------------------------------------------------------------------------ a step

    def expect(self) -> None:
        """A backward comes that an update will follow: what it speculates on may go where there is room."""
        self._movable.room(False)

    def take(self, shard: Shard, grad: Tensor) -> None:
        """Start moving a gradient (numel, on the device) into the shard's slot; the caller lets go of it. The shard's
        last update has been finished. See [Note: gradients on their way]."""
        if self._out is None:
            self._land(shard, grad)
            return
        assert self._compute is not None
        current = torch.cuda.current_stream()
        while len(self._leaving) >= LEAVING:
            _, arrived = self._leaving.popleft()
            current.wait_event(arrived)
            self._compute.wait_event(arrived)
        self._out.wait_stream(current)
        with torch.cuda.stream(self._out):
            if shard.left is not None:
                self._out.wait_event(shard.left)
            self._land(shard, grad)
            shard.arrived = self._out.record_event()
        self._leaving.append((grad, shard.arrived))

    def _land(self, shard: Shard, grad: Tensor) -> None:
        """Copy a gradient to its slot, or have it go on there, on the current stream."""
        if not shard.slot_on_nvme:
            shard.slot.copy_(grad, non_blocking=True)
            return
        assert self._on_drives is not None
        for store in self._on_drives.slots.depart(shard, grad):
            self._batches.put(store)

    def fetch(self, shard: Shard) -> Arrival:
        """Start loading the weights of a shard whose slot is on NVMe; its last update has been finished."""
        assert self._on_drives is not None
        return self._on_drives.slots.ask(shard)

    @property
    def leaving_bytes(self) -> int:
        """Of the device, held by gradients on their way."""
        return sum(grad.nbytes for grad, _ in self._leaving)

    def guess(self, shard: Shard, terms: Terms) -> None:
        """Start making the next version from the gradient just taken, see [Note: speculation], where that is due."""
        self._submitted = False
        if shard.pingpong and not self._clipped:
            self.guesses += 1
            self._batches.put(partial(self._guess, shard, terms))

    def update(self, work: Sequence[tuple[Shard, Terms]], *, scale: Tensor | None) -> list[Update]:
        """Start updating shards from the gradients in their slots, in this order.

        scale: None, or a 0-dim tensor on the device that gradients are multiplied by. What no run of the terms covers
        keeps its state and its weight.
        """
        if not work:  # all of it stays on the device
            return []
        if self._began is None and self._on_drives is not None:
            self._began = time.perf_counter(), self._on_drives.tier.bytes_written
        for grad, _ in self._leaving:  # the next are long to come: nobody waits for these
            assert self._out is not None
            grad.record_stream(self._out)
        self._leaving.clear()
        known, room = None, self._movable.room(True)
        if scale is not None and self._cuda:
            host = torch.empty((), dtype=scale.dtype, pin_memory=True)
            host.copy_(scale, non_blocking=True)
            scale, known = host, torch.cuda.current_stream().record_event()
        answers = [Update(shard.turn()) for shard, _ in work]
        batch = [(shard, terms, answer) for (shard, terms), answer in zip(work, answers, strict=True)]
        self._known, self._submitted = known, True
        self._last = _Batch(work=batch, scale=scale, known=known, room=room)
        self._batches.put(self._last)
        return answers

    def settle(self) -> None:
        """Wait until no update is under way, and what was stored is: the last batch is over, and with it those before.
        Not for guesses, which leave the current version alone, and come for as long as the backward runs."""
        last = self._last
        if last is None:
            return
        for answer in last.answers:
            answer.result()
        last.over.wait()
        if self._last is last:
            self._last = None

    def close(self) -> None:
        """Let go of threads, drives and memory. A second time does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._batches.put(None)
            thread.join()
        self._leaving.clear()
        with ExitStack() as parts:  # each, whatever another raises
            for part in (self.arena, self._on_drives):
                if part is not None:
                    parts.callback(part.close)

    def _work(self) -> None:
        if self._cuda:
            torch.cuda.set_device(self._device.index)
        failed: BaseException | None = None  # told to those who wait for this update, or the next
        while item := self._batches.get():
            if not isinstance(item, _Batch):
                try:
                    item()
                except BaseException as error:
                    failed = failed or error
                continue
            try:
                if failed is not None:
                    raise failed
                self._update(item)
            except BaseException as error:
                failed = failed or error
                for answer in item.answers:
                    if not answer.done():
                        answer.set_exception(error)
            item.over.set()

    def _guess(self, shard: Shard, terms: Terms) -> None:
        if self._submitted and (self._known is None or self._known.query()):
            return
        self._await_gradient(shard)
        out = self._place(shard, self._movable.room(False), apart=True)
        self._make(shard, terms, out)
        shard.made = terms, out

    def _place(self, shard: Shard, room: Destination | None, *, apart: bool = False) -> State:
        """Where the next version of a shard's states goes, in host memory: `apart` from the current one, or there too
        if that is not a snapshot's."""
        here = shard.state[0].data_ptr()
        places = sorted(shard.homes, key=lambda home: home[0].data_ptr() != here)
        if room is not None and shard in self._moving:
            master, exp_avg, exp_avg_sq = room[self._moving[shard] :][:3]
            places.insert(0, (master, exp_avg, exp_avg_sq))
        if apart:
            places = [place for place in places if place[0].data_ptr() != here]
        return shard.state if places[0][0].data_ptr() == here else places[0]

    def _update(self, batch: _Batch) -> None:
        """Update the shards of a batch and answer each."""
        with self._through_ring([shard for shard, *_ in batch.work], write=True) as walk:
            if batch.known is not None:
                batch.known.synchronize()
            scale = 1.0 if batch.scale is None else float(batch.scale)
            self._clipped = scale != 1.0
            start_s = time.perf_counter()
            for shard, terms, update in batch.work:
                self._await_gradient(shard)
                update.answer.set_result(self._renew(shard, terms, scale, update.gradient, batch.room, walk))
                if not shard.weights_first:
                    update.states.set_result(None)
            self.update_s = time.perf_counter() - start_s
            for shard, terms, update in batch.work:
                if shard.weights_first:
                    out = self._place(shard, batch.room)
                    assert update.gradient is not None
                    self._step(terms, scale, 0, shard.state, update.gradient, out, None)
                    shard.state = out
                    update.states.set_result(None)

    def _renew(
        self,
        shard: Shard,
        terms: Terms,
        scale: float,
        gradient: Tensor | None,
        room: Destination | None,
        walk: Walk | None,
    ) -> torch.cuda.Event | None:
        """Have the new weights of a shard made and sent; its states too, if it is not updated weights first."""
        made, shard.made = shard.made, None
        if made is not None and scale == 1.0 and made[0] == terms:
            self.hits += 1
            shard.state = made[1]
            return shard.left
        if shard.left is not None:  # of a guess, whose weights must not arrive after these
            shard.left.synchronize()
        if shard.on_nvme:
            assert walk is not None
            for start, state, weight in walk.through(shard):
                self._step(terms, scale, start, state, weight, state, weight)
            return self._send(shard)
        assert gradient is not None
        out = None if shard.weights_first else self._place(shard, room)
        self._step(terms, scale, 0, shard.state, gradient, out, shard.weight)
        shard.state = out or shard.state
        return self._send(shard)

    @staticmethod
    def _await_gradient(shard: Shard) -> None:
        if shard.arrived is not None:
            shard.arrived.synchronize()

    def _make(self, shard: Shard, terms: Terms, out: State) -> None:
        """Make a next version of the states from the current one, and send the weights."""
        if shard.apart is not None:
            self._step(terms, 1.0, 0, shard.state, shard.slot, out, shard.apart)
            return
        buffer, used = self._outgoing.popleft()
        if used is not None:
            used.synchronize()
        weight = buffer[: shard.numel * shard.dtype.itemsize].view(shard.dtype)
        self._step(terms, 1.0, 0, shard.state, shard.slot, out, weight)
        self._outgoing.append((buffer, self._bring(shard, weight)))

    def _step(
        self,
        terms: Terms,
        scale: float,
        start: int,
        state: State,
        grad: Tensor,
        out: State | None,
        weight: Tensor | None,
    ) -> None:
        """Update `state` by `grad` into `out`, and its weights into `weight`: n elements each, from element `start` of
        their shard on. Without `out` or `weight` only the other is made."""
        stop, place = start + state[0].numel(), start

        def keep(low: int, high: int) -> None:
            """Elements that get no update."""
            if low < high:
                part = slice(low - start, high - start)
                for target, source in zip(out or (), state, strict=bool(out)):
                    if target is not source:
                        target[part] = source[part]
                if weight is not None:
                    weight[part] = state[0][part]

        for run in terms.runs:
            low, high = max(start, run.start), min(stop, run.stop)
            if low >= high:
                continue
            keep(place, low)
            part, place = slice(low - start, high - start), high
            master, exp_avg, exp_avg_sq = state
            adamw(
                master[part],
                exp_avg[part],
                exp_avg_sq[part],
                grad[part],
                None if weight is None else weight[part],
                scale=scale,
                lr=terms.lr,
                beta1=self._adamw.beta1,
                beta2=self._adamw.beta2,
                eps=self._adamw.eps,
                weight_decay=self._adamw.weight_decay if run.decays else 0.0,
                updates=terms.updates,
                out=None if out is None or out is state else (out[0][part], out[1][part], out[2][part]),
                weight_alone=out is None,
                pool=self.pool,
            )
        keep(place, stop)

    def _send(self, shard: Shard) -> torch.cuda.Event | None:
        """Start bringing new weights to the device, if they are used there."""
        return None if shard.target is None else self._bring(shard, shard.weight)

    def _bring(self, shard: Shard, weight: Tensor) -> torch.cuda.Event | None:
        assert shard.target is not None
        if self._in is None:
            shard.target.copy_(weight)
            return None
        with torch.cuda.stream(self._in):
            shard.target.copy_(weight, non_blocking=True)
            shard.left = self._in.record_event()
        return shard.left

    # ------------------------------------------------------------------------------------------------ state

    def walk(self, shards: Sequence[Shard], *, write: bool) -> Iterator[Section]:
        """The states of shards, one after the other. A part on NVMe is there until the next is asked for; with `write`
        it is then stored again. One walk at a time."""
        with self._through_ring(shards, write=write) as walk:
            for shard in shards:
                if walk is None or not shard.on_nvme:
                    yield Section(0, shard.state, shard.weight)
                else:
                    yield from walk.through(shard)

    def _through_ring(self, shards: Sequence[Shard], *, write: bool) -> AbstractContextManager[Walk | None]:
        return self._on_drives.walk(shards, write=write) if self._on_drives else nullcontext()
