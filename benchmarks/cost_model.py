"""How well the cost model tells a step's seconds and bytes: a grid of measured steps, a third of it never fitted to.

    sudo python benchmarks/cost_model.py [--rates 100 400] [--rounds 3] [--budget-s 440] [--out FILE]
    sudo python benchmarks/cost_model.py --more FILE     # adds rounds to what was measured before
    sudo python benchmarks/cost_model.py --read FILE     # fits and judges again what was measured before

1. Ranks in network namespaces, 2 nodes x 2 ranks (`slow_link`). At each rate `links` describes the machine.
2. Rounds over the grid, each in the other direction: every P <= G <= O of the two levels with overlap, the named ones
   also without, each with every quantization and accumulation at each rate. Seconds of steps in the steady state (the
   first after a change of rate is left out); bytes of payload as the interfaces count them; what other processes took
   of the cores meanwhile is noted. A point's time is the median of its rounds' medians, and how far those lie apart is
   told beside the error: no round is left out.
3. Two thirds of the steps correct the machines' figures by one factor on each, whatever the rate of the link
   (`parallel.planning.calibrate`); the last third, every third one along each axis of the grid (`held_out`), only tells
   how far the prediction is off.
4. For each rate and accumulation: what ``parallel=auto`` takes by the model, beside the fastest of the grid. And what
   it takes where it tries those that the model cannot tell apart (``parallel.auto_steps``, `trainer.trial.fastest`):
   trials of their own decide, the grid's rounds tell how much slower what they took is.

The last line is one JSON object.
"""

import sys

if __name__ == "__main__" and "--rank" in sys.argv:  # a rank: before the imports that take seconds
    from namespaces import die_with

    die_with(int(sys.argv[1]))

import os

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the steps run on CPUs: `links` must not describe a GPU beside them

import argparse
import itertools
import json
import math
import multiprocessing
import platform
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # `offload` is the package, not the benchmark

import links  # noqa: E402
import slow_link_worker  # noqa: E402
import torch  # noqa: E402
from namespaces import Network, _tbf  # noqa: E402
from report import write_report  # noqa: E402
from slow_link import World  # noqa: E402
from slow_link_engines import Atoll, Job  # noqa: E402
from torch import nn  # noqa: E402

from parallel import Mesh, ParallelOptions, Placement  # noqa: E402
from parallel.planning.calibrate import Run, calibrate_alike  # noqa: E402
from parallel.planning.choose import MEASURED, choose  # noqa: E402
from parallel.planning.cost import Plan, estimate, traffic_of  # noqa: E402
from parallel.planning.machine import Machine, Packing  # noqa: E402
from parallel.planning.simulate import simulate  # noqa: E402
from parallel.planning.workload import UnitCost, Workload, aligned  # noqa: E402
from parallel.transport import Transport  # noqa: E402
from trainer import trial  # noqa: E402

Row = dict[str, Any]
LEVELS = {"node": 2, "rank": 2}
WIDTH, LAYERS, TOKENS = 384, 6, 32
PLACEMENTS = ("ddp", "zero2", "zero3", "hsdp", "hfsdp")
"""On two levels ``topo`` is ``hfsdp``."""
FREE = ((0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2), (1, 2, 2))
"""The other P <= G <= O of two levels."""
QUANTIZE = ("none", "outer", "all")
ACCUMULATION = (1, 4)
SECONDS, MOST_STEPS = 0.2, 8
"""Of a round and a point: about so long, one step at least; one more before them is not counted."""
FRESH = 2
"""Builds that a set of ranks serves: ranks age, after thirty builds the same step takes 1.3 to 1.7 times as long."""
CORES = sorted(os.sched_getaffinity(0))
HEADER = 66
"""Bytes of Ethernet, IPv4 and TCP with timestamps before the payload of a packet, as the interfaces count packets."""


