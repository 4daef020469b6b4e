"""``parallel=auto``: the fastest that fits, and why."""

from dataclasses import replace

import pytest

from parallel import Mesh
from parallel.options import ParallelOptions
from parallel.placement import Placement
from parallel.planning.choose import choose, preset_of
from parallel.planning.cost import estimate
from parallel.planning.machine import PRESETS, Machine
from parallel.planning.simulate import simulate
from parallel.planning.workload import UnitCost, Workload

UNIT = UnitCost(name="u", count=24, matrices=100 << 20, vectors=8192, forward_flops=2e8, backward_flops=4e8,
                activation_bytes=1e5, input_bytes=1e4)  # fmt: skip
WORK = Workload(units=(UNIT,), tokens=4096, micro_batches=2)


def chosen(machine: Machine, world: int, gib: float, work: Workload = WORK, quantize: tuple[str, ...] = ("none",)):
    return choose(work, Mesh(machine.levels(world)), machine, cap_bytes=gib * 2**30, quantize=quantize)


def test_the_best_of_all_is_found() -> None:
    """Simulating every candidate finds none that is more than 5% faster."""
    for name, world in (("ethernet-25g", 64), ("frontier", 64), ("dgx-h100", 64)):
        machine = PRESETS[name]
        mesh = Mesh(machine.levels(world))
        everyone = []
        for p in range(mesh.num_levels + 1):
            for g in range(p, mesh.num_levels + 1):
                for o in range(g, mesh.num_levels + 1):
                    plan = replace(chosen_plan := _plan(mesh, (p, g, o)))
                    if estimate(WORK, chosen_plan, machine).memory_bytes <= 40 * 2**30:
                        everyone.append(simulate(WORK, plan, machine).step_s)
        assert chosen(machine, world, 40).best.step_s <= 1.05 * min(everyone)


def _plan(mesh: Mesh, triple: tuple[int, int, int]):
    from parallel.planning.cost import Plan

    return Plan(mesh, Placement(*triple))


def test_memory_decides_how_far_state_is_sharded() -> None:
    roomy, tight = (chosen(PRESETS["ethernet-25g"], 64, gib).best for gib in (80, 12))
    assert tight.cost.memory_bytes <= 12 * 2**30 < roomy.cost.memory_bytes
    assert tight.step_s > roomy.step_s


def test_quantization_is_chosen_only_where_allowed() -> None:
    exact = chosen(PRESETS["ethernet-25g"], 64, 40)
    quantized = chosen(PRESETS["ethernet-25g"], 64, 40, quantize=("none", "outer"))
    assert exact.best.quantize == "none"
    assert quantized.best.quantize == "outer" and quantized.best.step_s < exact.best.step_s
    assert "parallel.quantize=outer" in quantized.best.overrides


def test_error_feedback_takes_memory() -> None:
    machine = PRESETS["ethernet-25g"]
    bytes_ = [
        choose(
            WORK, Mesh(machine.levels(64)), machine, cap_bytes=1e15, quantize=("all",),
            options=ParallelOptions(quantize="all", error_feedback=feeds),
        ).best.cost.memory["gradients"]
        for feeds in (False, True)
    ]  # fmt: skip
    assert bytes_[1] > bytes_[0] + 4 * WORK.numel / 64


def test_of_equals_the_smaller_one_wins() -> None:
    """Where compute hides everything, memory decides."""
    work = replace(WORK, tokens=1 << 20, units=(replace(UNIT, activation_bytes=0.0),))
    choice = chosen(PRESETS["dgx-h100"], 8, 1000, work)
    assert choice.best.plan.placement == Placement(2, 2, 2) or preset_of(choice.best.plan.placement, 2) == "hsdp"
    assert "within 1%" in choice.why


def test_why_names_what_limits_it() -> None:
    choice = chosen(PRESETS["ethernet-25g"], 64, 12)
    assert "limited by" in choice.why and "node" in choice.why
    assert choice.runner_up is not None and choice.runner_up.overrides in choice.why


def test_nothing_fits_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"nothing fits.*GiB more than the 1\.0 GiB.*offload=recompute"):
        chosen(PRESETS["ethernet-25g"], 64, 1)


def test_levels_of_one_member_are_not_tried_twice() -> None:
    assert choose(WORK, Mesh({"node": 1, "gpu": 8}), PRESETS["dgx-h100"], cap_bytes=1e15).total == 4


def test_presets_are_named() -> None:
    assert preset_of(Placement(1, 2, 3), 3) == "topo"
    assert preset_of(Placement(0, 1, 2), 3) is None
