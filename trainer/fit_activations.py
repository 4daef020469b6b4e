"""What ``offload.activations=auto`` is to choose from, before the engine is built: what of it fits the device.

`offload.activations` chooses α while it trains, and measures for that with α = 0, which has to fit. Whether it does is
known beforehand, by count (`trainer.footprint`): what blocks would take, beside weights, gradients and states. The
first of these that fits is taken:

    auto          with fewer blocks that keep everything where `keep_last` of them do not fit
    input         of all blocks
    stream        where host memory, or drives that hide, hold what it leaves
    stream_input  where they hold inputs

and the last that is possible, and takes less, where none fits. The count depends on the job and on how much memory the
device has, not on what is free, so that a resumed run chooses the same.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from offload.activations.memory import HOST_SHARE
from offload.activations.plan import BlockCost, DriveRoom, fit, hides
from offload.activations.slots import Drives
from offload.activations.stream import check_blocks
from offload.arena import capacity_bytes
from offload.choose import GIB, HEADROOM, device_bytes
from offload.device import peak_flops
from offload.options import ActivationOptions, OffloadOptions
from parallel import Placement
from parallel.offloaded import ranks_here
from parallel.planning.away import layers_of
from parallel.planning.cost import memory
from parallel.planning.traffic import Traffic
from parallel.planning.workload import Workload
from parallel.transport import Transport
from trainer.build import Rank, mesh_of
from trainer.footprint import Footprint, footprint
from trainer.job import Job
from trainer.models import LanguageModel
from trainer.out_of_memory import limit_bytes
from trainer.workload import workload_of

log = logging.getLogger(__name__)
STATE_BYTES = 14
"""A parameter, in host memory with ``offload.states=host`` (docs/offload.md)."""
REACHED = 0.5
"""Of a GPU's peak of FLOP/s, what a block's forward reaches: for whether drives hide behind it."""


@dataclass(frozen=True, kw_only=True)
class ActivationBudget:
    """What a rank has for activations."""

    device_bytes: float
    host_bytes: float
    drives: Callable[[], DriveRoom] | None = None
    """Behind host memory; asked where that is short, as it may take seconds."""
    refused: str = ""
    """Why blocks cannot run by tiles; of blocks that do not offer it the footprint knows."""


@dataclass(frozen=True)
class Narrowed:
    options: ActivationOptions
    rung: int
    """How far down it went; 0: as asked."""
    device_bytes: int
    """That they take at the least."""
    why: str


class _Host:
    """What host memory, and drives behind it, hold of what all blocks leave."""

    def __init__(self, cost: BlockCost, num_blocks: int, room: ActivationBudget) -> None:
        self._cost, self._num_blocks, self._room = cost, num_blocks, room

    @cached_property
    def drives(self) -> DriveRoom | None:
        """Asked for where it matters: it takes seconds."""
        return self._room.drives() if self._room.drives else None

    @property
    def hides(self) -> bool:
        """Whether inputs and attention go on to drives while blocks compute."""
        return self.drives is not None and hides([self._cost] * self._num_blocks, self._room.host_bytes, self.drives)

    @property
    def both_bytes(self) -> int:
        return self._num_blocks * self._cost.least_bytes

    @property
    def holds_both(self) -> bool:
        return self.both_bytes <= self._room.host_bytes or self.hides

    @property
    def holds_inputs(self) -> bool:
        each, there = self._cost.input_bytes, self._room.host_bytes
        short = self._num_blocks * each - there
        return short <= 0 or (self.drives is not None and 2 * each <= there and short <= self.drives.size_bytes)


def narrow(options: ActivationOptions, sizes: Footprint, room: ActivationBudget, forward_s: float) -> Narrowed:
    """What ``auto`` may begin with. forward_s: of a block, for whether drives hide behind it."""
    cost, asked = sizes.cost(forward_s), options.num_kept(sizes.num_blocks)
    host = _Host(cost, sizes.num_blocks, room)
    taken = [_auto_bytes(replace(options, keep_last=kept), sizes, cost, room, host) for kept in range(asked + 1)]
    fitting = [kept for kept, size in enumerate(taken) if size <= room.device_bytes]
    if asked in fitting:
        return Narrowed(options, 0, taken[asked], "")
    why = f"by count {_gib(room.device_bytes)} of the device are left for activations"
    if fitting:
        kept = fitting[-1]
        why += f"; with offload.activations.keep_last={asked} they take {_gib(taken[asked])}, with {kept} they fit"
        return Narrowed(replace(options, keep_last=kept), asked - kept, taken[kept], why)
    alone = replace(options, mode="input", keep_last=0)
    alone_bytes = sizes.device_bytes(alone)
    why += f"; what it chooses takes {_gib(taken[0])} at the least, input alone {_gib(alone_bytes)}"
    if alone_bytes <= room.device_bytes and host.holds_inputs:
        return Narrowed(alone, asked + 1, alone_bytes, why)
    mode, said = _by_tiles(options, sizes, room, host, taken[0])
    if not mode:
        return Narrowed(options, 0, taken[asked], why + said)
    tiles = replace(options, mode=mode, keep_last=0)
    return Narrowed(tiles, asked + (2 if mode == "stream" else 3), sizes.device_bytes(tiles), why + said)


def _by_tiles(
    options: ActivationOptions, sizes: Footprint, room: ActivationBudget, host: _Host, otherwise_bytes: int
) -> tuple[str, str]:
    """The mode of blocks that run by tiles, or "", and why. otherwise_bytes: of the device, what they would take
    else."""
    if sizes.stream_bytes is None or room.refused:
        return "", f", and they cannot run by tiles: {room.refused or 'the model does not say how its blocks do'}"
    said = f", tiles of {options.stream_tokens} tokens {_gib(sizes.stream_bytes)}"
    if sizes.stream_bytes >= otherwise_bytes:
        return "", f"{said}: smaller ones (offload.activations.tile_tokens) may take less"
    if host.holds_both:
        return "stream", said
    said += f"; {_gib(room.host_bytes)} of host memory do not hold inputs and attention, {_gib(host.both_bytes)}"
    if host.holds_inputs:
        return "stream_input", said
    return "", f"{said}, nor inputs: give drives by offload.nvme_path, or more host memory"


def _auto_bytes(
    options: ActivationOptions, sizes: Footprint, cost: BlockCost, room: ActivationBudget, host: _Host
) -> int:
    """The least of the device that ``auto`` takes with so many blocks that keep: while it measures, and then."""
    choices = fit([cost] * (sizes.num_blocks - options.num_kept(sizes.num_blocks)), room.host_bytes)
    swap = sizes.device_bytes(replace(options, mode="swap", alpha=0.0))
    if not choices or choices[0].mode == "swap":
        return swap
    recomputed = sum(choice.mode == "recompute" for choice in choices)
    alone = sizes.device_bytes(replace(options, mode="input")) + recomputed * cost.least_bytes
    if room.drives is None or (alone <= room.device_bytes < swap and not host.hides):
        return alone
    return max(alone, swap)


def others_bytes(options: OffloadOptions, work: Workload, traffic: Traffic) -> float:
    """On the device beside activations; with ``offload.states=auto`` the least that there may be."""
    sizes = memory(work, traffic)
    buffers = sizes["communication buffers"]
    stay = sum(sizes.values()) - sizes["activations"]
    if not options.away:
        return stay
    layers = layers_of(work, traffic, lambda _: (0.0, 0.0))

    def away(one: OffloadOptions) -> float:
        return device_bytes(layers, one, micro_batches=work.micro_batches, activation_bytes=buffers)

    if options.states != "auto":
        return away(options)
    host = replace(options, states="host", device_bytes=None)
    return min(stay, away(host), away(replace(host, weights="host")))


def reckoned(
    job: Job, model: LanguageModel, where: Rank, dtype: torch.dtype, *, activation_bytes: int | None = None
) -> tuple[Workload, Traffic]:
    """What a rank holds, and what it sends. model: on ``meta``. activation_bytes: of the device, if counted."""
    mesh = mesh_of(job, where)
    placement = Placement.of(job.parallel, mesh.num_levels)
    work = workload_of(job, model, where.world, compute_bytes=dtype.itemsize)
    work = replace(work, activation_bytes=activation_bytes)
    gloo = where.device.type == "cpu"
    return work, Traffic(work, mesh, placement, Transport.of(job.parallel, mesh, placement), gloo=gloo)


def forward_s(work: Workload, flops_per_s: float) -> float:
    """Of a block."""
    return work.tokens * work.block.forward_flops / flops_per_s


def settle(
    job: Job, model: LanguageModel, where: Rank, dtype: torch.dtype, say: Callable[[str], None]
) -> tuple[Job, int | None]:
    """The job with what ``auto`` may begin with, and what blocks that swap take of the device; None where it is not
    known, or nobody asks: with another mode ``offload.states=auto`` alone does. Collective: all ranks take what the one
    that has least can.

    model: on ``meta``. Nothing is known, and nothing changed, on CPU without ``offload.device_bytes``."""
    options = job.offload.activations
    most = job.offload.device_bytes or limit_bytes(where.device)
    if job.engine != "native" or most is None:
        return job, None
    if options.mode != "auto":
        if job.offload.states != "auto" or options.mode not in ("swap", "input"):
            return job, None
        sizes = _counted(job, model, where, dtype)
        counts = where.gather(sizes and sizes.device_bytes(options))
        return job, None if None in counts else max(counts)
    answers = where.gather(_narrowed(job, model, where, dtype, HEADROOM * most))
    if None in answers:
        return job, None
    found: Narrowed = max(answers, key=lambda one: one.rung)
    if found.why:
        chosen = found.options
        keeps = f" offload.activations.keep_last={chosen.keep_last}" if chosen.mode in ("auto", "input") else ""
        say(f"offload.activations=auto: offload.activations={chosen.mode}{keeps if found.rung else ''}: {found.why}")
    return replace(job, offload=job.offload.with_activations(found.options)), found.device_bytes


def _counted(job: Job, model: LanguageModel, where: Rank, dtype: torch.dtype) -> Footprint | None:
    """Of this rank; None for a model that fake tensors do not run."""
    micro, _ = job.micro_batches(where.world)
    try:
        return footprint(job, vocab_size=model.vocab_size, micro_batch_size=micro, dtype=dtype)
    except Exception as error:
        log.warning("no estimate of what fits: %s: %s", type(error).__name__, error)
        return None


def _narrowed(job: Job, model: LanguageModel, where: Rank, dtype: torch.dtype, most_bytes: float) -> Narrowed | None:
    """Of this rank; None where nothing is counted: it chooses as it may, and may not fit."""
    options, here = job.offload, ranks_here()  # at once: a rank that fails below asks the others nothing more
    if (sizes := _counted(job, model, where, dtype)) is None:
        return None
    work, traffic = reckoned(job, model, where, dtype)
    room = ActivationBudget(
        device_bytes=max(0.0, most_bytes - others_bytes(options, work, traffic)),
        host_bytes=host_room(options, HOST_SHARE * capacity_bytes() / here, work.numel / where.world),
        drives=(lambda: _drives(options, here)) if options.nvme_path else None,
        refused=_refused(job, model, dtype, where.device),
    )
    peak = peak_flops(where.device, dtype)
    return narrow(options.activations, sizes, room, forward_s(work, REACHED * peak) if peak else 0.0)


def host_room(options: OffloadOptions, there_bytes: float, num_parameters: float) -> float:
    """Of host memory for a rank's activations. num_parameters: whose states it has."""
    away = STATE_BYTES * num_parameters if options.states == "host" else 0.0
    return options.activations.host_bytes or max(0.0, there_bytes - away)


def _drives(options: OffloadOptions, here: int) -> DriveRoom:
    drives = Drives(
        folders=[Path(path) for path in options.nvme_path],
        direct=options.nvme_direct,
        most_bytes=options.nvme_bytes,
        sharing=here,
    )
    return DriveRoom(drives.room_bytes(), drives.bytes_per_s())


def _refused(job: Job, model: LanguageModel, dtype: torch.dtype, device: torch.device) -> str:
    """Why its blocks cannot run by tiles; empty where they can."""
    try:
        check_blocks(replace(job.offload.activations, mode="stream"), model.blocks(), dtype, device)
    except ValueError as error:
        return str(error)
    return ""


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.3g} GiB" if math.isfinite(size_bytes) else "all"