class Layers(nn.Module):
    """Linear layers, each a unit, and the mean square of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layers(x).square().mean()
        return loss


def batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return (torch.randn(TOKENS, WIDTH, generator=generator),)


class Rank(slow_link_worker.Rank):
    """Also does ``{"do": "links"}``, and ``build`` takes a point of the grid."""

    def build(self, generation: int, overlap: bool, options: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        self._join(generation)
        self._job, self._steps_taken = Job(Layers, batch, work_of), 0
        self._side = Atoll(Layers(), LEVELS, overlap=overlap, dtype=torch.float32, **options)
        return {}

    def links(self, generation: int, seconds: float, out: str) -> dict[str, Any]:
        self._join(generation)
        links.measure(
            LEVELS, argparse.Namespace(seconds=seconds, tokens=TOKENS, largest=1 << 22, name="namespaces", out=out)
        )
        return self.drop()


@dataclass(frozen=True)
class Point:
    """One measured configuration."""

    rate: float
    placement: str
    quantize: str
    accumulation: int
    overlap: bool
    triple: tuple[int, int, int] | None = None
    """P, G, O where ``placement`` is ``free``."""

    @property
    def options(self) -> dict[str, Any]:
        named = {"placement": self.placement, "quantize": self.quantize}
        if self.triple is None:
            return named
        return named | dict(zip(("params", "grads", "optim"), self.triple, strict=True))

    def __str__(self) -> str:
        name = self.placement if self.triple is None else "free" + "".join(map(str, self.triple))
        shown = f"{self.rate:6g} {name:7} {self.quantize:6} x{self.accumulation}"
        return shown + ("" if self.overlap else " overlap off")


def grid(rates: list[float]) -> list[Point]:
    named = itertools.product(rates, PLACEMENTS, QUANTIZE, ACCUMULATION, (True, False))
    free = itertools.product(rates, ("free",), QUANTIZE, ACCUMULATION, (True,), FREE)
    return [Point(*point) for point in (*named, *free)]


def held_out(point: Point) -> bool:
    """Every third one along the axes of placement and quantization, shifted by accumulation and overlap."""
    place = PLACEMENTS.index(point.placement) if point.triple is None else 2 + FREE.index(point.triple)
    where = place + QUANTIZE.index(point.quantize)
    return (where + ACCUMULATION.index(point.accumulation) + 2 * point.overlap) % 3 == 0


def mesh() -> Mesh:
    return Mesh.of(LEVELS, rank=0, world=math.prod(LEVELS.values()))


def work_of(micro_batches: int, compute_bytes: int = 4, reduce_bytes: int = 4) -> Workload:
    size = WIDTH * WIDTH
    first = UnitCost(  # its input needs no gradient, so its backward has one product and asks for no weights
        name="first", matrices=aligned(size), forward_flops=2.0 * size, backward_flops=2.0 * size,
        gathers_backward=False,
    )  # fmt: skip
    rest = replace(first, name="layer", count=LAYERS - 1, backward_flops=4.0 * size, gathers_backward=True)
    return Workload(
        units=(first, rest), tokens=TOKENS, micro_batches=micro_batches, compute_bytes=compute_bytes,
        reduce_bytes=reduce_bytes, num_parameters=LAYERS,
    )  # fmt: skip


def problem(point: Point) -> tuple[Workload, Plan]:
    """What the cost model is asked about a point."""
    work = replace(work_of(point.accumulation), overlap=point.overlap)
    options = ParallelOptions(**point.options)
    placement = Placement.of(options, len(LEVELS))
    return work, Plan(mesh(), placement, Transport.of(options, mesh(), placement))


# ------------------------------------------------------------------------------------------------------- measuring


class Bench:
    """Measures points; the rows and machines that came of it."""

    def __init__(self, out: str, budget_s: float) -> None:
        self.out, self.started, self.budget_s = out, time.monotonic(), budget_s
        self.rows: dict[Point, Row] = {}
        self.machines: dict[float, Row] = {}
        self.measured: Row = {}
        """Of a file that was read: when, by what and how it was measured."""
        self.rounds_before = 0
        self.hardware = (
            f"{platform.machine()}, {len(CORES)} of {os.cpu_count()} cores, Linux {platform.release()}, "
            f"load average {os.getloadavg()[0]:.1f} at the start"
        )

    @property
    def points(self) -> list[Point]:
        """Those that have a time."""
        return [point for point, row in self.rows.items() if row["rounds"]]

    def over(self) -> bool:
        return time.monotonic() - self.started > self.budget_s

    def describe_machine(self, world: World, rate: float) -> None:
        world.network.set_rates({"node": rate})
        world.generation += 1
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/machine.json"
            world.do(120, do="links", generation=world.generation, seconds=0.3, out=out)
            self.machines[rate] = json.loads(Path(out).read_text())
        self.keep()

    def measure(self, world: World, points: list[Point], kind: str) -> None:
        """A round of all points of one build: they differ in rate and accumulation alone. kind: ``rounds``, or
        ``trials`` of what ``parallel=auto`` tries."""
        network, first = world.network, points[0]
        network.set_rates({})
        world.generation += 1
        world.do(60, do="build", generation=world.generation, overlap=first.overlap, options=first.options)
        world.do(60, do="time", accumulation=1, steps=1)
        for point in points:
            network.set_rates({"node": point.rate})
            row = self.rows.setdefault(point, {**vars(point), "rounds": []})
            row.setdefault(kind, []).append(self._round(world, point))
            if kind == "rounds":
                row |= over_rounds(row["rounds"])
        world.do(60, do="drop")
        self.keep()

    def num_steps(self, point: Point) -> int:
        """By what the machine as described leads to expect."""
        expected_s = simulate(*problem(point), described(point.rate, self.machines[point.rate])).step_s
        return min(MOST_STEPS, max(1, round(SECONDS / expected_s)))

    def _round(self, world: World, point: Point) -> Row:
        """Seconds of steps, bytes of payload a rank and step by level, and the part of the cores that others took."""
        count = 1 + self.num_steps(point)
        sent, own, all_, start = payload(world.network), user_s(world.pids), busy_s(), time.monotonic()
        answers = world.do(120, do="time", accumulation=point.accumulation, steps=count)
        wall = time.monotonic() - start
        others = max(0.0, busy_s() - all_ - (user_s(world.pids) - own)) / wall / len(CORES)
        steps = [statistics.fmean(times) for times in zip(*(a["steps_s"] for a in answers), strict=True)]
        now = payload(world.network)
        return {
            "steps_s": [round(step, 5) for step in steps[1:]], "others": round(others, 3),
            "sent": {level: (now[level] - sent[level]) / count / mesh().world for level in now},
        }  # fmt: skip

    def read(self, path: str) -> None:
        """What an earlier run kept."""
        report = json.loads(Path(path).read_text())
        self.hardware = report["hardware"]
        self.measured = {name: report[name] for name in ("date", "versions", "command")}
        names = [field.name for field in fields(Point)]
        for row in report["rows"]:
            if row["kind"] == "machine":
                self.machines[row["rate"]] = {"machine": row["machine"], "points": row["points"]}
            elif row["kind"] == "step":
                values = {name: row[name] for name in names}
                point = Point(**values | {"triple": row["triple"] and tuple(row["triple"])})
                self.rows[point] = {name: value for name, value in row.items() if name != "kind"}
        for point in self.points:
            self.rows[point] |= over_rounds(self.rows[point]["rounds"])
        self.rounds_before = min(len(row["rounds"]) for row in self.rows.values())

    def keep(self, more: Sequence[Row] = ()) -> None:
        rows = [{"kind": "machine", "rate": rate, **machine} for rate, machine in self.machines.items()]
        write_report(self.out, self.hardware, [*rows, *({"kind": "step", **row} for row in self.rows.values()), *more])
        if self.measured:
            report = json.loads(Path(self.out).read_text())
            judged = {name: report[name] for name in ("date", "versions")}
            Path(self.out).write_text(json.dumps(report | self.measured | {"judged": judged}, indent=1) + "\n")


def over_rounds(rounds: list[Row]) -> Row:
    """The median of the rounds' medians, and how far the slowest is from the fastest."""
    medians = [statistics.median(found["steps_s"]) for found in rounds]
    return {
        "step_s": statistics.median(medians), "spread": max(medians) / min(medians) - 1, "sent": rounds[-1]["sent"]
    }  # fmt: skip


