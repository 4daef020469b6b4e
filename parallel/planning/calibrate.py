"""A machine's rates, corrected by steps that were measured on it.

`benchmarks/links.py` measures collectives and compute apart from each other. In a step they meet: ranks arrive at a
collective at different times, caches are cold, cores are shared. `calibrate` finds the factors on a machine's rates
that make the simulator reproduce some measured steps; what it is worth shows on steps that it has not seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel.planning.cost import Plan
from parallel.planning.machine import Fit, Link, Machine
from parallel.planning.simulate import simulate
from parallel.planning.workload import Workload


@dataclass(frozen=True)
class Run:
    """A measured step."""

    work: Workload
    plan: Plan
    step_s: float


def error(machine: Machine, runs: Sequence[Run]) -> float:
    """Root mean square of log(simulated / measured): 0.1 is about 10%."""
    logs = [math.log(simulate(run.work, run.plan, machine).step_s / run.step_s) for run in runs]
    return math.sqrt(sum(log * log for log in logs) / len(logs))


def calibrate(machine: Machine, runs: Sequence[Run], *, rounds: int = 4, within: float = 4.0) -> Machine:
    """`machine` with the rates that fit `runs` best: a factor of 1/within to `within` on each, found one at a time.

    Deterministic. ValueError without runs.
    """
    if not runs:
        raise ValueError("calibrate needs at least one measured step")
    names = ["compute", "memory_rate", "step_s"]
    names += [f"{link.name}.{what}" for link in machine.links for what in ("bandwidth", "latency")]
    if machine.quantize_rate is not None and any(run.plan.transport.quantizes for run in runs):
        names.append("quantize_rate")
    logs = dict.fromkeys(names, 0.0)
    best, stride = error(machine, runs), math.log(1.5)
    for _ in range(rounds):
        for name in names:
            for move in (stride, -stride):
                tried = logs | {name: max(-math.log(within), min(math.log(within), logs[name] + move))}
                if (found := error(scaled(machine, tried), runs)) < best:
                    best, logs = found, tried
                    break
        stride /= 1.7
    return scaled(machine, logs)


def scaled(machine: Machine, logs: dict[str, float]) -> Machine:
    """`machine` with each rate (and each latency) times ``exp`` of its entry: ``compute``, ``<link>.bandwidth`` …"""
    own = {name: getattr(machine, name) * math.exp(log) for name, log in logs.items() if "." not in name}
    links = tuple(
        _scaled_link(link, *(math.exp(logs.get(f"{link.name}.{what}", 0.0)) for what in ("bandwidth", "latency")))
        for link in machine.links
    )
    return replace(machine, links=links, **own)


def _scaled_link(link: Link, bandwidth: float, latency: float) -> Link:
    fits = {
        kind: Fit(bandwidth=f.bandwidth * bandwidth, latency=f.latency * latency, start_s=f.start_s * latency)
        for kind, f in link.fits.items()
    }
    alone = None if link.rank_bandwidth is None else link.rank_bandwidth * bandwidth
    return replace(
        link, bandwidth=link.bandwidth * bandwidth, latency=link.latency * latency, rank_bandwidth=alone, fits=fits
    )
