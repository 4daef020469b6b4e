"""The simulator against schedules worked out by hand, against the closed form, and in worlds of any size."""

import time
from dataclasses import replace

import pytest

from parallel import Mesh, ParallelOptions, Placement
from parallel.planning.cost import Plan, estimate
from parallel.planning.machine import PRESETS, Link, Machine
from parallel.planning.simulate import simulate
from parallel.planning.workload import Exchange, UnitCost, Workload
from parallel.transport import Transport

UNITS, ELEMENTS = 8, 1 << 20
GATHER = 2 * ELEMENTS / 2
"""Bytes that one of two ranks sends of a bf16 unit."""


def work(**changes) -> Workload:
    """Eight equal units, 1 s forward and 2 s backward each on `machine`."""
    unit = UnitCost(name="u", count=UNITS, matrices=ELEMENTS, forward_flops=1.0, backward_flops=2.0)
    return replace(Workload(units=(unit,), tokens=1, reduce_bytes=2), **changes)


def machine(gather_s: float, backend: str = "nccl", **link) -> Machine:
    """Two ranks; a unit's gather takes `gather_s`, and so does its reduction."""
    made = Link(name="gpu", size=2, bandwidth=GATHER / gather_s, **link)
    return Machine(name="two", compute=1.0, memory_rate=1e18, links=(made,), backend=backend)


def step_s(load: Workload, here: Machine, triple: tuple[int, int, int], levels: dict[str, int] | None = None) -> float:
    return simulate(load, Plan(Mesh(levels or {"gpu": 2}), Placement(*triple)), here).step_s


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_without_links_a_step_is_its_compute(backend: str) -> None:
    assert step_s(work(), machine(1e-9, backend), (1, 1, 1)) == pytest.approx(3 * UNITS, rel=1e-6)


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_small_transfers_hide_behind_compute(backend: str) -> None:
    """What shows is the first gather and the last reduction."""
    assert step_s(work(), machine(0.1, backend), (1, 1, 1)) == pytest.approx(3 * UNITS + 0.1 + 0.1, rel=0.001)


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_without_overlap_everything_adds_up(backend: str) -> None:
    """Every unit is gathered twice but the last, and reduced once."""
    expected = 3 * UNITS + 0.5 * (2 * UNITS - 1 + UNITS)
    assert step_s(work(overlap=False), machine(0.5, backend), (1, 1, 1)) == pytest.approx(expected, rel=0.001)


def test_a_slow_link_is_never_idle() -> None:
    """Gathers twice (but the last unit) and reductions once: the link is what a step takes, but for its ends."""
    run = simulate(work(), Plan(Mesh({"gpu": 2}), Placement(1, 1, 1)), machine(10.0))
    link_s = 10.0 * (2 * UNITS - 1 + UNITS)
    assert run.levels_s["gpu"] == pytest.approx(link_s, rel=1e-6)
    assert link_s <= run.step_s <= link_s + 3 * UNITS
    assert "gpu" in run.bottleneck


def test_gathers_and_reductions_share_a_link_fairly() -> None:
    """In the backward both lanes want the same link: each gets half, and no byte is lost."""
    alone = step_s(work(), machine(1.0), (1, 1, 1))
    assert alone < step_s(work(), machine(1.5), (1, 1, 1)) < step_s(work(), machine(2.0), (1, 1, 1))
    run = simulate(work(), Plan(Mesh({"gpu": 2}), Placement(1, 1, 1)), machine(2.0))
    assert run.levels_s["gpu"] <= run.step_s


def test_a_refresh_hides_behind_the_next_forward() -> None:
    """ZeRO-2: no gathers; the first unit waits for its new weights, the others have theirs in time."""
    assert step_s(work(), machine(0.1), (0, 1, 1)) == pytest.approx(3 * UNITS + 0.1 + 0.1, rel=0.001)


