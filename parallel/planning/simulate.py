"""Plays a step of the engine against the clock: every gather, reduction and refresh, with contention on the links.

Ranks are symmetric: all of one kind do the same at the same time, so one of them is simulated and a link that others
use at once gives it its share (`Link.rate`). Worlds of any size cost the same. A rank is one thread (the host on gloo,
the compute stream on CUDA) that computes, starts flows and waits for them; flows on one level share its link evenly.

[Note: who moves a chain on] On CUDA a chain runs on a side stream by itself, one after the other in its lane. On gloo
only its first collective starts at the launch; the host issues the next one where `parallel.collectives` does: when
the result is asked for, or when another reduction is launched. `_Program` follows that code line by line.

Steps are periodic, so the second of two is what is measured. Micro-batches between the first two and the last are all
alike, so at most three are played and the rest extrapolated.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from typing import Any

from parallel.planning.cost import Clock, Plan, traffic_of, update_s
from parallel.planning.machine import Machine
from parallel.planning.traffic import Chain, Move, Traffic, UnitTraffic
from parallel.planning.workload import UnitCost, Workload

GLOO_THREADS = 2
"""Collectives of one group that gloo runs at once (one network device)."""
_PLAYED = 3


@dataclass(frozen=True)
class Simulation:
    step_s: float
    compute_s: float
    """Seconds of the step that the rank computes or passes over memory."""
    levels_s: dict[str, float]
    """Seconds of the step that something crosses each level."""
    waits: dict[str, float]
    """Seconds that the rank waits, by ``phase over level``, the longest first."""

    @property
    def bottleneck(self) -> str:
        """What to make faster first."""
        cause, seconds = next(iter(self.waits.items()), ("", 0.0))
        if seconds < 0.1 * self.step_s:
            return "compute"
        return f"{cause} ({seconds / self.step_s:.0%} of the step is spent waiting for it)"


def simulate(work: Workload, plan: Plan, machine: Machine, system: type[Traffic] = Traffic) -> Simulation:
    """A step of `work` under `plan` on `machine`, in the steady state. system: who sends what, if not this engine."""
    count = work.micro_batches
    if count <= _PLAYED:
        return _play(work, plan, machine, system)
    more, less = (_play(replace(work, micro_batches=n), plan, machine, system) for n in (_PLAYED, _PLAYED - 1))

    def extend(a: float, b: float) -> float:
        return a + (count - _PLAYED) * (a - b)

    waits = {cause: extend(s, less.waits.get(cause, 0.0)) for cause, s in more.waits.items()}
    return Simulation(
        step_s=extend(more.step_s, less.step_s),
        compute_s=extend(more.compute_s, less.compute_s),
        levels_s={name: extend(s, less.levels_s[name]) for name, s in more.levels_s.items()},
        waits=dict(sorted(waits.items(), key=lambda item: -item[1])),
    )


def _play(work: Workload, plan: Plan, machine: Machine, system: type[Traffic]) -> Simulation:
    program = _Program(work, plan, machine, system)
    for _ in range(2):
        program.step()
    run = _Run(program)
    (start, before), (end, after) = run.marks
    spent = {key: after[key] - before.get(key, 0.0) for key in after}
    waits = {key[1]: s for key, s in spent.items() if key[0] == "wait" and s > 0}
    return Simulation(
        step_s=end - start,
        compute_s=spent.get(("compute", ""), 0.0),
        levels_s={name: spent.get(("link", name), 0.0) for name in plan.mesh.names},
        waits=dict(sorted(waits.items(), key=lambda item: -item[1])),
    )


@dataclass(eq=False)
class _Flow:
    """A collective under way: stages of (level or -1 for none, seconds alone)."""

    stages: list[tuple[int, float]]
    group: Any
    cause: str
    skew: float = 0.0
    """How much later than this rank its neighbours are through it, as a part of its seconds …"""
    late: float = 0.0
    """… and in seconds."""
    meets: bool = False
    """Whether it needs the neighbours, who may be late."""
    lane_before: "_Flow | None" = None
    issued: bool = False
    done: bool = False
    left: float = 0.0
    stage: int = -1

    @property
    def level(self) -> int:
        return self.stages[self.stage][0]


@dataclass(eq=False)
class _Chain:
    flows: list[_Flow]
    after: list[float]
    """Seconds of the host behind each flow (gloo)."""
    before: list[float]
    issued: int = 0
    done: bool = False
    size: int = 0


@dataclass
class _Program:
    """The engine's step as operations of one thread: ("compute", s), ("issue", flow), ("wait", flow), ("mark",)."""

    work: Workload
    plan: Plan
    machine: Machine
    system: type[Traffic]
    ops: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.traffic = traffic_of(self.work, self.plan, self.machine, self.system)
        self.clock = Clock(self.machine, self.plan.mesh, self.work)
        self.gloo = self.machine.backend == "gloo"
        self.units: list[tuple[UnitCost, UnitTraffic]] = [(u, self.traffic.unit(u)) for u in self.work.row]
        self.root = (self.work.root, self.traffic.unit(self.work.root)) if self.work.root else None
        self.all = ([self.root] if self.root else []) + self.units
        self.offset = 1 if self.root else 0
        self.gathering: dict[int, list[_Chain] | None] = {}  # by index in `all`: on its way (a list) or there (None)
        self.refreshing: dict[int, list[_Chain]] = {}
        self.queue: deque[_Chain] = deque()
        self.readers: dict[int, deque[_Chain]] = defaultdict(deque)
        self.tails: dict[str, _Flow] = {}
        self.is_sharded = self.traffic.sharded(self.plan.placement.params)
        self.is_forward = True
        self.scatters = self.traffic.sharded(self.plan.placement.grads)

    # ------------------------------------------------------------------------------------------------ the engine

    def step(self) -> None:
        count = self.work.micro_batches
        for i in range(count):
            self._forward()
            self._backward(first=i == 0, last=i == count - 1)
        while self.queue:
            self._finish(self.queue.popleft(), "reduce")
        for move in self.traffic.control():
            if self.gloo or move.sent is not None and move.edge <= 64:
                self._finish(self._launch((move,), "control", "control"), "control")
        self._compute(update_s(self.work, self.traffic, self.clock) + self.machine.step_s)
        for i, (_, traffic) in enumerate(self.all):
            if traffic.refresh:
                self.refreshing[i] = [self._launch(chain, "refresh", "gathers") for chain in traffic.refresh]
        self.ops.append(("mark", None))

    def _forward(self) -> None:
        self.is_forward = True
        if self.root:
            self._use(0)
            self._prefetch(range(self.offset, self.offset + self.work.prefetch_units))
        for i in range(self.offset, len(self.all)):
            self._use(i)
            self._prefetch(range(i + 1, i + 1 + self.work.prefetch_units))
            self._compute(self.clock.forward(self.all[i][0]))
            self._exchange(i, 1)
            if i < len(self.all) - 1:
                self._release(i)

    def _backward(self, *, first: bool, last: bool) -> None:
        self.is_forward = False
        for i in range(len(self.all) - 1, self.offset - 1, -1):
            unit, _ = self.all[i]
            if unit.gathers_backward or unit.recompute:
                self._use(i)
            wanted = range(i - 1, max(self.offset, i - self.work.prefetch_units) - 1, -1)
            self._prefetch([j for j in wanted if self.all[j][0].gathers_backward])
            self._compute(self.clock.backward(unit))
            self._exchange(i, unit.passes_backward)
            self._release(i)
            self._reduce(i, first=first, last=last)
        if self.root:
            self._release(0)
            self._reduce(0, first=first, last=last)

    def _prefetch(self, indices: Any) -> None:
        for i in indices:
            if i < len(self.all) and self.is_sharded:
                self._start_gather(i)

    def _use(self, i: int) -> None:
        self._start_gather(i)
        for chain in self.gathering.get(i) or []:
            self._finish(chain, "gather")
        if self.is_sharded:
            self.gathering[i] = None

    def _start_gather(self, i: int) -> None:
        for chain in self.refreshing.pop(i, []):
            self._finish(chain, "refresh")
        if self.is_sharded and i not in self.gathering:
            traffic = self.all[i][1]
            alike = self.is_forward or traffic.gather_backward is None
            chains = traffic.gather if alike else traffic.gather_backward or ()
            self.gathering[i] = [self._launch(chain, "gather", "gathers") for chain in chains]

    def _release(self, i: int) -> None:
        for chain in self.gathering.pop(i, None) or []:
            self._finish(chain, "gather")

    def _reduce(self, i: int, *, first: bool, last: bool) -> None:
        unit, traffic = self.all[i]
        if not unit.trained:
            return
        chains = traffic.last if last else traffic.reduce
        bytes_an_element = self.work.compute_bytes + (self.work.reduce_bytes if self.scatters or first else 8)
        size = traffic.elements
        if self.scatters and len(self.readers[size]) >= 2:
            self._finish(self.readers[size].popleft(), "reduce")
        self._compute(self.clock.memory(size * bytes_an_element))
        for chain in chains:
            for other in self.queue:
                if not other.done:
                    self._advance(other, "reduce")
            while self.queue and ((self.gloo and self.queue[0].done) or len(self.queue) >= 2):
                self._finish(self.queue.popleft(), "reduce")
            launched = self._launch(chain, "reduce", "reductions")
            self.queue.append(launched)
            if self.scatters:
                self.readers[size].append(launched)

    def _exchange(self, i: int, passes: int) -> None:
        """What ranks that share sequences send is waited for where it is sent: one flow stands for all of a pass."""
        for chain in passes * self.all[i][1].sequence:
            self._compute(self.clock.host(chain))
            flow = self._flow(chain[0], "sequence", len(chain))
            self.ops += [("issue", flow), ("wait", flow)]

    # ------------------------------------------------------------------------------------------------ chains

    def _flow(self, move: Move, phase: str, count: int = 1) -> _Flow:
        """`count` such collectives, one after the other."""
        level, seconds = self.clock.transfer(move)
        stages = [(-1, count * self.clock.wait(move)), (level, count * seconds)]
        group = "world" if move.members == self.plan.mesh.world else (move.level, move.members)
        return _Flow(
            stages, group if self.gloo else None, f"{phase} over {self.plan.mesh.names[level]}",
            skew=self.clock.skew(move), meets=self.clock.meets(move),
        )  # fmt: skip

    def _launch(self, moves: Chain, phase: str, lane: str) -> _Chain:
        flows, after, before = [], [], []
        for move in moves:
            prepare, use = self.clock.prepare(move), self.clock.use(move)
            flow = self._flow(move, phase)
            if not self.gloo:
                flow.stages = [(-1, prepare), *flow.stages, (-1, use)]
                flow.lane_before = self.tails.get(lane)
                self.tails[lane] = flow
            flows.append(flow)
            after.append(use)
            before.append(prepare)
        chain = _Chain(flows, after, before)
        if self.gloo:
            self._compute(before[0] if before else 0.0)
            self._issue(chain)
        else:
            self.ops += [("issue", flow) for flow in flows]
            chain.done = True  # as `Chain.done`: what the host has to do for it
        if not self.work.overlap:
            self._finish(chain, phase)
        return chain

    def _issue(self, chain: _Chain) -> None:
        if chain.issued < len(chain.flows):
            self._compute(self.machine.issue_s)
            self.ops.append(("issue", chain.flows[chain.issued]))
            chain.issued += 1
        else:
            chain.done = True

    def _advance(self, chain: _Chain, phase: str) -> None:
        if chain.issued:
            self.ops.append(("wait", chain.flows[chain.issued - 1]))
            self._compute(chain.after[chain.issued - 1])
        if chain.issued < len(chain.flows):
            self._compute(chain.before[chain.issued])
        self._issue(chain)

    def _finish(self, chain: _Chain, phase: str) -> None:
        while not chain.done:
            self._advance(chain, phase)
        if not self.gloo and chain.flows:
            self.ops.append(("wait", chain.flows[-1]))

    def _compute(self, seconds: float) -> None:
        if seconds > 0:
            self.ops.append(("compute", seconds))


