"""The engine's side of what is away from the device (`offload/states.py`): which flat buffers, and when they move.

[Note: a slot that is the shard] Where a rank's parameter range is its optimizer range and the weights live in host
memory, one place serves as weight and gradient: the gradient overwrites the weights when the unit's backward is done
with them, the update overwrites the gradient with new weights. 14 bytes a parameter in all. Such a slot can be on
drives, with its states: the weights are then loaded when they are used.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from offload.activations.slots import Drives
from offload.hostpool import HostPool
from offload.options import OffloadOptions
from offload.placing import Part, place
from offload.shard import Run, Shard, Terms
from offload.state import Movable
from offload.states import KINDS, AdamW, AwayStates
from parallel import optimizer as optimizers
from parallel.options import OptimizerOptions
from parallel.unit import Fetch, Flat, TrainableFlat, Unit


class Offloader:
    """Decides where each flat buffer's weights and states live, gives them their memory, and moves them."""

    def __init__(
        self, units: Sequence[Unit], options: OffloadOptions, optimizer: OptimizerOptions, device: torch.device
    ) -> None:
        """units: in the order in which they run. Raises ValueError for options that cannot be met, ArenaError or
        DriveError where memory is not to be had."""
        self._states: AwayStates | None = None
        self.flats: list[TrainableFlat] = []
        """Those whose states are away, in the order in which they run."""
        self.coming: tuple[float, int] | None = None
        """lr and number of the update that follows this backward, if they are known."""
        kinds = optimizers.moment_kinds(optimizer)
        if not options.away:
            for unit in units:
                for flat in unit.flats:
                    flat.place(None)
                for trained in unit.trainable:
                    trained.place_states(kinds, None)
            return
        assert optimizer.name == "adamw", "refused by launch.checks"
        assert options.states != "auto", "what it stands for is chosen before the engine is built"
        self._states = AwayStates(
            AdamW(beta1=optimizer.beta1, beta2=optimizer.beta2, eps=optimizer.eps, weight_decay=optimizer.weight_decay),
            device=device,
            pool=HostPool(num_threads(options)),
            nvme_folders=[Path(path) for path in options.nvme_path],
            nvme_direct=options.nvme_direct,
        )
        self._place(units, options, kinds)

    def _place(self, units: Sequence[Unit], options: OffloadOptions, kinds: Sequence[str]) -> None:
        states, streams = self._states, options.streams_weights
        assert states is not None
        flats = [flat for unit in units for flat in unit.trainable]
        frozen: list[Flat] = [unit.frozen for unit in units if unit.frozen] if streams else []
        parts = [part_of(flat) for flat in flats]
        extra_bytes = sum(flat.shard_numel * flat.shard_dtype.itemsize for flat in frozen)
        placed = place(parts, options, extra_bytes=extra_bytes)
        shards: dict[Flat, Shard] = {flat: shard for flat, shard in zip(flats, placed, strict=True) if shard}
        states.add(shards.values())
        streamed: list[Flat] = [*shards, *frozen] if streams else []
        apart = [flat for flat in streamed if not (isinstance(flat, TrainableFlat) and flat.slot_is_shard)]
        for own in apart:
            states.reserve(own.shard_numel * own.shard_dtype.itemsize)
        _check_limits(states, options)
        states.allocate()

        def memory(flat: Flat) -> Tensor | Fetch | None:
            """Where the parameter shard lies in host memory, or how it comes from drives; None: on the device."""
            if flat not in streamed:
                return None
            if flat not in apart:
                shard = shards[flat]
                return partial(states.fetch, shard) if shard.slot_on_nvme else shard.weight
            assert states.arena is not None
            return states.arena.take(flat.shard_numel, flat.shard_dtype).zero_()

        for unit in units:
            for part in unit.flats:
                part.place(memory(part))
            for trainable in unit.trainable:
                trainable.place_states(kinds, shards.get(trainable))
        self.flats = [flat for unit in units for flat in unit.trainable if flat.away]

    # ------------------------------------------------------------------------------------------------ a step

    def expect(self, lr: float, updates: int) -> None:
        """By which terms the update after this backward will be made, which is its number `updates`."""
        self.coming = lr, updates
        if self._states is not None:
            self._states.expect()

    def depart(self, flat: TrainableFlat) -> None:
        """Send a final gradient away, on the current stream, if the flat's states are away."""
        if flat.away is None:
            return
        assert self._states is not None and flat.grad is not None
        self.arrive(flat)
        grad = flat.grad.to(flat.away.dtype)
        flat.squares = optimizers.sum_of_squares(grad)
        self._states.take(flat.away, grad)
        flat.grad, flat.holds_gradient = None, True
        if self.coming and all(flat.received):  # else other ranks may have more
            self._states.guess(flat.away, Terms(*self.coming, _runs(flat)))

    @property
    def leaving_bytes(self) -> int:
        """Of the device, held by gradients on their way."""
        return self._states.leaving_bytes if self._states else 0

    def update(self, scale: Tensor | None, lr: float, updates: int) -> None:
        """Start updating all that is away, see `offload/states.py`."""
        if self._states is None:
            return
        work = []
        for flat in self.flats:
            assert flat.away is not None
            work.append((flat.away, Terms(lr, updates, _runs(flat))))
            flat.holds_gradient = False
        self.coming = None
        for flat, update in zip(self.flats, self._states.update(work, scale=scale), strict=True):
            flat.updating = update
            if flat.away and flat.away.weights_first and flat.streamed:
                flat.shard = flat.away.weight  # in the other slot now

    def forget(self, lr: float, updates: int) -> None:
        """Take back what `depart` has begun: an update of nothing, which leaves all states as they are, undoes what was
        speculated and puts the weights where the gradients lie now."""
        for flat in self.flats:
            flat.received = [False] * len(flat.received)
        self.update(None, lr, updates)

    def arrive(self, flat: TrainableFlat) -> bool:
        """Have the last update of a flat in its slot, or `owned`; whether there was one under way. The host waits."""
        update, flat.updating = flat.updating, None
        if update is None:
            return False
        update.finish()
        return True

    # ------------------------------------------------------------------------------------------------ state

    def walk(self, *, write: bool) -> Iterator[tuple[TrainableFlat, int, dict[str, Tensor]]]:
        """All that is away: flat, first element in the flat buffer, and from there 1-D tensors by kind of state, good
        until the next are asked for. With `write` they are stored, and the weights put into the slots."""
        if self._states is None:
            return
        self._states.settle()
        shards = [flat.away for flat in self.flats if flat.away]
        parts = self._states.walk(shards, write=write)
        for flat in self.flats:
            done = 0
            while done < flat.chunk:
                start, state, weight = next(parts)
                yield flat, flat.optim_start + start, dict(zip(KINDS, state, strict=True))
                done = start + state[0].numel()
                if write:
                    weight.copy_(state[0])
        next(parts, None)

    def movable(self) -> Movable:
        """What may go elsewhere with an update; of states that ranks share each checkpoints a part, and they stay."""
        if self._states is None:
            return Movable(extents=())
        return self._states.movable(flat.away for flat in self.flats if flat.away and flat.states_are_own)

    def updates(self, update: str) -> bool:
        """Whether any states are updated so, one of `offload.options.UPDATES` but just in time."""
        shards = [flat.away for flat in self.flats if flat.away]
        return any(shard.pingpong if update == "speculate" else shard.weights_first for shard in shards)

    def bytes(self) -> dict[str, int]:
        """What is held in host memory and on NVMe."""
        if self._states is None:
            return {}
        return {"host": self._states.host_bytes, "nvme": self._states.nvme_bytes}

    def written_bytes_per_s(self) -> float:
        """To drives, since the first update."""
        return self._states.written_bytes_per_s() if self._states else 0.0

    def drives(self, options: OffloadOptions, sharing: int) -> Drives | None:
        """Where activations may go on to, and how much states leave of it. sharing: how many ranks take of it."""
        if not (options.nvme_path and options.activations.swaps):
            return None
        most, states = options.nvme_bytes, self.bytes().get("nvme", 0)
        return Drives(
            folders=[Path(path) for path in options.nvme_path],
            direct=options.nvme_direct,
            most_bytes=None if most is None else most - states,
            sharing=sharing,
        )

    def close(self) -> None:
        if self._states is not None:
            try:
                self._states.close()
            finally:
                self._states.pool.close()


