"""What ``atoll plan`` says of activations: what each thing that blocks may do takes, and the α that would be chosen.

Its figure of the job's own choice is the one that the table of memory and ``parallel=auto`` reckon with.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from launch.config import Config
from offload.activations.attention_tiles import check_dtype
from offload.activations.memory import HOST_SHARE
from offload.activations.plan import STEP, BlockCost, DriveRoom, choose
from offload.options import ActivationOptions
from parallel.mesh import Mesh
from parallel.placement import Placement
from parallel.planning.away import rates_of
from parallel.planning.cost import Clock
from parallel.planning.machine import Machine
from parallel.planning.traffic import EXACT, Traffic
from parallel.planning.workload import Workload
from parallel.transport import Transport
from trainer.fit_activations import ActivationBudget, forward_s, host_room, narrow, others_bytes
from trainer.footprint import Footprint, alternatives, footprint

log = logging.getLogger(__name__)
LINK_BYTES_PER_S = 50e9
"""Each way between a GPU and host memory while both are busy: PCIe 5 x16 (docs/activations.md)."""


@dataclass(frozen=True)
class ActivationPlan:
    footprint: Footprint
    asked: ActivationOptions
    auto: ActivationOptions
    """What ``auto`` would come to by the machine's rates; a run measures instead."""
    why: str
    host_room: float = math.inf
    """Bytes of host memory for them, where what it does not hold goes on to drives."""
    hides: bool = False
    """Whether `auto` lets it."""
    host_most: float = math.inf
    """Bytes of host memory that may be taken for them."""

    @property
    def settled(self) -> ActivationOptions:
        """What the job's blocks do."""
        return self.auto if self.asked.chooses else self.asked

    @property
    def device_bytes(self) -> int:
        return self.footprint.device_bytes(self.settled)

    @property
    def written_bytes(self) -> int:
        """To drives, a micro-batch."""
        return self._host_bytes(self.settled)[1]

    def _host_bytes(self, one: ActivationOptions) -> tuple[int, int]:
        """In host memory and on drives."""
        room = math.inf if one is self.auto and not self.hides else self.host_room
        return self.footprint.host_bytes(one, room)

    def rows(self, tier: str) -> list[str]:
        """A table; the row with an asterisk is the job's."""
        rows = alternatives(self.asked, streams=self.footprint.stream_bytes is not None)
        auto = "offload.activations=auto (" + (
            f"α = {self.auto.alpha:.2f})" if self.auto.alpha is not None else f"{self.auto.mode})"
        )
        if self.asked.chooses:
            mine = auto
        else:
            mine = next((text for text, one in rows.items() if _same(one, self.asked)), "as configured")
        rows = {mine: self.settled, **rows, auto: self.auto} if mine == "as configured" else {**rows, auto: self.auto}
        width, drives = max(map(len, rows)) + 4, self.host_room < math.inf
        heads = [f"{name}, GiB" for name in (tier, "host", *(["nvme"] if drives else []))]
        lines = [f"{'activations of a micro-batch':{width}}" + "".join(f"{head:>12}" for head in heads)]
        for text, one in rows.items():
            sizes = self.footprint.device_bytes(one), *self._host_bytes(one)
            columns = "".join(f"{size / 2**30:12.3f}" for size in sizes[: len(heads)])
            lines.append(f"{'*' if text == mine else ' '} {text:{width - 2}}{columns}")
        over = self._host_bytes(self.settled)[0] - self.host_most
        if over > 0 and not self.asked.chooses:
            lines.append(f"  does NOT fit: {over / 2**30:.3g} GiB more than there is of host memory for activations")
        return [*lines, f"  {self.why}"]


def plan_activations(
    config: Config, work: Workload, machine: Machine, mesh: Mesh, cap_bytes: float
) -> ActivationPlan | None:
    """None, and a warning, for a model that fake tensors do not run: then there are the estimates of `work` alone.
    cap_bytes: of the device's memory, what may be used."""
    micro, _ = config.micro_batches(mesh.world)
    try:
        found = footprint(
            config.job(),
            vocab_size=_vocab_size(config),
            micro_batch_size=micro,
            dtype=torch.bfloat16 if work.compute_bytes == 2 else torch.float32,
        )
    except Exception as error:
        log.warning("activations are estimated from layers' widths alone: %s: %s", type(error).__name__, error)
        return None
    options = config.offload.activations
    there, numel = machine.memory.get("host", math.inf), work.numel / mesh.world
    host = host_room(config.offload, HOST_SHARE * there, numel)
    drives = None
    if config.offload.nvme_path and options.swaps:
        size_bytes = config.offload.nvme_bytes or machine.memory.get("nvme", math.inf)
        drives = DriveRoom(size_bytes, rates_of(machine).drive or 0.0)
    traffic = _traffic(config, work, machine, mesh)
    cost = found.cost(_forward_s(work, machine, traffic))
    room = _room(config, machine, traffic, host, drives, cap_bytes)
    narrowed = narrow(replace(options, mode="auto", alpha=None), found, room, cost.forward_s)
    if narrowed.options.mode == "auto":
        auto, why, hides = _auto(config, narrowed.options, machine, found, cost, room, drives)
        why = f"{why}; {narrowed.why}" if narrowed.why else why
    else:
        auto, why, hides = narrowed.options, f"{narrowed.options.mode}: {narrowed.why}", True
    most = host_room(config.offload, there, numel)
    return ActivationPlan(found, options, auto, why, host if drives else math.inf, hides, most)