def payload(network: Network) -> dict[str, float]:
    """Bytes that nodes sent to each other and to themselves, without headers and acknowledgements."""
    total = dict.fromkeys(network.levels, 0.0)
    for node in range(network.num_nodes):
        for link in json.loads(subprocess.check_output(["ip", "-n", network.namespace(node), "-s", "-j", "link"])):
            level = {"eth0": "node", "lo": "rank"}[link["ifname"]]
            total[level] += link["stats64"]["tx"]["bytes"] - HEADER * link["stats64"]["tx"]["packets"]
    return total


def busy_s() -> float:
    """Seconds so far of the cores that we may use, of every program and of other machines; not the kernel's own."""
    lines = dict(line.split(maxsplit=1) for line in Path("/proc/stat").read_text().splitlines())
    times = [list(map(int, lines[f"cpu{core}"].split())) for core in CORES]
    return sum(user + nice + steal for user, nice, _, _, _, _, _, steal, *_ in times) / os.sysconf("SC_CLK_TCK")


def user_s(pids: list[int]) -> float:
    """Core seconds so far of these processes, not in the kernel."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(stat[11]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def by_build(points: list[Point]) -> list[list[Point]]:
    builds: dict[tuple[Any, ...], list[Point]] = {}
    for p in points:
        builds.setdefault((p.placement, p.quantize, p.overlap, p.triple), []).append(p)
    return list(builds.values())


def measure_grid(bench: Bench, world: World, rates: list[float], rounds: int) -> None:
    for rate in rates:
        if rate not in bench.machines:
            bench.describe_machine(world, rate)
    say(f"links measured after {time.monotonic() - bench.started:.0f} s")
    for number in range(bench.rounds_before, bench.rounds_before + rounds):
        if not measure_round(bench, world, grid(rates), number, "rounds"):
            say(f"round {number} ends early: more than --budget-s={bench.budget_s:g}")
            break
        say(f"round {number} measured after {time.monotonic() - bench.started:.0f} s")


def measure_round(bench: Bench, world: World, points: list[Point], number: int, kind: str) -> bool:
    """Every second one in reverse order. Returns whether there was time for all; those with the fewest rounds are the
    first."""
    builds = by_build(points)[:: 1 if number % 2 == 0 else -1]
    builds.sort(key=lambda build: len(bench.rows.get(build[0], {}).get(kind, [])))
    for count, build in enumerate(builds):
        if bench.over():
            return False
        if count % FRESH == 0:
            world.renew()
        bench.measure(world, build, kind)
    return True


def measure_trials(bench: Bench, world: World, fitted: dict[float, Machine]) -> None:
    """Those between which ``parallel=auto`` decides by trying, as often as it may try them."""
    bench.budget_s = math.inf
    tried = dict.fromkeys(point for question in questions(fitted) for point in contenders(fitted, question))
    for number in range(trial.ROUNDS):
        measure_round(bench, world, list(tried), number, "trials")
    say(f"trials measured after {time.monotonic() - bench.started:.0f} s")


# ------------------------------------------------------------------------------------------------------- judging


def described(rate: float, row: Row) -> Machine:
    """The machine as `links` measured it, but with one bandwidth a link for all collectives, at the least what one rank
    alone gets of it: what one collective does not fill, those that run beside it in a step do. The slow link has its
    bucket, through which the smallest message passed at once: what that took is the latency."""
    machine = Machine.of(row["machine"])
    if machine.backend != "gloo":
        say(f"at {rate:g} Mbit/s `links` described a GPU, the steps ran on CPUs: what they reach is only fitted")
        machine = replace(machine, **CPUS)
        machine = replace(machine, links=tuple(replace(link, latency=1e-4, fits={}) for link in machine.links))
    found = []
    for link, below in zip(machine.links, (LEVELS["rank"], 1), strict=True):
        saved = burst(rate) if link.shared else 0.0
        plain = replace(link, fits={}, bandwidth=max(link.bandwidth, link.alone), burst=saved)
        fits = {kind: replace(fit, bandwidth=plain.rate(kind, below)) for kind, fit in link.fits.items()}
        if link.shared:
            points = row["points"][link.name]
            smallest_s = {kind: max(0.0, points[kind][0][1] - machine.issue_s) for kind in fits}
            steps = {kind: links.ring_steps(kind, points["members"]) for kind in fits}
            fits = {kind: replace(fit, latency=smallest_s[kind] / steps[kind]) for kind, fit in fits.items()}
        found.append(replace(plain, fits=fits))
    return replace(machine, links=tuple(found))


CPUS: dict[str, Any] = {
    "backend": "gloo", "compute": 40e9, "memory_rate": 10e9, "unit_s": 1e-4, "step_s": 1e-3,
    "packing": {
        "quantize_int8": Packing(rate=11e9, call_s=6e-5), "dequantize_int8": Packing(rate=40e9, call_s=2e-5),
        "quantize_int4": Packing(rate=8e9, call_s=7e-5), "dequantize_int4": Packing(rate=11e9, call_s=5e-5),
    },
}  # fmt: skip
"""Of a core, in round numbers: from where a fit starts that knows nothing."""


def burst(rate: float) -> float:
    """Bytes in the bucket of `namespaces`' shaper."""
    words = _tbf(rate).split()
    return float(words[words.index("burst") + 1])