def test_accumulation_crosses_outer_levels_once() -> None:
    slow = Machine(
        name="slow", compute=1.0, memory_rate=1e18,
        links=(Link(name="node", bandwidth=GATHER / 20), Link(name="gpu", size=2, bandwidth=1e15)),
    )  # fmt: skip
    levels = {"node": 2, "gpu": 2}
    one, nine = (
        simulate(work(micro_batches=n), Plan(Mesh(levels), Placement(1, 1, 2)), slow).levels_s["node"] for n in (1, 9)
    )
    assert nine == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_extrapolated_micro_batches_equal_played_ones(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load, here = work(micro_batches=7), machine(1.7, backend)
    quick = step_s(load, here, (1, 1, 1))
    monkeypatch.setattr("parallel.planning.simulate._PLAYED", 100)
    assert quick == pytest.approx(step_s(load, here, (1, 1, 1)), rel=0.01)


def test_what_gloo_leaves_to_the_host_shows() -> None:
    """Over two levels only a chain's first collective runs beside compute; a CUDA lane runs on by itself."""
    links = (Link(name="node", bandwidth=GATHER), Link(name="gpu", size=2, bandwidth=GATHER))
    times = {
        backend: step_s(
            work(),
            Machine(name="m", compute=1.0, memory_rate=1e18, links=links, backend=backend),
            (2, 0 + 2, 2),
            {"node": 2, "gpu": 2},
        )
        for backend in ("nccl", "gloo")
    }
    assert times["gloo"] > times["nccl"] + 0.5 * UNITS


@pytest.mark.parametrize("overlap", [True, False])
def test_issuing_a_collective_takes_the_thread_that_computes(overlap: bool) -> None:
    """Of each unit: two gathers but the last one's, and a reduction; and the norm. No overlap hides it."""
    load, quick = work(overlap=overlap), machine(1e-9, "gloo")
    slow, added = replace(quick, issue_s=0.25), 0.25 * (2 * UNITS - 1 + UNITS + 1)
    assert step_s(load, slow, (1, 1, 1)) - step_s(load, quick, (1, 1, 1)) == pytest.approx(added, rel=1e-3)
    plan = Plan(Mesh({"gpu": 2}), Placement(1, 1, 1))
    assert estimate(load, plan, slow).step_s == pytest.approx(step_s(load, slow, (1, 1, 1)), rel=0.1)


def test_a_busy_link_slows_compute() -> None:
    free = step_s(work(), machine(0.9, "gloo"), (1, 1, 1))
    assert step_s(work(), machine(0.9, "gloo", core=0.5), (1, 1, 1)) > 1.1 * free


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize("again", [False, True])
def test_what_ranks_that_share_sequences_send_is_waited_for(backend: str, again: bool) -> None:
    """Half a second a pass: one in each forward, and in each backward one, or two where the block runs again. Gathers
    and reductions go on behind compute."""
    passed = 0.5 / 0.1 * 2 * GATHER  # half of it leaves, at the rate of a gather
    exchange = Exchange(level="gpu", ranks=2, token_bytes=passed, collectives=2, again=again)
    load = work(units=(replace(work().units[0], exchange=exchange),), micro_batches=2)
    expected = 2 * (3 * UNITS + 0.5 * UNITS * (3 if again else 2)) + 0.1 + 0.1 + 0.1
    run = simulate(load, Plan(Mesh({"gpu": 2}), Placement(1, 1, 1)), machine(0.1, backend))
    assert run.step_s == pytest.approx(expected, rel=0.005)
    assert run.waits["sequence over gpu"] == pytest.approx(2 * 0.5 * UNITS * (3 if again else 2), rel=0.01)
    closed = estimate(load, Plan(Mesh({"gpu": 2}), Placement(1, 1, 1)), machine(0.1, backend))
    assert closed.step_s == pytest.approx(expected, rel=0.01)
    assert closed.phases["sequence"] == pytest.approx(run.waits["sequence over gpu"], rel=0.01)


def test_sharing_sequences_keeps_gathers_waiting_where_both_want_one_link() -> None:
    """A gather takes as long as a forward: it hides behind that, not behind what the block sends over its link."""
    exchange = Exchange(level="gpu", ranks=2, token_bytes=2 * GATHER, collectives=2, again=False)
    load = work(units=(replace(work().units[0], exchange=exchange),))
    both = simulate(load, Plan(Mesh({"gpu": 2}), Placement(1, 1, 1)), machine(1.0))
    assert both.levels_s["gpu"] == pytest.approx(1.0 * (2 * UNITS - 1 + UNITS) + 2 * UNITS, rel=1e-6)
    assert both.step_s >= both.levels_s["gpu"]


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_a_shaped_link_saves_up_while_it_is_silent(backend: str) -> None:
    """ZeRO-2 without overlap: each of the reductions follows two seconds of compute, and half of it passes at once;
    the refreshes follow each other and the last reduction, and find the bucket empty."""
    expected = 3 * UNITS + UNITS * 0.5 + UNITS * 1.0
    here = machine(1.0, backend, burst=GATHER / 2)
    assert step_s(work(overlap=False), here, (0, 1, 1)) == pytest.approx(expected, rel=0.001)


def late_neighbours(skew: float, overlap: bool) -> float:
    """ZeRO-2 on two nodes of two; what crosses the nodes takes 8 s a unit, twice a step."""
    links = (
        Link(name="node", bandwidth=GATHER / 8, shared=True, skew=skew),
        Link(name="gpu", size=2, bandwidth=1e15),
    )
    here = Machine(name="m", compute=1.0, memory_rate=1e18, links=links, backend="gloo")
    return step_s(work(overlap=overlap), here, (0, 2, 2), {"node": 2, "gpu": 2})


def test_without_overlap_every_transfer_waits_for_late_neighbours() -> None:
    assert late_neighbours(0.0, False) == pytest.approx(3 * UNITS + 2 * UNITS * 8, rel=0.001)
    assert late_neighbours(0.5, False) == pytest.approx(3 * UNITS + 2 * UNITS * 12, rel=0.001)


def test_late_neighbours_cost_nothing_while_the_next_transfer_runs() -> None:
    """Each goes on over the same link; what waits is the end of the reductions and the refreshes, inward."""
    even, late = late_neighbours(0.0, True), late_neighbours(0.5, True)
    assert late - even < 0.6 * (late_neighbours(0.5, False) - late_neighbours(0.0, False))


def test_a_step_waits_for_the_slowest_rank() -> None:
    here = replace(machine(1e-9), jitter=0.1)
    assert step_s(work(), here, (1, 1, 1)) == pytest.approx(3 * UNITS * (1 + 0.1 * 0.59), rel=0.01)


@pytest.mark.parametrize("name", ["frontier", "dgx-h100", "ethernet-100g"])
@pytest.mark.parametrize("quantize", ["none", "outer"])
def test_closed_form_is_near(name: str, quantize: str) -> None:
    """The closed form ranks; it is within 20% of what is played, wherever the bottleneck lies."""
    here = PRESETS[name]
    mesh = Mesh(here.levels(512))
    unit = UnitCost(name="u", count=24, matrices=200 << 20, vectors=8192, forward_flops=4e8, backward_flops=8e8)
    for triple in ((0, 0, 0), (1, 1, 2), (2, 2, 2), (0, 0, 2), (mesh.num_levels,) * 3):
        for tokens in (256, 4096):
            load = Workload(units=(unit,), tokens=tokens, micro_batches=2)
            placement = Placement(*triple)
            plan = Plan(mesh, placement, Transport.of(ParallelOptions(quantize=quantize), mesh, placement))
            ratio = estimate(load, plan, here).step_s / simulate(load, plan, here).step_s
            assert 0.8 < ratio < 1.2, (triple, tokens, ratio)


@pytest.mark.timed
def test_a_hundred_thousand_ranks_take_seconds() -> None:
    """175 billion parameters on 100,000 ranks."""
    here = PRESETS["frontier"]
    mesh = Mesh(here.levels(100_000))
    unit = UnitCost(name="u", count=96, matrices=1_811_939_328, forward_flops=4e9, backward_flops=8e9, recompute=True)
    load = Workload(units=(unit,), tokens=2048, micro_batches=8)
    start = time.perf_counter()
    assert step_s(load, here, (1, 2, 3), dict(zip(mesh.names, mesh.sizes, strict=True))) > 0
    assert time.perf_counter() - start < 10
