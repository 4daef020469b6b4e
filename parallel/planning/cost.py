"""What a step costs: bytes and seconds per phase and level, and memory a rank, in closed form.

Two models of time share the seconds of single collectives (`Clock`): `estimate` here, a few additions that rank
hundreds of candidates, and `parallel.planning.simulate`, which plays the engine's schedule. docs/cost-model.md explains
both.
"""

import math
from collections import Counter
from dataclasses import dataclass

from parallel.mesh import Mesh
from parallel.placement import Placement
from parallel.planning.machine import Machine
from parallel.planning.traffic import EXACT, Chain, Move, Traffic
from parallel.planning.workload import UnitCost, Workload
from parallel.transport import Transport

KINDS = ("parameters", "gradients", "optimizer states", "communication buffers", "activations")


@dataclass(frozen=True)
class Plan:
    """A point of the space that is searched: what is sharded how far, and what crosses how."""

    mesh: Mesh
    placement: Placement
    transport: Transport = EXACT


class Clock:
    """Seconds of one rank's collectives, computation and passes over memory on a machine."""

    def __init__(self, machine: Machine, mesh: Mesh, work: Workload) -> None:
        self._machine, self._work = machine, work
        self._links = [
            machine.link(name) if size > 1 else None for name, size in zip(mesh.names, mesh.sizes, strict=True)
        ]
        self._below = [math.prod(mesh.sizes[i + 1 :]) for i in range(mesh.num_levels)]
        self._slow = machine.slowest_of(mesh.world) / machine.compute
        self.core = [link.core if link else 0.0 for link in self._links]
        """By level, see [Note: shared cores]."""
        self.burst_s = [link.burst / link.bandwidth if link else 0.0 for link in self._links]
        """By level, the seconds of sending that silence saves up at most."""

    def wait(self, move: Move) -> float:
        """What a collective takes beside its bytes. PyTorch's all-gather over gloo copies what came once more."""
        link = self._links[move.level]
        assert link is not None
        copied = 0.0
        if self._machine.backend == "gloo" and move.kind == "all_gather":
            copied = 2 * sum(move.sent) * move.members / (move.members - 1)
        return link.wait_s(move.kind, move.steps) + self.memory(copied)

    def transfer(self, move: Move) -> tuple[int, float]:
        """The level that holds the collective back, and the seconds its bytes take there."""
        worst, longest = move.level, 0.0
        for level, (link, sent) in enumerate(zip(self._links, move.sent, strict=True)):
            if link is None or not sent:
                continue
            rate = link.rate(move.kind, self._below[level])
            seconds = sent / rate
            if move.edge > max(move.sent):  # a ring over levels: one rank's edge crosses this one for its neighbours
                seconds = max(seconds, move.edge / (max(rate, link.alone) if link.shared else rate))
            if seconds > longest:
                worst, longest = level, seconds
        return worst, longest

    def skew(self, move: Move) -> float:
        """How much later the neighbours are through it, as a part of its seconds, see [Note: late neighbours]."""
        link = self._links[move.level]
        alone = self._below[move.level] == 1 or self.meets(move)
        return 0.0 if link is None or alone or move.kind == "all_reduce" else link.skew

    def meets(self, move: Move) -> bool:
        """Whether ranks of one member of a shared level have to do with each other in it."""
        shared = [level for level, link in enumerate(self._links) if link is not None and link.shared]
        return any(move.sent[max(shared, default=-1) + 1 :])

    def move(self, move: Move) -> float:
        return self.host((move,)) + self.wait(move) + self.transfer(move)[1]

    def host(self, chain: Chain) -> float:
        """Seconds of a chain that are packing, sums and issuing: on gloo the thread that computes does them."""
        return sum(self._machine.issue_s + self.prepare(move) + self.use(move) for move in chain)

    def prepare(self, move: Move) -> float:
        return self._local("quantize", move.before, move.bits)

    def use(self, move: Move) -> float:
        return self._local("dequantize", move.after, move.bits)

    def _local(self, act: str, size_bytes: float, bits: int) -> float:
        return self.packing(act, size_bytes, bits) if bits else self.memory(size_bytes)

    def packing(self, act: str, size_bytes: float, bits: int) -> float:
        """To ``quantize`` or ``dequantize`` a message, with so many bytes read and written; 0 for none."""
        packing = self._machine.packing.get(f"{act}_int{bits}")
        if packing is None or not size_bytes:
            return self.memory(size_bytes)
        return size_bytes / packing.rate + packing.call_s

    def chain(self, chain: Chain) -> float:
        """Without overlap every transfer over a shared link is followed by one that late neighbours take part in."""
        following = (*map(self.meets, chain[1:]), not self._work.overlap)
        return sum(map(self.move, chain)) + sum(
            self.skew(move) * max(0.0, self.transfer(move)[1] - self.burst_s[move.level])
            for move, meets in zip(chain, following, strict=True) if meets
        )  # fmt: skip

    def memory(self, size_bytes: float) -> float:
        return size_bytes / self._machine.memory_rate

    def forward(self, unit: UnitCost) -> float:
        return unit.forward_flops * self._work.tokens * self._slow + (0.0 if unit.is_root else self._machine.unit_s)

    def backward(self, unit: UnitCost) -> float:
        again = unit.recompute * self.forward(unit)
        own = unit.backward_flops * self._work.tokens * self._slow + (0.0 if unit.is_root else self._machine.unit_s)
        return own + again


