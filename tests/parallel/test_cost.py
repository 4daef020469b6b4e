"""The cost model's bytes are the engine's bytes, level by level, and its memory is the engine's memory."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from parallel import Mesh, ParallelOptions, Placement
from parallel.planning.cost import Clock, Plan, estimate, memory, traffic_of
from parallel.planning.machine import PRESETS, Fit, Link, Machine, Packing, expected_max, load_machine
from parallel.planning.traffic import EXACT, Traffic
from parallel.planning.workload import UnitCost, Workload
from parallel.transport import Transport

HERE = Path(__file__).parent
CUBE = {"node": 2, "gpu": 2, "die": 2}
SQUARE = {"node": 2, "gpu": 2}


def run_world(world: int, cases: list[dict], *, alone: bool = False) -> list[dict]:
    """The answers of `traffic_world.py`; `alone`: in a network namespace, whose loopback nobody else uses."""
    command = [sys.executable, str(HERE / "traffic_world.py"), str(world)]
    if alone:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, timeout=200, cwd=HERE.parent.parent,
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent), "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def case(levels: dict, placement: str, accumulation: int = 1, **more) -> dict:
    model = {"tie_embeddings": more.pop("tied", False)}
    keys = {name: more.pop(name) for name in ("bf16", "activations", "seq_len") if name in more}
    parallel = {"placement": placement, **more}
    return {"levels": levels, "parallel": parallel, "accumulation": accumulation, "model": model, **keys}


PLACEMENTS = ("ddp", "zero1", "zero2", "zero3", "hsdp", "hfsdp", "topo")
WORLDS = {
    4: [case(SQUARE, p, 2) for p in PLACEMENTS]
    + [
        case(SQUARE, "zero3", tied=True),
        case(SQUARE, "zero3", activations={"mode": "checkpoint"}, prefetch_units=2),
        case(SQUARE, "hfsdp", bf16=True, reduce_dtype="bf16"),
        case({"node": 4, "gpu": 1}, "topo"),
        *[case(SQUARE, p, 2, quantize=q) for p in ("zero3", "hfsdp", "hsdp") for q in ("outer", "all")],
        case(SQUARE, "hfsdp", bf16=True, quantize="outer"),
    ],
    8: [case(CUBE, p) for p in ("hsdp", "topo", "ddp")]
    + [case(CUBE, "free", 2, params=1, grads=1, optim=2), case(CUBE, "free", 1, params=0, grads=0, optim=1)]
    + [case(CUBE, "topo", 1, quantize=q) for q in ("outer", "all")]
    + [case(CUBE, "free", 1, params=0, grads=1, optim=1, quantize="all")],
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [pytest.param(world, marks=pytest.mark.slow) for world in (4, 8)])
def test_bytes_and_memory_are_the_engines(world: int) -> None:
    answers = run_world(world, WORLDS[world])
    assert len(answers) == len(WORLDS[world])
    for a in answers:
        assert a["sent"] == pytest.approx(a["expected"], rel=0.03), a
        states = a["state"]["master"] + a["state"]["optimizer"]
        assert states == pytest.approx(a["held"]["states"], rel=0.001), a
        assert a["state"]["parameters"] == pytest.approx(a["held"]["parameters"], rel=0.001), a
        packs = a["case"]["parallel"].get("quantize", "none") != "none"
        room = a["held"]["buffers"] + (a["held"]["under way"] if packs else 0)
        assert a["state"]["buffers"] <= 1.001 * room, a


ALL = {"worker": 4}
SHARING = [
    case(SQUARE, "zero3", 2, sequence="gpu"),
    case(SQUARE, "hfsdp", sequence="node"),
    case(ALL, "zero3", sequence="worker"),  # two key-value heads are repeated
    *[
        case(SQUARE, "zero3", sequence="gpu", activations=activations)
        for activations in (
            {"mode": "checkpoint"}, {"mode": "recompute"}, {"mode": "input", "keep_last": 1},
            {"mode": "swap", "alpha": 1.0, "keep_last": 3}, {"mode": "swap", "alpha": 0.0, "keep_last": 0},
            {"mode": "stream", "tile_tokens": 6}, {"mode": "stream_input", "tile_tokens": 16},
        )
    ],
    case(ALL, "hsdp", 2, sequence="worker", activations={"mode": "stream", "tile_tokens": 4}),
    case(ALL, "zero3", sequence="worker", seq_len=39, activations={"mode": "recompute"}),  # parts of 10 and one of 9
    case(SQUARE, "zero3"),
]  # fmt: skip


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_what_ranks_that_share_sequences_send_is_counted() -> None:
    """To the byte, and each collective, where their parts are even; a rank's own are those of the longest part."""
    answers = run_world(4, SHARING)
    assert len(answers) == len(SHARING)
    for a in answers:
        longest = 40 / 39 if a["case"].get("seq_len") else 1
        shared, exchanges = a["shared"], a["exchanges"]
        assert [longest * sent for sent in shared["sent"]] == pytest.approx(shared["expected"], rel=1e-9), a
        assert exchanges["made"] == exchanges["expected"], a
        assert (exchanges["made"] > 0) == (sum(shared["sent"]) > 0) == ("sequence" in a["case"]["parallel"])
        assert a["sent"] == pytest.approx(a["expected"], rel=0.03), a


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root for a network namespace")
def test_bytes_are_those_on_the_wire() -> None:
    for a in run_world(4, [case(SQUARE, "zero3"), case(SQUARE, "ddp")], alone=True):
        assert a["wire"] == pytest.approx(sum(a["expected"]), rel=0.03), a