def fit(bench: Bench) -> dict[float, Machine]:
    """The machine at each rate, corrected by what is not held out."""
    runs = {
        rate: [
            Run(*problem(point), bench.rows[point]["step_s"])
            for point in bench.points if point.rate == rate and not held_out(point)
        ]
        for rate in bench.machines
    }  # fmt: skip
    machines, started = [described(rate, row) for rate, row in bench.machines.items()], time.monotonic()
    with ProcessPoolExecutor(len(CORES), multiprocessing.get_context("fork")) as pool:
        found = calibrate_alike(machines, list(runs.values()), within=8.0, each=pool.map)
    say(f"fitted in {time.monotonic() - started:.0f} s")
    return dict(zip(bench.machines, found, strict=True))


def judge(bench: Bench, fitted: dict[float, Machine]) -> Row:
    """Predict and compare; the summary. Rows get their prediction."""
    found: list[Row] = []
    for rate, measured in bench.machines.items():
        points = [point for point in bench.points if point.rate == rate]
        base = described(rate, measured)
        for point in points:
            row, (work, plan) = bench.rows[point], problem(point)
            row["simulated_s"] = simulate(work, plan, fitted[rate]).step_s
            row["closed_s"] = estimate(work, plan, fitted[rate]).step_s
            row["uncorrected_s"] = simulate(work, plan, base).step_s
            row["held_out"] = held_out(point)
            row["error"] = row["simulated_s"] / row["step_s"] - 1
            sent = traffic_of(work, plan, base).sent_bytes().values()
            row["model_sent"] = dict(zip(LEVELS, map(sum, zip(*sent, strict=True)), strict=True))
            row["bytes_error"] = {k: row["sent"][k] / v - 1 for k, v in row["model_sent"].items() if v}
            found.append(row)
    summary: Row = {"points": len(found)}
    for name, rows in {
        "fitted": [row for row in found if not row["held_out"]],
        "held_out": [row for row in found if row["held_out"]],
        "held_out_exact": [row for row in found if row["held_out"] and row["quantize"] == "none"],
        "held_out_quantized": [row for row in found if row["held_out"] and row["quantize"] != "none"],
    }.items():
        for what in ("simulated_s", "closed_s", "uncorrected_s"):
            summary[f"{name}_{what.removesuffix('_s')}"] = spread([row[what] / row["step_s"] - 1 for row in rows])
    summary["rounds"] = [min(counts := [len(row["rounds"]) for row in found]), max(counts)]
    again = [row["spread"] for row in found if len(row["rounds"]) > 1]
    summary["rounds_apart"] = spread(again) if again else {}
    summary["bytes_worst"] = max(abs(error) for row in found for error in row["bytes_error"].values())
    summary["auto"] = [judge_choice(bench, fitted, asked) for asked in questions(fitted)]
    summary["machines"] = {f"{rate:g}": machine.to_mapping() for rate, machine in fitted.items()}
    return summary