def fair(rates: list[float], wanted: list[float]) -> list[float]:
    """`rates`, each slowed as far as it gets less of the cores than the part that it wants, see [Note: shared cores]:
    the cores are shared evenly, and what some do not want is the others'."""
    left, waiting = 1.0, len(wanted)
    slowed = list(rates)
    for i in sorted(range(len(wanted)), key=wanted.__getitem__):
        got = min(wanted[i], left / waiting)
        if wanted[i] > 0:
            slowed[i] *= got / wanted[i]
        left, waiting = left - got, waiting - 1
    return slowed


class _Run:
    """Plays the operations. `marks` are (time, seconds spent so far by cause), one a step."""

    def __init__(self, program: _Program) -> None:
        self._ops, self._names = program.ops, program.plan.mesh.names
        self._core, self._burst_s = program.clock.core, program.clock.burst_s
        self._saved = list(self._burst_s)
        """By level, the seconds of sending that silence has saved up."""
        self._now = 0.0
        self._busy_until = [0.0] * len(self._names)
        """By level, when the late neighbours leave it."""
        self._late = 0.0
        """Seconds that the neighbours are behind this rank, see [Note: late neighbours]."""
        self._active: list[_Flow] = []
        self._waiting: list[_Flow] = []
        self._busy_groups: dict[Any, int] = defaultdict(int)
        self.spent: dict[tuple[str, str], float] = defaultdict(float)
        self.marks: list[tuple[float, dict[tuple[str, str], float]]] = []
        self._play()

    def _play(self) -> None:
        now, at, compute_left = 0.0, 0, 0.0
        blocked: _Flow | None = None
        while True:
            while not compute_left and at < len(self._ops):
                kind, value = self._ops[at]
                blocked = None
                if kind == "compute":
                    compute_left = value
                elif kind == "issue":
                    value.issued = True
                    if value.meets and self._late:
                        value.stages.insert(0, (-1, self._late))
                        self._late = 0.0
                    self._waiting.append(value)
                    self._start()
                elif kind == "wait":
                    if not value.done:
                        blocked = value
                        break
                    self._late = max(self._late, value.late)
                else:
                    self.marks.append((now, dict(self.spent)))
                at += 1
            if not compute_left and blocked is None:
                return
            now += self._until_next(compute_left, blocked)
            compute_left = self._compute_left

    def _until_next(self, compute_left: float, blocked: _Flow | None) -> float:
        """Move everything on to the next event; the seconds until it."""
        users: dict[int, int] = defaultdict(int)
        for flow in self._active:
            users[flow.level] += 1
        rates = [1.0 if flow.level < 0 else 1 / users[flow.level] for flow in self._active]
        wanted = [
            0.0 if flow.level < 0 else self._core[flow.level] * rate
            for flow, rate in zip(self._active, rates, strict=True)
        ]
        *rates, compute_rate = fair([*rates, 1.0], [*wanted, 1.0 if compute_left else 0.0])
        events = [flow.left / rate for flow, rate in zip(self._active, rates, strict=True)]
        if compute_left:
            events.append(compute_left / compute_rate)
        step = min(events)
        for level, name in enumerate(self._names):
            if users[level]:
                self.spent["link", name] += step
            else:
                silent = max(0.0, step - max(0.0, self._busy_until[level] - self._now))
                self._saved[level] = min(self._burst_s[level], self._saved[level] + silent)
        self._now += step
        if compute_left:
            self.spent["compute", ""] += step
            compute_left -= step * compute_rate
        elif blocked is not None:
            self.spent["wait", self._cause(blocked)] += step
        self._compute_left = compute_left if compute_left > 1e-15 else 0.0
        ended = [flow for flow, rate in zip(self._active, rates, strict=True) if flow.left - step * rate <= 1e-15]
        for flow, rate in zip(self._active, rates, strict=True):
            flow.left -= step * rate
        for flow in ended:
            self._next_stage(flow)
        if ended:
            self._start()
        return step

    def _cause(self, blocked: _Flow) -> str:
        """What holds the thread: of a lane, the flow that is under way before the one that is waited for."""
        while blocked.lane_before is not None and not blocked.lane_before.done:
            blocked = blocked.lane_before
        return blocked.cause

    def _start(self) -> None:
        """Start the flows that were issued, in order, where lane and group let them."""
        left = []
        for flow in self._waiting:
            behind = flow.lane_before is not None and not flow.lane_before.done
            if behind or (flow.group is not None and self._busy_groups[flow.group] >= GLOO_THREADS):
                left.append(flow)
                continue
            if flow.group is not None:
                self._busy_groups[flow.group] += 1
            self._active.append(flow)
            self._next_stage(flow)
        self._waiting = left
        if any(flow.done for flow in self._active):
            self._active = [flow for flow in self._active if not flow.done]

    def _next_stage(self, flow: _Flow) -> None:
        flow.stage += 1
        while flow.stage < len(flow.stages) and flow.stages[flow.stage][1] <= 0:
            flow.stage += 1
        if flow.stage < len(flow.stages):
            level, flow.left = flow.stages[flow.stage]
            if level >= 0:
                at_once = min(self._saved[level], flow.left)
                self._saved[level] -= at_once
                flow.late = flow.skew * max(0.0, flow.left - self._burst_s[level])
                flow.left -= at_once
            return
        flow.done = True
        if flow.late:
            self._busy_until[flow.stages[-1][0]] = self._now + flow.late
        if flow.group is not None:
            self._busy_groups[flow.group] -= 1
        if flow in self._active:
            self._active.remove(flow)
