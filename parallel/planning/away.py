"""States away from the device, for a plan: the layers that `offload.cost` reckons with, and what it answers, in words.

The engine places flat buffers by `offload.placing`; here the same buffers are made of a `Workload`'s numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from offload.choose import Chosen, MemoryBudget, choose, device_bytes
from offload.cost import Layer, Prediction, Rates, predict, seconds
from offload.options import OffloadOptions
from offload.placing import Part
from parallel.planning.cost import Plan, memory, traffic_of
from parallel.planning.machine import Machine
from parallel.planning.traffic import Traffic
from parallel.planning.workload import UnitCost, Workload

MEASURED = {
    "update": 4.7e9, "pingpong": 5.5e9, "weights": 8.2e9, "states": 5.1e9,
    "resident": 8e10, "into": 50e9, "out": 50e9, "drive": 2.3e9,
}  # fmt: skip
"""What one H200 had beside it: 16 cores with AVX-512 (150 GB/s), PCIe 5 x16, one drive (benchmarks/results). But the
rates of weights and states alone are those of the update by the bytes that they move, 16 and 26 of 28: not measured."""
Seconds = Callable[[UnitCost], tuple[float, float]]
"""Of a unit: a micro-batch's forward and backward."""
GIB = 2**30


def layers_of(work: Workload, traffic: Traffic, times: Seconds) -> list[Layer]:
    """This rank's layers, in the order in which they run, the root first."""
    return [_layer(unit, work, traffic, times(unit)) for unit in work.all]


def _layer(unit: UnitCost, work: Workload, traffic: Traffic, times: tuple[float, float]) -> Layer:
    place, parts, frozen, gathered = traffic.placement, [], 0, 0
    for numel, trained, packs in traffic.flats(unit):
        kept, owned = traffic.shard(numel, place.params), traffic.shard(numel, place.optim)
        packed = packs and traffic.weights_format is not None
        weight_bytes = (
            traffic.packed_weights(kept, owned) if packs and traffic.shard_packed else work.compute_bytes * kept
        )
        gathered += work.compute_bytes * numel
        if not trained:
            frozen += weight_bytes
            continue
        dtype = torch.float32 if packed or work.compute_bytes == 4 else torch.bfloat16
        parts.append(
            Part(
                numel=owned, weight_bytes=weight_bytes, slot_dtype=dtype, slot_is_shard=kept == owned and not packed,
                weights_direct=not packed,
            )
        )  # fmt: skip
    forward_s, backward_s = times
    return Layer(
        forward_s=forward_s, backward_s=backward_s, parts=tuple(parts), frozen_bytes=frozen, gathered_bytes=gathered
    )


def by_flops(work: Workload, compute: float, unit_s: float = 0.0) -> Seconds:
    """Times of units at so many FLOP/s."""

    def times(unit: UnitCost) -> tuple[float, float]:
        backward = unit.backward_flops + unit.recompute * unit.forward_flops
        return work.tokens * unit.forward_flops / compute + unit_s, work.tokens * backward / compute + unit_s

    return times


def activation_bytes(work: Workload, traffic: Traffic) -> float:
    """An estimate of all on the device that is neither weights, gradients nor states."""
    sizes = memory(work, traffic)
    return sizes["activations"] + sizes["communication buffers"]


def rates_of(machine: Machine) -> Rates:
    """Of one rank: `MEASURED`, and over it what the machine's file says under ``away``."""
    given: Mapping[str, float] = machine.away
    if unknown := given.keys() - {item.name for item in fields(Rates)}:
        raise ValueError(f"machine.away has {sorted(unknown)}; there are {[item.name for item in fields(Rates)]}")
    return Rates(**{**MEASURED, **given})


@dataclass(frozen=True, kw_only=True)
class AwayPlan:
    """What offloading does to a planned step."""

    options: OffloadOptions
    prediction: Prediction
    device_bytes: float
    room: MemoryBudget
    waits_s: float
    """For links between ranks, a step; not in the prediction."""
    chosen: Chosen | None
    """Where ``offload.states=auto`` chose it."""

    @property
    def step_s(self) -> float:
        return self.prediction.step_s + self.waits_s

    @property
    def waits(self) -> bool:
        """Whether links between ranks are most of a step."""
        return self.waits_s > self.prediction.step_s

    def _tiers(self) -> list[tuple[str, float, float, float]]:
        """Name, needed, there, too much."""
        held = self.prediction
        rows = [
            ("device", self.device_bytes, self.room.device_bytes),
            ("host", held.host_bytes, self.room.host_bytes),
            ("nvme", held.nvme_bytes, self.room.nvme_bytes),
        ]
        return [(name, needed, there, needed - there) for name, needed, there in rows]

    def rows(self) -> list[str]:
        """A table of memory by tier, what moves in a step, how long it takes and what limits it."""
        lines = [f"{'away, a rank':24}{'GiB':>12}"]
        for name, needed, there, over in self._tiers():
            said = f": does NOT fit, {over / GIB:.1f} GiB too much" if over > 0 else ""
            limit = f"  of {there / GIB:.1f}" if there < float("inf") else ""
            lines.append(f"  {name:22}{needed / GIB:12.3f}{limit}{said}")
        held = self.prediction
        links = f"{held.into_bytes / 1e9:.4g} GB to the device, {held.out_bytes / 1e9:.4g} from it"
        drives = ""
        if held.written_bytes:
            written = "as much" if held.read_bytes == held.written_bytes else f"{held.written_bytes / 1e9:.4g}"
            drives = f"; drives {held.read_bytes / 1e9:.4g} GB read and {written} written"
        waits = f" and {seconds(self.waits_s)} for links between ranks" if self.waits_s > 0.005 * self.step_s else ""
        lines += ["", f"moves      {links}{drives}", f"with away  {held}{waits}"]
        if self.chosen:
            lines.append(f"chosen     {self.chosen.why}")
        return lines


def plan_away(
    work: Workload, plan: Plan, machine: Machine, options: OffloadOptions, *, cap_bytes: float, waits_s: float
) -> AwayPlan:
    """Reckon with `options`, or choose for ``offload.states=auto``. ValueError where ``auto`` finds nothing that fits.

    cap_bytes: the device's memory that may be used. waits_s: what a step waits for links between ranks.
    """
    traffic = traffic_of(work, plan, machine)
    layers = layers_of(work, traffic, by_flops(work, machine.compute, machine.unit_s))
    kept, rates = activation_bytes(work, traffic), rates_of(machine)
    room = MemoryBudget(
        device_bytes=cap_bytes if options.device_bytes is None else options.device_bytes,
        host_bytes=_cap(options.host_limit, machine.memory.get("host")),
        nvme_bytes=_cap(options.nvme_bytes, machine.memory.get("nvme")),
    )
    chosen = None
    if options.states == "auto":
        chosen = choose(
            layers, options, rates, room, micro_batches=work.micro_batches, activation_bytes=kept
        )  # fmt: skip
        options = chosen.options
    return AwayPlan(
        options=options,
        prediction=predict(layers, options, rates, micro_batches=work.micro_batches),
        device_bytes=device_bytes(layers, options, micro_batches=work.micro_batches, activation_bytes=kept),
        room=room,
        waits_s=waits_s,
        chosen=chosen,
    )


def _cap(asked: int | None, there: float | None) -> float:
    limits: Sequence[float] = [limit for limit in (asked, there) if limit is not None]
    return min(limits, default=float("inf"))
