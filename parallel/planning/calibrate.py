"""A machine's rates, corrected by steps that were measured on it.

`benchmarks/links.py` measures collectives and compute apart from each other. In a step they meet: ranks arrive at a
collective at different times, caches are cold, fresh memory is paged in. `calibrate` finds the factors on a machine's
rates that make the simulator reproduce some measured steps; what it is worth shows on steps that it has not seen
(`benchmarks/cost_model.py`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from parallel.planning.cost import Plan
from parallel.planning.machine import Fit, Link, Machine, Packing
from parallel.planning.simulate import simulate
from parallel.planning.workload import Workload

_NOISE = 0.03
"""Errors below this count by their square, larger ones by their size: a disturbed measurement does not decide."""
_FLOORS = {"unit_s": 5e-5, "step_s": 5e-4}
"""Seconds from which a factor is searched where less was measured: nothing comes of a factor on 0."""


@dataclass(frozen=True)
class Run:
    """A measured step."""

    work: Workload
    plan: Plan
    step_s: float


def errors(machine: Machine, runs: Sequence[Run]) -> list[float]:
    """log(simulated / measured) of each run: 0.1 is about 10%."""
    return [math.log(simulate(run.work, run.plan, machine).step_s / run.step_s) for run in runs]


@dataclass(frozen=True)
class _Off:
    """The errors of all runs with the factors ``exp(logs)``; plain data, so that another process can do it."""

    machine: Machine
    runs: Sequence[Run]
    names: list[str]

    def scaled(self, logs: Sequence[float]) -> Machine:
        return scaled(self.machine, dict(zip(self.names, logs, strict=True)))

    def __call__(self, logs: Sequence[float]) -> list[float]:
        return errors(self.scaled(logs), self.runs)


def calibrate(
    machine: Machine,
    runs: Sequence[Run],
    *,
    rounds: int = 12,
    within: float = 8.0,
    each: Callable[..., Iterable[list[float]]] = map,
) -> Machine:
    """`machine` with the rates that fit the runs best: each by a factor of 1/within to `within`.

    Least absolute errors of the logarithms, by damped Gauss-Newton steps of reweighted least squares. Deterministic.
    each: applies a function to a list, in order, perhaps in other processes. ValueError without runs.
    """
    if not runs:
        raise ValueError("calibrate needs at least one measured step")
    machine = _floored(machine, runs)
    names = _names(machine, runs)
    limit, nudge = math.log(within), 0.07
    errors_with = _Off(machine, runs, names)

    def off(tried: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        found = each(errors_with, [logs.tolist() for logs in tried])
        return [torch.tensor(some, dtype=torch.float64) for some in found]

    logs = torch.zeros(len(names), dtype=torch.float64)
    (now,) = off([logs])
    rates = [i for i, name in enumerate(names) if not name.endswith(".skew")]
    for free in dict.fromkeys((tuple(rates), tuple(range(len(names))))):  # late neighbours for what rates leave over
        axes, damping = torch.eye(len(names), dtype=torch.float64)[list(free)], 0.03
        for _ in range(rounds):
            slopes = torch.stack([(found - now) / nudge for found in off(logs + nudge * axis for axis in axes)], dim=1)
            weighted = slopes.T / now.abs().clamp(min=_NOISE)
            square, down = weighted @ slopes, weighted @ now
            dampings = [damping * 5**i for i in range(4)]
            ridges = [damping * torch.diag(square.diag() + 1e-3) for damping in dampings]
            steps = [torch.linalg.solve(square + ridge, down).clamp(-0.7, 0.7) @ axes for ridge in ridges]
            tried = [(logs - step).clamp(-limit, limit) for step in steps]
            better = [
                (there, found, damping / 3)
                for there, found, damping in zip(tried, off(tried), dampings, strict=True)
                if found.abs().sum() < now.abs().sum()
            ]
            if not better:
                break
            logs, now, damping = better[0]
    return errors_with.scaled(logs.tolist())


def scaled(machine: Machine, logs: dict[str, float]) -> Machine:
    """`machine` with each rate times ``exp`` of its entry: ``compute``, ``<link>.bandwidth``, ``<link>.latency`` …

    ``quantize.rate``, ``dequantize.rate`` and ``packing.call_s`` are those of either format.
    ``<link>.skew`` is added, at the least to 0: most machines have none.
    """
    factors = {name: math.exp(log) for name, log in logs.items()}
    own = {name: getattr(machine, name) * factor for name, factor in factors.items() if hasattr(machine, name)}
    links = [_scaled_link(link, factors) for link in machine.links]
    links = [replace(link, skew=max(0.0, link.skew + logs.get(f"{link.name}.skew", 0.0))) for link in links]
    call = factors.get("packing.call_s", 1.0)
    packing = {
        name: Packing(rate=p.rate * factors.get(f"{name.partition('_')[0]}.rate", 1.0), call_s=p.call_s * call)
        for name, p in machine.packing.items()
    }
    return replace(machine, links=tuple(links), packing=packing, **own)


def _scaled_link(link: Link, factors: dict[str, float]) -> Link:
    bandwidth, latency, core = (factors.get(f"{link.name}.{what}", 1.0) for what in ("bandwidth", "latency", "core"))
    fits = {
        kind: Fit(bandwidth=f.bandwidth * bandwidth, latency=f.latency * latency, start_s=f.start_s * latency)
        for kind, f in link.fits.items()
    }
    alone = None if link.rank_bandwidth is None else link.rank_bandwidth * bandwidth
    return replace(
        link, bandwidth=link.bandwidth * bandwidth, latency=link.latency * latency, rank_bandwidth=alone, fits=fits,
        core=min(1.0, link.core * core),
    )  # fmt: skip


def _floored(machine: Machine, runs: Sequence[Run]) -> Machine:
    floors = {name: max(floor, getattr(machine, name)) for name, floor in _FLOORS.items()}
    links = machine.links
    if machine.backend == "gloo":
        floors["issue_s"] = max(5e-5, machine.issue_s)
        links = tuple(replace(link, core=max(0.1, link.core), latency=max(1e-5, link.latency)) for link in links)
    return replace(machine, links=links, **floors)


def _names(machine: Machine, runs: Sequence[Run]) -> list[str]:
    """What is corrected."""
    names = ["compute", "memory_rate", "unit_s", "step_s"]
    if _quantizes(machine, runs):
        names += ["quantize.rate", "dequantize.rate", "packing.call_s"]
    each = ("bandwidth", "latency", "core") if machine.backend == "gloo" else ("bandwidth", "latency")
    names += [f"{link.name}.{what}" for link in machine.links for what in each]
    if machine.backend == "gloo":
        names.append("issue_s")
        names += [f"{link.name}.skew" for link in machine.links if link.shared]
    return names


def _quantizes(machine: Machine, runs: Sequence[Run]) -> bool:
    return bool(machine.packing) and any(run.plan.transport.quantizes for run in runs)
