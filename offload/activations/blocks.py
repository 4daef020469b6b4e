"""Activations that leave the device between forward and backward, by block: what remains is made again.

`Activations.wrap` gives each block a mode: ``keep``, ``swap`` (to host memory, and on to drives where that is short; of
the matrix products the rows of the first α of the tokens, see `offload.activations.tape`), ``input`` (that alone is
swapped) or ``recompute`` (the input and attention's output stay on the device). On CPU the same code runs without
streams.

[Note: who may use which memory, and when] Compute runs on the caller's stream, copies out and in on one each.
- What a forward leaves is copied out when the block ends. Its tensors are held until the forward of the block two later
  begins, which waits for that copy on its stream: at most two blocks' worth is in flight. The host never waits.
- The backward of a block begins the copy-in of the block before it, into one of two buffers that take turns.
- A slot of host memory is given back with its copy-in; who takes it next waits for that. Where drives are behind the
  slots, only they are waited for by the host: `offload/activations/slots.py`.
- A buffer is given back once autograd has let go of the last saved tensor of the tape, or of the whole graph, and the
  next block begins, forward or backward: autograd may let go of a tensor before it launches what reads it (it does for
  compiled blocks), but not later than it begins another block. Who takes it next waits for the event recorded then.

Source: arXiv 2407.12117, sections 4.1 and 4.2; arXiv 2403.06504 (which layers to swap).
"""

import logging
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from offload.activations.memory import (
    Lease,
    Pools,
    elapsed_s,
    link_bytes_per_s,
    longest_room,
    mark,
    now,
    on,
    places,
    room,
    spare_bytes,
    wait,
)
from offload.activations.plan import STEP, BlockCost, Choice, DriveRoom, choose, fit
from offload.activations.slots import Drives, Event
from offload.activations.stream import Place, Streaming
from offload.activations.tape import Tape
from offload.activations.watch import intercept
from offload.options import ActivationOptions
from offload.weak import weakly

log = logging.getLogger(__name__)
WARM_UP = 2
"""Forwards before the one that ``auto`` measures: the first may compile."""