@dataclass(frozen=True)
class Question:
    """What ``parallel=auto`` is asked: a rate, an accumulation, and which quantizations are allowed."""

    rate: float
    accumulation: int
    allowed: tuple[str, ...]

    def measured(self, bench: Bench) -> list[Point]:
        """The points that would be an answer."""
        key = self.rate, self.accumulation, True
        return [
            p for p in bench.points
            if (p.rate, p.accumulation, p.overlap) == key and p.quantize in self.allowed
        ]  # fmt: skip


def questions(rates: Iterable[float]) -> list[Question]:
    return [Question(*asked) for asked in itertools.product(rates, ACCUMULATION, (("none",), QUANTIZE))]


def contenders(fitted: dict[float, Machine], asked: Question) -> list[Point]:
    """What the cost model takes, then what else would be measured."""
    work, _ = problem(Point(asked.rate, "ddp", "none", asked.accumulation, True))
    choice = choose(work, mesh(), fitted[asked.rate], cap_bytes=math.inf, quantize=asked.allowed)
    found = []
    for candidate in choice.contenders[:MEASURED]:
        place = candidate.plan.placement
        point = Point(
            asked.rate, "free", candidate.quantize, asked.accumulation, True, (place.params, place.grads, place.optim)
        )
        for name in PLACEMENTS:
            if Placement.of(ParallelOptions(placement=name), len(LEVELS)) == place:
                point = Point(asked.rate, name, candidate.quantize, asked.accumulation, True)
        found.append(point)
    return found