def part_of(flat: TrainableFlat) -> Part:
    return Part(
        numel=flat.chunk,
        weight_bytes=flat.shard_numel * flat.shard_dtype.itemsize,
        slot_dtype=flat.slot_dtype,
        slot_is_shard=flat.slot_is_shard,
        weights_direct=flat.weights_direct,
    )


def _runs(flat: TrainableFlat) -> tuple[Run, ...]:
    return tuple(Run(start, stop, decays) for start, stop, decays in optimizers.runs(flat))


def _check_limits(states: AwayStates, options: OffloadOptions) -> None:
    """ValueError where a limit is below what cannot go elsewhere."""
    elsewhere = {"host": ["use offload.states=nvme"], "nvme": ["use offload.weights=nvme"]}[options.states]
    for key, limit, needed, more in (
        ("host_bytes", options.host_limit, states.host_bytes, [] if options.weights == "nvme" else elsewhere),
        ("nvme_bytes", options.nvme_bytes, states.nvme_bytes, ["give more to offload.host_bytes"]),
    ):
        if limit is not None and needed > limit:
            *remedies, last = ["raise it", "give more to offload.gpu_bytes", *more]
            raise ValueError(f"offload.{key}={limit}: this rank needs {needed}; {', '.join(remedies)}, or {last}")


def ranks_here() -> int:
    """How many ranks this machine has, this one included. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 1
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def num_threads(options: OffloadOptions) -> int:
    """Of the CPU optimizer: this machine's cores over its ranks, but for one that issues the device's work. Collective
    where they are not given."""
    return options.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here() - 1)