class Activations:
    """Wraps blocks so that their activations leave; `close` lets go of all memory.

    One thread at a time: forwards on the caller's, backwards where autograd runs them.
    """

    def __init__(
        self,
        options: ActivationOptions,
        device: torch.device,
        *,
        pack: Callable[[Tensor], Any] | None = None,
        unpack: Callable[[Any], Tensor] | None = None,
        sharing: int = 1,
        device_bytes: int | None = None,
        most_tokens: int | None = None,
        threads: int | None = None,
        drives: Drives | None = None,
        least: Callable[[int], int] = int,
        say: Callable[[str], None] = log.info,
        poison: bool = False,
    ) -> None:
        """pack, unpack: hooks for weights that are gathered, as `torch.autograd.graph.saved_tensors_hooks` takes them;
        what `pack` returns unchanged is an activation. sharing: how many ranks take of this machine's memory.
        device_bytes: of a GPU, what all together may take; None: what this process may. most_tokens: of a forward that
        is to come, all its sequences together; None: not known. threads: that take the pages of host memory; None: one
        for each core. drives: for what host memory does not hold. least: of what all ranks give it, where there are
        several, collective: with ``auto`` as many blocks keep on each, as where sequences are shared those that do not
        keep send once more in the backward. say: gets what ``auto`` chose, and what goes to drives. poison: fill memory
        with NaN when it is given back, to find who still reads it."""
        self.options, self.device, self._say, self._least = options, device, say, least
        self._hooks = {"pack": pack, "unpack": unpack}
        self._begins_backward, self._restores = weakly(self._before_backward), weakly(self._restore)
        self._device_bytes, self.most_tokens = device_bytes, most_tokens
        """Changed by `make_for`."""
        self.pools = Pools(
            device, options.host_bytes, drives=drives, sharing=sharing, threads=threads, say=say, poison=poison
        )
        cuda = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if cuda else None
        self._in = torch.cuda.Stream(device) if cuda else None
        self._ended: list[Lease] = []
        """Of graphs that are no more; what reads their buffers may not be launched yet."""
        self._streaming = (
            Streaming(options, device, self.pools, streams=(self._out, self._in), ended=self._ended.append)
            if options.streams
            else None
        )
        self._choices: list[Choice] = []
        self._tapes: list[weakref.ref[Tape]] = []
        """In the order of their forwards."""
        self._leases: weakref.WeakKeyDictionary[Tape, Lease] = weakref.WeakKeyDictionary()
        self._leaving: deque[tuple[int, Event, list[Tensor]]] = deque()
        """Of which forward, after what they have been copied out, and what."""
        self._clock = 0
        """Forwards of blocks so far."""
        self._auto = options.chooses
        """Whether α is still to be chosen."""
        self._wrapped: list[weakref.ref[nn.Module]] = []
        """Linears that tell of their products."""
        self._unwrap: list[tuple[weakref.ref[nn.Module], Any]] = []
        """Blocks, and the forward that each had of its own before."""
        self._measuring = False
        self._num_forwards = 0
        self._times: dict[int, tuple[Any, Any]] = {}
        self._sizes: dict[int, dict[str, int]] = {}
        self._longer = 1.0
        """How many times the tokens that were measured may come at once."""

    # ------------------------------------------------------------------------------------------------ set-up

    def wrap(self, blocks: Sequence[nn.Module]) -> None:
        """Replace the forward of each of `blocks`, in the order they run; once. If they are compiled, then before this.
        Hooks on the modules stay outside."""
        if self._choices:
            raise ValueError("these Activations have blocks; make others for other blocks")
        o, n = self.options, len(blocks)
        if not o.leave:
            self._choices = [Choice("keep")] * n
            return
        num_kept = o.num_kept(n)
        away = Choice("swap" if o.mode == "auto" else o.mode, o.alpha or 0.0)
        self._choices = [away] * (n - num_kept) + [Choice("keep")] * num_kept
        for position, block in enumerate(blocks):
            if not o.streams:
                self._wrapped += [weakref.ref(module) for module in block.modules() if intercept(module)]
            self._stand_before(position, block)

    def _stand_before(self, position: int, block: nn.Module) -> None:
        """Have `block` run by `_run`. The block holds this, and neither this nor what stands there the block: its
        memory would go only when cycles are looked for."""
        own: Any = weakref.ref(block)
        before = block.__dict__.get("forward")
        inner = before or type(block).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            block = own()
            return self._run(position, block, inner if before else partial(inner, block), *args, **kwargs)

        block.forward = forward
        self._unwrap.append((own, before))

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Mode and α of each block."""
        return tuple(self._choices)

    def set(self, choices: Sequence[Choice]) -> None:
        """Choose for each block; between a backward and the next forward. Not for ``keep``, which wraps nothing, nor
        where blocks run by tiles, as all do."""
        if len(choices) != len(self._choices) or self.options.mode == "keep" or self.options.streams:
            raise ValueError(f"{len(choices)} choices for {len(self._choices)} blocks of {self.options}")
        self._choices, self._auto, self._measuring = list(choices), False, False

    def measure(self) -> None:
        """Measure `costs` from the third forward on, as ``auto`` does by itself, and choose nothing."""
        self._measuring = True

    def make_for(self, most_tokens: int) -> None:
        """Between steps: the next one makes its memory anew, for forwards of so many tokens."""
        self.most_tokens = most_tokens
        self._settle(0)
        self._give_back()
        self.pools.close()

    def device_bytes(self) -> int:
        """On the device now: the buffers, and what is on its way out."""
        leaving = sum(flat.nbytes for _, _, flats in self._leaving for flat in flats)
        return self.pools.buffer_bytes + leaving

    def costs(self) -> list[BlockCost]:
        """Of the blocks that do not keep, as measured; empty before. Waits for the device."""
        return [_cost(sizes, elapsed_s(*self._times[position])) for position, sizes in sorted(self._sizes.items())]

    def close(self) -> None:
        """After the last backward: let go of the memory; blocks are as they were before `wrap`."""
        for own, before in self._unwrap:
            if (block := own()) is not None:
                del block.forward
                if before is not None:
                    block.forward = before
        for wrapped in self._wrapped:
            if (module := wrapped()) is not None:
                del module.forward
        self._unwrap.clear()
        self._wrapped.clear()
        self._settle(0)
        self._give_back()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.pools.close()

    # ------------------------------------------------------------------------------------------------ forward

    def _run(self, position: int, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._streaming is not None:
            forward = partial(self._streaming.run, block, self._place(position, *args))
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        self._clock += 1
        self._give_back()
        self._settle(2)
        if position == 0:
            self._decide()
        while self._tapes and self._tapes[-1]() is None:
            self._tapes.pop()
        choice, previous = self._choices[position], len(self._tapes) - 1
        if choice.mode == "keep" or self._streaming is not None:
            out = forward(*args, **kwargs)
        else:
            measured = (self._auto or self._measuring) and self._num_forwards > WARM_UP
            tape = Tape(
                block, forward, args, kwargs,
                alpha=choice.alpha, attention=choice.mode != "input", measure=measured, **self._hooks,
            )  # fmt: skip
            start = now(self.device) if measured else None
            out = tape.record()
            if measured:
                self._times[position], self._sizes[position] = (start, now(self.device)), tape.sizes()
                self._longer = self._growth(tape)
            if self._auto and choice.mode == "swap":
                choice = self._fit(position, tape)
            if choice.leaves:
                self._depart(position, tape)
            self._tapes.append(weakref.ref(tape))
        if outputs := [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]:
            begins = self._begins_backward
            register_multi_grad_hook(outputs, lambda _: begins(previous), mode="any")
        return out

    def _place(self, position: int, x: Tensor, *_: Any) -> Place:
        growth = max(1.0, (self.most_tokens or 0) * x.size(-1) / max(1, x.numel()))
        return Place(position, len(self._choices), growth, self._hold)

    def _hold(self, left: Event, made: list[Tensor]) -> None:
        self._leaving.append((self._clock, left, made))

    def _depart(self, position: int, tape: Tape) -> None:
        """Copy a tape's sources to host memory; they are let go of once they are there."""
        sources = [source for source in tape.sources if source.flat is not None]
        number, num = (sum(choice.leaves for choice in some) for some in (self._choices[:position], self._choices))
        alpha = max(choice.alpha for choice in self._choices)  # slots are equal, so they are made for the largest
        longest = longest_room(sources, self._growth(tape), alpha, whole=False)
        size_bytes = room(sources, whole=False)
        slot = self.pools.take_slot(size_bytes, num, longest)
        flats: list[Tensor] = []
        wait(self.device, self._out, mark(self.device, None), slot.free)
        with on(self._out):
            for source, place in zip(sources, places(slot.data, sources, whole=False), strict=True):
                assert source.flat is not None
                place.copy_(source.flat[: source.stored], non_blocking=True)
                flats.append(source.flat)
                source.flat = None
        left = mark(self.device, self._out)
        lease = Lease(self.pools.pass_on(slot, size_bytes, left, number, num), left)
        self._leaving.append((self._clock, left, flats))
        self._leases[tape] = lease
        weakref.finalize(tape, self._ended.append, lease).atexit = False
        tape.restore = self._restores

    def _growth(self, tape: Tape) -> float:
        """How many times its tokens may still come at once, see [Note: made for the longest]."""
        return max(1.0, (self.most_tokens or 0) / tape.num_tokens)

    def _settle(self, age: int) -> None:
        """Let go of what left in a forward `age` or more forwards ago, once it has been copied out."""
        while self._leaving and self._clock - self._leaving[0][0] >= age:
            wait(self.device, None, self._leaving[0][1])
            self._leaving.popleft()

    # ------------------------------------------------------------------------------------------------ backward

    def _before_backward(self, previous: int) -> None:
        """When a block's backward begins: bring back what the block before it left."""
        self._settle(0)
        self._give_back()
        if 0 <= previous < len(self._tapes) and (tape := self._tapes[previous]()) is not None:
            lease = self._leases.get(tape)
            if lease is not None and lease.slot is not None and self.pools.is_there(lease.slot):
                self._fetch(tape, lease)

    def _fetch(self, tape: Tape, lease: Lease) -> None:
        assert lease.slot is not None
        slot = self.pools.brought(lease.slot)
        sources = [source for source in tape.sources if source.numel]
        longest = longest_room(sources, self._growth(tape), tape.alpha, whole=True)
        lease.buffer = self.pools.take_buffer(room(sources, whole=True), longest)
        stored = places(slot.data, sources, whole=False)
        wait(self.device, self._in, lease.left, lease.buffer.free)
        with on(self._in):
            for source, place, piece in zip(
                sources, places(lease.buffer.data, sources, whole=True), stored, strict=True
            ):
                place[: source.stored].copy_(piece, non_blocking=True)
                source.flat = place
        lease.arrived, lease.slot = mark(self.device, self._in), None
        self.pools.give_slot(slot, lease.arrived)
        self.pools.load_ahead()

    def _restore(self, tape: Tape) -> None:
        lease = self._leases[tape]
        if lease.buffer is None:
            self._fetch(tape, lease)
        wait(self.device, None, lease.arrived)
        tape.replay()

    def _give_back(self) -> None:
        """What ended tapes held; called where a block begins, so that whatever the one before it reads is launched."""
        while self._ended:
            lease = self._ended.pop()
            if lease.slot is not None:
                self.pools.give_slot(lease.slot, lease.left)
            if lease.buffer is not None:
                self.pools.give_buffer(lease.buffer)

    # ------------------------------------------------------------------------------------------------ auto

    def _fit(self, position: int, tape: Tape) -> Choice:
        """While nothing is measured yet: what `tape` and all others that swap do, by what host memory has room for."""
        cost = _cost({kind: int(self._growth(tape) * size) for kind, size in tape.sizes().items()}, 0.0)
        away = [place for place, choice in enumerate(self._choices) if choice.mode == "swap"]
        for place, choice in zip(away, fit([cost] * len(away), self.pools.host_room()), strict=True):
            self._choices[place] = choice
        if self._choices[position].mode == "input":
            tape.forget_attention()
        return self._choices[position]

    def _decide(self) -> None:
        """After the forward that is measured, choose for each block that does not keep."""
        self._num_forwards += 1
        if not self._auto or self._num_forwards < WARM_UP + 2:
            return
        self._auto = False
        rate, most = link_bytes_per_s(self.device), self.pools.host_room()
        spare = spare_bytes(self.device, self._device_bytes)
        costs, host_bytes = self.costs(), int(most / self._longer)
        short = any(choice.mode != "swap" for choice in fit(costs, host_bytes))
        drives = self._drive_room() if short else None
        step = 1 if torch.are_deterministic_algorithms_enabled() else STEP  # products of fewer rows round differently
        make = partial(
            choose, costs, link_bytes_per_s=rate, host_bytes=host_bytes, gpu_bytes=spare, keep_last=0, drives=drives,
            step=step,
        )  # fmt: skip
        num_kept = sum(choice.mode == "keep" for choice in make())
        chosen = make(keep_most=self._least(num_kept))
        for position, choice in zip(sorted(self._sizes), chosen, strict=True):
            self._choices[position] = choice
        left = "" if spare is None else f", {spare / 1e9:.1f} GB left over on the device"
        behind = f", drives {drives.bytes_per_s / 1e9:.1f} GB/s" if drives else ""
        self._say(
            f"activations: {describe(self._choices)}; link {rate / 1e9:.1f} GB/s, {most / 1e9:.1f} GB of host memory"
            + left
            + behind
        )

    def _drive_room(self) -> DriveRoom | None:
        """What drives behind host memory hold of the tokens that were measured, and their rate."""
        drives = self.pools.drives
        return DriveRoom(drives.room_bytes() / self._longer, drives.bytes_per_s()) if drives else None


def _cost(sizes: dict[str, int], forward_s: float) -> BlockCost:
    return BlockCost(forward_s=forward_s, **{f"{kind}_bytes": size for kind, size in sizes.items()})


def describe(choices: Sequence[Choice]) -> str:
    """``26 blocks swap 0.35 of the tokens, 2 blocks keep``."""
    said = {"input": "swap their input alone"}
    words = [f"swap {c.alpha:.2f} of the tokens" if c.mode == "swap" else said.get(c.mode, c.mode) for c in choices]
    return ", ".join(f"{num} {'block' if num == 1 else 'blocks'} {word}" for word, num in Counter(words).items())