# ---------------------------------------------------------------------------------------------------- bytes on paper

PSI = 1 << 30
BIG = Workload(units=(UnitCost(name="all", matrices=PSI, gathers_backward=True),), tokens=1, reduce_bytes=2)


def node_bytes(placement: str, accumulation: int = 1, quantize: str = "none", nodes: int = 64) -> float:
    """Bytes that a node of 8 sends a step, in parameters."""
    mesh = Mesh({"node": nodes, "gpu": 8})
    options = ParallelOptions(placement=placement, quantize=quantize)
    work = replace(BIG, micro_batches=accumulation, units=(UnitCost(name="u", count=64, matrices=PSI // 64),))
    placed = Placement.of(options, 2)
    traffic = Traffic(work, mesh, placed, Transport.of(options, mesh, placed), gloo=False)
    return 8 * sum(levels[0] for levels in traffic.sent_bytes().values()) / PSI


def test_bytes_between_nodes_are_the_papers() -> None:
    """6 psi A for ZeRO-3, 4 psi for what crosses once a step, 1.5 psi with INT8 weights and INT4 gradients."""
    assert node_bytes("zero3", 3) == pytest.approx(18, rel=0.03)
    assert node_bytes("hfsdp", 1) == node_bytes("hfsdp", 9) == pytest.approx(4, rel=0.03)
    assert node_bytes("hsdp", 4) == pytest.approx(4, rel=0.03)
    assert node_bytes("hfsdp", 4, "outer") == pytest.approx(1.5, rel=0.05)


def test_a_ring_over_levels_crosses_the_slow_one_once_a_group() -> None:
    mesh = Mesh({"node": 4, "gpu": 2, "die": 2})
    traffic = Traffic(BIG, mesh, Placement(0, 0, 0), EXACT, gloo=True)
    move = traffic.all_reduce(1600, 0, 3)
    neighbours = [0, 0, 0]
    for rank in range(16):
        a, b = (Mesh({"node": 4, "gpu": 2, "die": 2}, rank=r % 16).coordinates for r in (rank, rank + 1))
        neighbours[next(i for i in range(3) if a[i] != b[i])] += 1
    assert move.sent == pytest.approx([2 * 1600 * 15 / 16 * n / 16 for n in neighbours])


def test_memory_is_the_known_formula() -> None:
    """ZeRO-3 16 psi / N with bf16 gradients, HFSDP 12 psi / N + 4 psi / L (parameters, gradients, states)."""
    mesh, n = Mesh({"node": 8, "gpu": 8}), 64
    work = replace(BIG, units=(UnitCost(name="u", count=64, matrices=PSI // 64),))
    for placement, expected in (("zero3", 16 / n), ("hfsdp", 12 / n + 4 / 8), ("hsdp", 16 / 8), ("ddp", 16)):
        options = ParallelOptions(placement=placement)
        held = memory(work, traffic_of(work, Plan(mesh, Placement.of(options, 2)), PRESETS["dgx-a100"]))
        states = held["parameters"] + held["gradients"] + held["optimizer states"]
        assert states == pytest.approx(expected * PSI + 2 * PSI / 64, rel=0.001)  # and one unit's gradients as made


# ---------------------------------------------------------------------------------------------------- time on paper


def test_a_slow_link_alone_takes_its_bytes_over_its_bandwidth() -> None:
    machine = Machine(
        name="slow", compute=1e18, memory_rate=1e18,
        links=(Link(name="node", bandwidth=1e9, shared=True), Link(name="gpu", size=2, bandwidth=1e15)),
    )  # fmt: skip
    cost = estimate(BIG, Plan(Mesh({"node": 2, "gpu": 2}), Placement(0, 0, 0)), machine)
    assert cost.step_s == pytest.approx(2 * (3 / 4) * 2 * PSI / 1e9, rel=0.01)  # a ring's edge, of two bytes an element


def test_latency_counts_a_step_of_the_ring() -> None:
    link = Link(name="node", bandwidth=1e18, fits={"all_reduce": Fit(bandwidth=1e18, latency=1e-3, start_s=5e-3)})
    machine = Machine(name="far", compute=1e18, memory_rate=1e18, links=(link,))
    cost = estimate(replace(BIG, num_parameters=0), Plan(Mesh({"node": 5}), Placement(0, 0, 0)), machine)
    assert cost.step_s == pytest.approx(5e-3 + 8e-3, rel=0.05)


def test_each_format_is_packed_at_its_own_rate() -> None:
    machine = Machine(
        name="slow", compute=1e18, memory_rate=1e18, links=(Link(name="node", bandwidth=1e9),),
        packing={
            "quantize_int4": Packing(rate=1e9, call_s=1e-3), "dequantize_int4": Packing(rate=2e9, call_s=2e-3),
            "dequantize_int8": Packing(rate=4e9, call_s=3e-3),
        },
    )  # fmt: skip
    mesh, placed = Mesh({"node": 2}), Placement(1, 1, 1)
    transport = Transport.of(ParallelOptions(quantize="all"), mesh, placed)
    traffic, clock = traffic_of(BIG, Plan(mesh, placed, transport), machine), Clock(machine, mesh, BIG)
    ((gather,),), ((reduce,),) = traffic.unit(BIG.units[0]).gather, traffic.unit(BIG.units[0]).reduce
    assert clock.use(gather) == pytest.approx(3e-3 + PSI * (1 + 4 / 256 + 2) / 4e9, rel=1e-3)  # codes, scales; bf16
    codes = 1 / 2 + 4 / 128
    assert clock.prepare(reduce) == pytest.approx(1e-3 + PSI * (4 + codes) / 1e9, rel=1e-3)
    assert clock.use(reduce) == pytest.approx(2e-3 + PSI * (codes + 4 / 2) / 2e9, rel=1e-3)


def test_error_feedback_is_read_written_and_kept() -> None:
    mesh, placed = Mesh({"node": 2, "gpu": 2}), Placement(2, 2, 2)
    plain, fed = (
        Plan(mesh, placed, Transport.of(ParallelOptions(quantize="all", error_feedback=feeds), mesh, placed))
        for feeds in (False, True)
    )
    machine = Machine(
        name="m", compute=1e18, memory_rate=1e9,
        links=(Link(name="node", bandwidth=1e18), Link(name="gpu", bandwidth=1e18)),
    )  # fmt: skip
    more = estimate(BIG, fed, machine).memory_bytes - estimate(BIG, plain, machine).memory_bytes
    assert more == 4 * PSI * (1 + 1 / 2)  # what leaves over the inner level, and half of it over the outer one
    assert estimate(BIG, fed, machine).step_s - estimate(BIG, plain, machine).step_s == pytest.approx(2 * more / 1e9)


# ---------------------------------------------------------------------------------------------------- machines


def test_a_machine_survives_its_file(tmp_path: Path) -> None:
    link = Link(name="worker", bandwidth=1e9, fits={"all_gather": Fit(bandwidth=2e9, latency=1e-4, start_s=1e-3)})
    machine = Machine(name="mine", compute=1e9, memory_rate=1e9, memory={"host": 1e9}, backend="gloo", links=(link,))
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(machine.to_mapping()))
    assert load_machine(str(file)) == machine
    yaml = tmp_path / "machine.yaml"
    yaml.write_text("preset: dgx-h100\nname: ours\ncompute: 4.0e+14\n")
    assert load_machine(str(yaml)) == replace(PRESETS["dgx-h100"], name="ours", compute=4e14)


@pytest.mark.parametrize(
    ("name", "said"),
    [("dgx-h10", "did you mean dgx-h100"), ("nowhere.json", "no such file"), ("bad.json", "did you mean bandwidth")],
)
def test_a_wrong_machine_is_answered(name: str, said: str, tmp_path: Path) -> None:
    bad = {"name": "x", "compute": 1, "memory_rate": 1, "links": {"node": {"bandwith": 1}}}
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=said):
        load_machine(str(tmp_path / name) if name.endswith("json") else name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("preset: dgx-h100\ncompute: 4e14", r"machine.compute='4e14' is no number; in YAML 4.0e\+14 is one"),
        ("preset: dgx-h100\nlinks: {node: {bandwidth: fast}}", "machine.links.node.bandwidth='fast' is no number"),
        ("preset: dgx-h100\nmemory: {gpu: 80e9}", "machine.memory.gpu='80e9' is no number"),
        ("preset: dgx-h100\npacking: {quantize_int8: {rat: 1}}", "machine.packing.quantize_int8 has no 'rat'"),
        ("preset: [", "machine=.*bad.yaml cannot be read"),
    ],
)
def test_a_machine_that_is_written_wrong_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_machine(str(tmp_path / "bad.yaml"))


def test_presets_place_any_world() -> None:
    assert PRESETS["frontier"].levels(384) == {"node": 48, "gpu": 4, "die": 2}
    assert PRESETS["dgx-h100"].levels(12) == {"node": 3, "gpu": 4}
    with pytest.raises(ValueError, match="launch.workers=2"):
        PRESETS["single"].levels(2)


def test_a_level_without_a_link_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.levels has 'rack'.*node, gpu"):
        estimate(BIG, Plan(Mesh({"rack": 2, "gpu": 8}), Placement(0, 0, 0)), PRESETS["dgx-a100"])


def test_the_slowest_of_many_is_the_expected_maximum() -> None:
    known = {2: 1 / math.sqrt(math.pi), 10: 1.53875, 100: 2.50759, 1000: 3.24144}
    assert all(expected_max(n) == pytest.approx(value, rel=0.05) for n, value in known.items())