def _traffic(config: Config, work: Workload, machine: Machine, mesh: Mesh) -> Traffic:
    """With ``parallel=auto`` states are sharded as far as they can be: the placement is chosen by what activations
    take."""
    parallel, auto = config.parallel, config.parallel.placement == "auto"
    placement = Placement(*[mesh.num_levels] * 3) if auto else Placement.of(parallel, mesh.num_levels)
    transport = EXACT if auto else Transport.of(parallel, mesh, placement)
    return Traffic(work, mesh, placement, transport, gloo=machine.backend == "gloo")


def _forward_s(work: Workload, machine: Machine, traffic: Traffic) -> float:
    """Of a block, with what it sends where ranks share sequences: both are time for what leaves."""
    clock = Clock(machine, traffic.mesh, work)
    sent_s = sum(clock.move(move) for chain in traffic.unit(work.block).sequence for move in chain)
    return forward_s(work, machine.compute) + sent_s


def _room(
    config: Config, machine: Machine, traffic: Traffic, host_bytes: float, drives: DriveRoom | None, cap_bytes: float
) -> ActivationBudget:
    work = traffic.work
    if machine.tier != "gpu" and config.offload.device_bytes is None:
        cap_bytes = math.inf
    known: Callable[[], DriveRoom] | None = None if drives is None else lambda: drives
    return ActivationBudget(
        device_bytes=max(0.0, cap_bytes - others_bytes(config.offload, work, traffic)),
        host_bytes=host_bytes,
        drives=known,
        refused=_refused(work, machine),
    )


def _refused(work: Workload, machine: Machine) -> str:
    """Why its kernels cannot run by tiles; empty where they can."""
    try:
        dtype = torch.bfloat16 if work.compute_bytes == 2 else torch.float32
        check_dtype(dtype, torch.device("cuda" if machine.tier == "gpu" else "cpu"))
    except ValueError as error:
        return str(error)
    return ""


def _auto(
    config: Config,
    options: ActivationOptions,
    machine: Machine,
    found: Footprint,
    cost: BlockCost,
    room: ActivationBudget,
    drives: DriveRoom | None,
) -> tuple[ActivationOptions, str, bool]:
    """What ``auto`` would come to, why, and whether it has drives behind host memory."""
    rate, host = link_rate(machine), room.host_bytes
    asked, spare = options.num_kept(found.num_blocks), None
    if machine.tier == "gpu" and math.isfinite(room.device_bytes) and config.offload.states != "auto":
        # what a run finds left over: on a CPU it does not ask, and states that are chosen fill the device before
        spare = max(0, int(room.device_bytes) - found.device_bytes(replace(options, mode="swap", alpha=0.0)))
    choices = choose(
        [cost] * (found.num_blocks - asked),
        link_bytes_per_s=rate,
        host_bytes=None if host == math.inf else int(host),
        gpu_bytes=spare,
        keep_last=0,
        drives=drives,
        step=1 if config.train.deterministic else STEP,
    )
    more = sum(choice.mode == "keep" for choice in choices)
    away = [choice for choice in choices if choice.mode != "keep"]
    mode, alpha = (away[0].mode, away[0].alpha) if away else ("keep", 0.0)
    hides = rate * cost.forward_s
    chosen = f"α = {alpha:.2f}" if away else "no block swaps"
    why = (
        f"{chosen}: a block takes {1e3 * cost.forward_s:.3g} ms forward, in which {hides / 1e9:.3g} GB leave "
        f"at {rate / 1e9:.0f} GB/s, of {cost.least_bytes / 1e9:.3g} GB and α times {cost.rest_bytes / 1e9:.3g} GB"
    )
    if inputs := sum(choice.mode == "input" for choice in away):
        why += f"; host memory does not hold inputs and attention: {inputs} blocks swap their input alone"
    if recomputed := sum(choice.mode == "recompute" for choice in away):
        why += f"; it does not hold the inputs of {recomputed} blocks: they are recomputed"
    if more:
        assert spare is not None
        why += f"; the last {asked + more} blocks keep all, as the device has {spare / 1e9:.3g} GB left over"
    settled = replace(options, mode=mode, alpha=alpha if mode == "swap" else None, keep_last=asked + more)
    if drives and mode == "swap" and (size_bytes := found.host_bytes(settled, host)[1]):
        why += (
            f"; {size_bytes / 1e9:.3g} GB, which host memory does not hold, go on to NVMe at "
            f"{drives.bytes_per_s / 1e9:.2g} GB/s beside {found.num_blocks} of these forwards"
        )
    return settled, why, mode == "swap"


def link_rate(machine: Machine) -> float:
    """Between where a rank computes and host memory; without a GPU a copy in memory."""
    return LINK_BYTES_PER_S if machine.tier == "gpu" else machine.memory_rate / 2


def _same(a: ActivationOptions, b: ActivationOptions) -> bool:
    keys = ("mode", "alpha", "keep_last") if a.swaps and not a.streams else ("mode",)
    return all(getattr(a, key) == getattr(b, key) for key in keys)


def _vocab_size(config: Config) -> int:
    from trainer.data.tokenizer import open_tokenizer

    return open_tokenizer(config.data.tokenizer).vocab_size