@dataclass(frozen=True)
class Estimate:
    step_s: float
    phases: dict[str, float]
    """Seconds of the step that each phase adds: forward, backward, sequence, reduce (its tail), update, refresh (its
    head)."""
    compute_s: float
    levels_s: dict[str, float]
    """Seconds that each level is busy."""
    sent: dict[str, list[float]]
    """Bytes a rank sends in a step, by phase and level."""
    memory: dict[str, float]
    """Bytes a rank, by `KINDS`."""

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())


def estimate(work: Workload, plan: Plan, machine: Machine) -> Estimate:
    """The cost of a step of `work` under `plan` on `machine`, in closed form.

    A phase takes as long as its busiest resource (compute, the lane of gathers, the lane of reductions, a level's
    link), and what cannot hide: the first gather, the last reduction, the first refresh, what ranks that share
    sequences send each other. ValueError where the mesh has levels that the machine has no links for.
    """
    traffic = traffic_of(work, plan, machine)
    clock = Clock(machine, plan.mesh, work)
    step, n = _Step(work, traffic, clock), work.micro_batches
    forward_s, first_forward_s = step.forward()
    phases = {
        "forward": n * forward_s,
        "backward": (n - 1) * step.backward(step.reduce) + step.backward(step.last),
        "sequence": sum(times * sum(map(clock.move, chain)) for chain, times in step.exchanges),
        "reduce": sum(map(clock.chain, step.tail)),
        "update": update_s(work, traffic, clock) + machine.step_s + sum(map(clock.move, traffic.control())),
        "refresh": first_forward_s - forward_s,
    }
    links = step.links()
    step_s, phases = links.less_silence(phases)
    return Estimate(
        step_s=step_s,
        phases=phases,
        compute_s=n * (step.forward_s + step.backward_s),
        levels_s=dict(zip(plan.mesh.names, links.busy_s, strict=True)),
        sent=traffic.sent_bytes(),
        memory=memory(work, traffic),
    )


