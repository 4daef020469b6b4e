"""Rates corrected by measured steps: what they are worth on steps that were not among them."""

from dataclasses import replace

import pytest

from parallel import Mesh, Placement
from parallel.planning.calibrate import Run, calibrate, errors
from parallel.planning.cost import Plan
from parallel.planning.machine import Link, Machine
from parallel.planning.simulate import simulate
from parallel.planning.workload import UnitCost, Workload

TRUTH = Machine(
    name="m", compute=1e10, memory_rate=5e9, backend="gloo", step_s=2e-3, unit_s=1e-4,
    links=(
        Link(name="node", bandwidth=12e6, latency=1e-3, shared=True, core=0.2),
        Link(name="rank", size=2, bandwidth=3e8, latency=5e-4, core=0.9),
    ),
)  # fmt: skip


def runs(micro_batches: tuple[int, ...], truth: Machine = TRUTH) -> list[Run]:
    """Steps as `truth` takes them."""
    unit = UnitCost(name="u", count=4, matrices=1 << 17, forward_flops=2.0 * (1 << 17), backward_flops=4.0 * (1 << 17))
    mesh, found = Mesh.of({"node": 2, "rank": 2}, rank=0, world=4), []
    for count in micro_batches:
        for triple in ((0, 0, 0), (0, 2, 2), (1, 1, 2), (2, 2, 2)):
            for tokens in (16, 256):
                work = Workload(units=(unit,), tokens=tokens, micro_batches=count, compute_bytes=4)
                plan = Plan(mesh, Placement(*triple))
                found.append(Run(work, plan, simulate(work, plan, truth).step_s))
    return found


def test_wrong_rates_are_corrected_by_measured_steps() -> None:
    node, rank = TRUTH.links
    wrong = replace(
        TRUTH, compute=2e10, links=(replace(node, bandwidth=2e7, latency=3e-3), replace(rank, bandwidth=1.5e8))
    )
    unseen = runs((3,))
    assert max(map(abs, errors(wrong, unseen))) > 0.3
    fitted = calibrate(wrong, runs((1, 2)), rounds=3)
    assert max(map(abs, errors(fitted, unseen))) < 0.03


def test_calibrating_needs_a_measured_step() -> None:
    with pytest.raises(ValueError, match="at least one measured step"):
        calibrate(TRUTH, [])