def judge_choice(bench: Bench, fitted: dict[float, Machine], asked: Question) -> Row:
    """What ``parallel=auto`` takes, by the model alone and by trials, beside the fastest of what was measured."""
    measured, taken = asked.measured(bench), contenders(fitted, asked)
    fastest = min(measured, key=lambda p: float(bench.rows[p]["step_s"]))
    row: Row = {
        **vars(asked), "contenders": list(map(str, taken)), "chosen": str(taken[0]), "fastest": str(fastest),
        "fastest_s": bench.rows[fastest]["step_s"],
    }  # fmt: skip
    if taken[0] in measured:
        row["chosen_s"] = bench.rows[taken[0]]["step_s"]
        row["slower"] = row["chosen_s"] / row["fastest_s"] - 1
    if all(bench.rows.get(p, {}).get("trials") and p in measured for p in taken):
        by_name, rounds = {str(p): p for p in taken}, Counter[str]()

        def figures(name: str) -> list[float]:
            rounds[name] += 1
            trials = bench.rows[by_name[name]]["trials"]
            steps = trials[min(rounds[name], len(trials)) - 1]["steps_s"]
            halves = steps[: (len(steps) + 1) // 2], steps[(len(steps) + 1) // 2 :]
            return [statistics.fmean(half) for half in halves if half]

        best, _ = trial.fastest(list(by_name), figures)
        slower = bench.rows[by_name[best]]["step_s"] / row["fastest_s"] - 1
        row |= {"by_trial": best, "by_trial_slower": slower, "trials": sum(rounds.values())}
    return row


def spread(errors: list[float]) -> dict[str, float]:
    sizes = sorted(map(abs, errors))
    within = sum(size <= 0.1 for size in sizes) / len(sizes)
    figures = {"median": statistics.median(sizes), "p90": sizes[math.ceil(0.9 * len(sizes)) - 1], "worst": sizes[-1]}
    return {name: round(size, 4) for name, size in {**figures, "within_10_percent": within}.items()} | {
        "of": len(sizes)
    }


def print_tables(bench: Bench, summary: Row) -> None:
    print("Seconds a step: median of the rounds, how far they lie apart, simulated with the machine corrected by the")
    print("points that are not held out, error, that of the closed form; bytes a rank beside the model's")
    print(
        f"{'Mbit/s placement':38}{'measured':>9}{'rounds':>7}{'apart':>7}{'simulated':>10}{'':>7}{'closed':>7}"
        f"{'bytes: node':>12}{'rank':>7}"
    )
    for point in bench.points:
        row = bench.rows[point]
        closed = row["closed_s"] / row["step_s"] - 1
        sizes = "".join(
            f"{row['bytes_error'].get(level, 0):{width}.1%}" for level, width in (("node", 12), ("rank", 7))
        )
        shown = f"{point!s:38}{row['step_s']:9.4f}{len(row['rounds']):7}{row['spread']:7.0%}{row['simulated_s']:10.4f}"
        print(f"{shown}{row['error']:7.0%}{closed:7.0%}{sizes}{'  held out' if row['held_out'] else ''}")
    print("\nErrors of the step time")
    for name, figures in summary.items():
        if isinstance(figures, dict) and "median" in figures:
            print(
                f"{name:26} median {figures['median']:6.1%}  90% within {figures['p90']:6.1%}  worst "
                f"{figures['worst']:6.1%}  within 10%: {figures['within_10_percent']:4.0%} of {figures['of']}"
            )
    print(f"bytes of every level and point within {summary['bytes_worst']:.1%} of the model")
    print(f"from {summary['rounds'][0]} to {summary['rounds'][1]} rounds a point")
    print("\nparallel=auto by the model alone, beside the fastest that was measured; and by trials")
    for row in summary["auto"]:
        alone = f"{row['slower']:+.1%}" if "slower" in row else "not measured"
        tried = f"{row['trials']}: {row['by_trial']}, {row['by_trial_slower']:+.1%}" if "by_trial" in row else "-"
        print(
            f"{row['chosen']:28} {alone:>12} of {row['fastest']:28} ({row['fastest_s']:.4f} s); trials of "
            f"{len(row['contenders'])}, {tried}"
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 400.0], help="Mbit/s between nodes")
    parser.add_argument("--rounds", type=int, default=3, help="over the grid, as many as there is time for")
    parser.add_argument("--budget-s", type=float, default=440.0, help="no further configuration is begun after this")
    parser.add_argument("--out", default=str(HERE / "results" / "cost_model.json"))
    parser.add_argument("--more", default="", help="a file written before, to which rounds are added")
    parser.add_argument("--read", default="", help="a file written before, to be judged again")
    args = parser.parse_args()
    bench = Bench(args.out, args.budget_s)
    if before := args.read or args.more:
        bench.read(before)
    if args.read:
        fitted = fit(bench)
    else:
        with Network(LEVELS) as network:
            world = World(network, Path(__file__).resolve())
            try:
                measure_grid(bench, world, args.rates, args.rounds)
                fitted = fit(bench)
                measure_trials(bench, world, fitted)
            finally:
                world.close()
    summary = judge(bench, fitted)
    bench.keep([{"kind": "summary", **summary}])
    print_tables(bench, summary)
    print(json.dumps({name: value for name, value in summary.items() if name != "machines"}))


if __name__ == "__main__":
    if "--rank" in sys.argv:
        slow_link_worker.main(Rank)
    else:
        main()