class _Step:
    """The chains of a step, by what may hide them, and the seconds of its forwards and backwards."""

    def __init__(self, work: Workload, traffic: Traffic, clock: Clock) -> None:
        self._work, self._clock, self._gloo = work, clock, traffic.gloo
        units, n = [(unit, traffic.unit(unit)) for unit in work.all], work.micro_batches
        num_ends = 2 if work.root else 1
        ends, others = units[:num_ends], units[num_ends:]  # a forward begins with these, a backward ends with them
        self.first = [c for _, t in ends for c in t.gather]
        self.ahead = [c for _, t in others for c in t.gather]
        self.again = [c for unit, t in units[:-1] if unit.gathers_backward and not unit.is_root for c in t.gather]
        self.reduce = [c for _, t in units for c in t.reduce]
        self.reduce_last = [c for _, t in units for c in t.reduce_last]
        self.last = [c for _, t in others for c in t.last]
        self.tail = [c for _, t in ends for c in t.last]  # these begin when nothing is left to compute
        self.exchanges = [(c, n * (1 + unit.passes_backward)) for unit, t in units for c in t.sequence]
        self.refresh = [c for _, t in units for c in t.refresh]
        self.refresh_first = units[0][1].refresh
        self.forward_s, self.backward_s = sum(map(clock.forward, work.row)), sum(map(clock.backward, work.row))
        """Of compute alone."""
        bytes_an_element = work.compute_bytes + work.reduce_bytes
        self._collect_s = sum(clock.memory(t.elements * bytes_an_element) for _, t in units)

    def forward(self) -> tuple[float, float]:
        """Seconds of a forward, and of the step's first, which the refresh runs beside."""
        head_s, head_shown = self._lane(self.first)
        ahead_s, ahead_shown = self._lane(self.ahead)
        refresh_s, refresh_shown = self._lane(self.refresh)
        head_s, host_s = head_s + head_shown, self.forward_s + ahead_shown
        if not self._work.overlap:
            seconds = head_s + self.forward_s + ahead_s + ahead_shown
            return seconds, seconds + refresh_s + refresh_shown
        beside_s = ahead_s + (self._clock.forward(self._work.row[-1]) if self.ahead else 0.0)
        seconds = head_s + max(host_s, beside_s)
        first_s = head_s + max(host_s + refresh_shown, beside_s + refresh_s)
        return seconds, max(first_s, seconds + sum(map(self._clock.chain, self.refresh_first)))

    def backward(self, reductions: list[Chain]) -> float:
        """Seconds of a backward that starts these reductions."""
        again_s, again_shown = self._lane(self.again)
        host_s = self.backward_s + self._collect_s + again_shown
        reduce_s = sum(map(self._clock.chain, reductions))
        if not self._work.overlap:
            return host_s + again_s + reduce_s
        own_s = sum(map(self._clock.host, reductions)) if self._gloo else 0.0
        links = _Links(self._clock, [(chain, 1) for chain in (*self.again, *reductions)])
        return max(host_s + own_s, again_s, reduce_s, *links.sending_s)

    def links(self) -> "_Links":
        """Under all chains of the step."""
        often = [(chain, self._work.micro_batches) for chain in (*self.first, *self.ahead, *self.again, *self.reduce)]
        reduce_last, refresh = ([(chain, 1) for chain in chains] for chains in (self.reduce_last, self.refresh))
        return _Links(self._clock, [*often, *reduce_last, *self.exchanges, *refresh])

    def _lane(self, chains: list[Chain]) -> tuple[float, float]:
        """Seconds of the chains beside compute, and of what the host does or waits for: on gloo, all but the first move
        of a chain start when the result is asked for."""
        clock = self._clock
        beside = shown = 0.0
        for chain in chains:
            for i, move in enumerate(chain):
                on_host = (clock.move(move) if i else clock.host((move,))) if self._gloo else 0.0
                shown += on_host
                beside += clock.move(move) - on_host
            beside += clock.chain(chain) - sum(map(clock.move, chain))
        return beside, shown


class _Links:
    """How long chains keep the links busy, in seconds by level."""

    def __init__(self, clock: Clock, chains: list[tuple[Chain, int]]) -> None:
        """chains: each with how often it crosses."""
        self.busy_s, self.sending_s, self._at_once_s = ([0.0] * len(clock.burst_s) for _ in range(3))
        """With the waits; without; of the latter what passes at once after a silence."""
        for chain, times in chains:
            for move in chain:
                level, seconds = clock.transfer(move)
                self.busy_s[level] += times * (clock.wait(move) + seconds)
                self.sending_s[level] += times * seconds
                self._at_once_s[level] += times * min(seconds, clock.burst_s[level])

    def less_silence(self, phases: dict[str, float]) -> tuple[float, dict[str, float]]:
        """Seconds of the step and of its phases, less what shaped links save up while they are silent."""
        step_s = sum(phases.values())
        for busy, at_once in zip(self.busy_s, self._at_once_s, strict=True):
            less = max(0.0, min(at_once, step_s - busy)) / step_s if step_s else 0.0
            phases, step_s = {name: (1 - less) * s for name, s in phases.items()}, (1 - less) * step_s
        return step_s, phases


