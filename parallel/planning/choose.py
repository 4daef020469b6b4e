"""``parallel=auto``: the placement, and the quantization if it is allowed, that make a step the shortest in the memory
there is.

Every P <= G <= O of the mesh is a candidate (those that a level of one member makes equal count once). The closed form
ranks them, the simulator decides between the best. Of two within 1% the one that holds less memory wins. Exactness is
the default: what quantizes is a candidate only where `quantize` says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

from parallel.mesh import Mesh
from parallel.options import ParallelOptions
from parallel.placement import Placement
from parallel.planning.cost import Estimate, Plan, estimate
from parallel.planning.machine import Machine
from parallel.planning.simulate import Simulation, simulate
from parallel.planning.workload import Workload
from parallel.transport import Transport

PRESETS = ("ddp", "zero1", "zero2", "zero3", "hsdp", "hfsdp", "topo")
DEFAULTS = ParallelOptions()
MODEL_ERROR = 0.15
"""How far off a simulated step may be, nine times out of ten (docs/cost-model.md)."""
MEASURED = 4
"""Of the candidates that the model cannot tell apart, how many are worth measuring."""
SIMULATED, SIMULATED_UNITS = 6, 480
"""Candidates that the simulator times, the best in closed form: at least so many, and more of a model of few units, up
to so many units in all. A few seconds."""


@dataclass(frozen=True)
class Candidate:
    plan: Plan
    quantize: str
    """The value of ``parallel.quantize`` that gives its formats."""
    cost: Estimate
    simulation: Simulation | None = None

    @property
    def step_s(self) -> float:
        return self.simulation.step_s if self.simulation else self.cost.step_s

    @property
    def name(self) -> str:
        """As one of ``parallel.candidates``."""
        place = self.plan.placement
        named = preset_of(place, self.plan.mesh.num_levels) or f"free:{place.params}:{place.grads}:{place.optim}"
        return named + (f"+{self.quantize}" if self.quantize != "none" else "")

    @property
    def overrides(self) -> str:
        """What to type for it."""
        place = self.plan.placement
        named = preset_of(place, self.plan.mesh.num_levels)
        shown = f"parallel={named}"
        if named is None:
            shown = (
                f"parallel=free parallel.params={place.params} parallel.grads={place.grads} "
                f"parallel.optim={place.optim}"
            )
        return shown + (f" parallel.quantize={self.quantize}" if self.quantize != "none" else "")


@dataclass(frozen=True)
class Choice:
    best: Candidate
    runner_up: Candidate | None
    why: str
    fitting: int
    """How many candidates fit, of `total`."""
    total: int
    contenders: tuple[Candidate, ...] = ()
    """`best`, and then whatever the model cannot tell from it: within `MODEL_ERROR` of it, the fastest first."""


def choose(
    work: Workload,
    mesh: Mesh,
    machine: Machine,
    *,
    cap_bytes: float,
    quantize: Sequence[str] = ("none",),
    options: ParallelOptions = DEFAULTS,
) -> Choice:
    """The fastest candidate whose memory a rank is at most `cap_bytes`, the second one, and a sentence that says why.

    quantize: which values of ``parallel.quantize`` may be chosen; `options` say how that is done (blocks, error
    feedback). ValueError where nothing fits: how many bytes are missing, and what would help.
    """
    everyone = [
        Candidate(plan, name, estimate(work, plan, machine))
        for name in quantize
        for plan in _plans(mesh, options.candidate(f"ddp+{name}"))
    ]  # fmt: skip
    fitting = [candidate for candidate in everyone if candidate.cost.memory_bytes <= cap_bytes]
    if not fitting:
        raise ValueError(_nothing_fits(work, everyone, cap_bytes, machine))
    count = max(SIMULATED, SIMULATED_UNITS // max(1, len(work.all)))
    shortlist = sorted(fitting, key=lambda candidate: candidate.cost.step_s)[:count]
    played = [Candidate(c.plan, c.quantize, c.cost, simulate(work, c.plan, machine)) for c in shortlist]
    played.sort(key=lambda candidate: candidate.step_s)
    close = [candidate for candidate in played if candidate.step_s <= 1.01 * played[0].step_s]
    best = min(close, key=lambda candidate: candidate.cost.memory_bytes)
    others = [candidate for candidate in played if candidate is not best]
    runner_up = others[0] if others else None
    near = [candidate for candidate in others if candidate.step_s <= (1 + MODEL_ERROR) * best.step_s]
    return Choice(best, runner_up, _why(best, runner_up), len(fitting), len(everyone), (best, *near))


def preset_of(placement: Placement, num_levels: int) -> str | None:
    """The first preset that is this placement, or None."""
    for name in PRESETS:
        if Placement.of(ParallelOptions(placement=name), num_levels) == placement:
            return name
    return None


def _plans(mesh: Mesh, options: ParallelOptions) -> list[Plan]:
    plans: dict[tuple[int, ...], Plan] = {}
    triples = [Placement(*triple) for triple in combinations_with_replacement(range(mesh.num_levels + 1), 3)]
    triples.sort(key=lambda placement: preset_of(placement, mesh.num_levels) is None)  # named ones first
    for placement in triples:
        ranks = tuple(_ranks(mesh, n) for n in (placement.params, placement.grads, placement.optim))
        plans.setdefault(ranks, Plan(mesh, placement, Transport.of(options, mesh, placement)))
    return list(plans.values())


def _ranks(mesh: Mesh, num_levels: int) -> int:
    return math.prod(mesh.sizes[mesh.num_levels - num_levels :])


def _why(best: Candidate, other: Candidate | None) -> str:
    def limit(candidate: Candidate) -> str:
        return candidate.simulation.bottleneck if candidate.simulation else "compute"

    said = f"{best.overrides}: {best.step_s:.3g} s a step, limited by {limit(best)}"
    if other is None:
        return said + "; nothing else fits"
    ratio = other.step_s / best.step_s
    if ratio < 1.01:
        more = (other.cost.memory_bytes - best.cost.memory_bytes) / 2**30
        return said + f"; {other.overrides} is as fast (within 1%) and holds {more:.3g} GiB more a rank"
    return said + f"; {other.overrides} takes {ratio:.2f} times as long, limited by {limit(other)}"


def _nothing_fits(work: Workload, everyone: Sequence[Candidate], cap_bytes: float, machine: Machine) -> str:
    least = min(everyone, key=lambda candidate: candidate.cost.memory_bytes)
    needed = least.cost.memory_bytes
    kinds = sorted(least.cost.memory.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{kind} {size / 2**30:.1f}" for kind, size in kinds if size >= 0.01 * needed)
    help_ = ["more launch.workers"]
    if any(unit.activation_bytes and not unit.recompute for unit in work.units):
        help_.insert(0, "offload=recompute")
    help_.insert(1, "a smaller train.micro_batch_size")
    if work.prefetch_units and _ranks(least.plan.mesh, least.plan.placement.params) > 1:
        help_.append("parallel.prefetch_units=0")
    return (
        f"nothing fits: of {len(everyone)} placements the smallest ({least.overrides}) needs {needed / 2**30:.1f} GiB "
        f"of {machine.tier} memory a rank ({shown}), which is {(needed - cap_bytes) / 2**30:.1f} GiB more than the "
        f"{cap_bytes / 2**30:.1f} GiB there are; what helps: {', '.join(help_)}, or a higher parallel.memory_gib"
    )