def traffic_of(work: Workload, plan: Plan, machine: Machine, system: type[Traffic] = Traffic) -> Traffic:
    return system(work, plan.mesh, plan.placement, plan.transport, gloo=machine.backend == "gloo")


def update_s(work: Workload, traffic: Traffic, clock: Clock) -> float:
    """The norm and the optimizer's pass over memory, and packing the new weights."""
    total = packing = 0.0
    for unit in work.units:
        for numel, trained, packs in traffic.flats(unit):
            if trained:
                owned = traffic.shard(numel, traffic.placement.optim)
                out = work.compute_bytes if traffic.master_apart(packs) else 0
                total += unit.count * owned * (4 + 4 + (4 + 4 * work.moments) * 2 + out)
                if packs and traffic.weights_format:
                    format = traffic.weights_format
                    size = 4 * owned + format.packed_bytes(owned)
                    packing += unit.count * clock.packing("quantize", size, format.bits)
    return clock.memory(total) + packing


def memory(work: Workload, traffic: Traffic) -> dict[str, float]:
    """Bytes a rank at the step's peak, by `KINDS`: what the engine allocates, and the activations: those of `work`, or
    an estimate."""
    place = traffic.placement
    sizes = dict.fromkeys(KINDS, 0.0)
    alone = traffic.mesh.world == 1
    one = work.reduce_bytes if not alone else work.compute_bytes
    grad_bytes = 4 if work.micro_batches > 1 else one
    for unit in work.units:
        for numel, trained, packs in traffic.flats(unit):
            part, owned = traffic.shard(numel, place.params), traffic.shard(numel, place.optim)
            packed = packs and traffic.shard_packed
            held = traffic.packed_weights(part, owned) if packed else work.compute_bytes * part
            sizes["parameters"] += unit.count * held
            if trained:
                apart = 4 if traffic.master_apart(packs) else 0
                sizes["gradients"] += unit.count * grad_bytes * traffic.shard(numel, place.grads)
                sizes["optimizer states"] += unit.count * (apart + 4 * work.moments) * owned
                sizes["gradients"] += unit.count * (traffic.residual_bytes(numel) if packs else 0)
    sizes["gradients"] += work.compute_bytes * max((u.trained for u in work.units), default=0)  # one unit's, as made
    sizes["communication buffers"] = sum(buffers(work, traffic).values())
    kept = sum((u.input_bytes if u.recompute else u.activation_bytes) * u.count for u in work.units)
    widest = max((u.activation_bytes for u in work.units if u.recompute), default=0.0)
    estimate = work.tokens * (kept + widest) + max((u.fixed_bytes for u in work.units), default=0.0)
    sizes["activations"] = estimate if work.activation_bytes is None else work.activation_bytes
    return sizes


def buffers(work: Workload, traffic: Traffic) -> dict[str, float]:
    """Bytes of gathered units, of the ring of whole gradients, and of what collectives hold while under way."""
    gathered: Counter[int] = Counter()
    staged: set[int] = set()
    if traffic.sharded(traffic.placement.params):
        row = [[numel for numel, _, _ in traffic.flats(unit)] for unit in work.row]
        always = Counter(numel for numel, _, _ in traffic.flats(work.root)) if work.root else Counter()
        for i in range(len(row)):
            window = Counter(numel for flats in row[i : i + 1 + work.prefetch_units] for numel in flats)
            gathered |= window + always
    reduces = traffic.sharded(traffic.placement.grads)
    largest = 0
    scratch: dict[float, int] = {}
    for unit in work.units:
        for numel, trained, packs in traffic.flats(unit):
            if not trained:
                continue
            if reduces:
                staged.add(numel)
            largest = max(largest, numel)
            for size, count in traffic.scratch(numel).items() if packs else ():
                scratch[size] = max(scratch.get(size, 0), count)
    whole = sum(numel * count for numel, count in gathered.items())
    packed = sum(size * count for size, count in scratch.items())
    under_way = packed + (work.reduce_bytes * largest if reduces and traffic.gloo else 0.0)
    return {
        "gathered": float(work.compute_bytes * whole),
        "staging": float(2 * work.reduce_bytes * sum(staged)),
        "under way": under_way,
    }
