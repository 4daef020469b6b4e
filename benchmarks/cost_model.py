"""How well the cost model tells a step's seconds and bytes: a grid of measured steps, a third of it never fitted to.

    sudo python benchmarks/cost_model.py [--rates 100 400] [--rounds 3] [--budget-s 440] [--out FILE]
    sudo python benchmarks/cost_model.py --more FILE...  # adds rounds to what was measured before
    sudo python benchmarks/cost_model.py --read FILE...  # fits and judges again what was measured before

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__" and "--rank" in sys.argv:  # a rank: before the imports that take seconds
    from benchmarks.namespaces import die_with

    die_with(int(sys.argv[1]))

import os

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the steps run on CPUs: `links` must not describe a GPU beside them

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from typing import Any

HERE = Path(__file__).resolve().parent

import torch  # noqa: E402

from benchmarks import links, slow_link_worker  # noqa: E402
from benchmarks.cost_model_grid import (  # noqa: E402
    LEVELS,
    TOKENS,
    Layers,
    Point,
    Row,
    batch,
    described,
    grid,
    mesh,
    problem,
    say,
    work_of,
)
from benchmarks.cost_model_judge import contenders, fit, judge, print_tables, questions  # noqa: E402
from benchmarks.cost_model_results import CORES, Results, over_rounds  # noqa: E402
from benchmarks.namespaces import Network  # noqa: E402
from benchmarks.slow_link import World  # noqa: E402
from benchmarks.slow_link_engines import Atoll, Job  # noqa: E402
from parallel.planning.machine import Machine  # noqa: E402
from parallel.planning.simulate import simulate  # noqa: E402
from trainer import trial  # noqa: E402

SECONDS, MOST_STEPS = 0.2, 8
"""Of a round and a point: about so long, one step at least; one more before them is not counted."""
TRIAL_STEPS = 5
"""``auto_steps`` of conf/parallel/auto.yaml."""
FRESH = 2
"""Builds that a set of ranks serves: ranks age, after thirty builds the same step takes 1.3 to 1.7 times as long."""
HEADER = 66
"""Bytes of Ethernet, IPv4 and TCP with timestamps before the payload of a packet, as the interfaces count packets."""


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


class Bench:
    """Measures points, for so long; what came of it is in `results`."""

    def __init__(self, results: Results, budget_s: float) -> None:
        self.results, self.started, self.budget_s = results, time.monotonic(), budget_s

    def over(self) -> bool:
        return time.monotonic() - self.started > self.budget_s

    def describe_machine(self, world: World, rate: float) -> None:
        world.network.set_rates({"node": rate})
        world.generation += 1
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/machine.json"
            world.do(120, do="links", generation=world.generation, seconds=0.3, out=out)
            self.results.machines[rate] = json.loads(Path(out).read_text())
        self.results.keep()

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
            row = self.results.rows.setdefault(point, {**vars(point), "rounds": []})
            row.setdefault(kind, []).append(self._round(world, point, 1 + self.num_steps(point, kind)))
            if kind == "rounds":
                row |= over_rounds(row["rounds"])
        world.do(60, do="drop")
        self.results.keep()

    def num_steps(self, point: Point, kind: str) -> int:
        """By what the machine as described leads to expect."""
        expected_s = simulate(*problem(point), described(point.rate, self.results.machines[point.rate])).step_s
        if kind == "trials":
            return max(TRIAL_STEPS, math.ceil(trial.SECONDS / expected_s))
        return min(MOST_STEPS, max(1, round(SECONDS / expected_s)))

    def _round(self, world: World, point: Point, count: int) -> Row:
        """Seconds of steps but the first of `count`, bytes of payload a rank and step by level, and the part of the
        cores that others took."""
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
        if rate not in bench.results.machines:
            bench.describe_machine(world, rate)
    say(f"links measured after {time.monotonic() - bench.started:.0f} s")
    for number in range(bench.results.rounds_before, bench.results.rounds_before + rounds):
        if not measure_round(bench, world, grid(rates), number, "rounds"):
            say(f"round {number} ends early: more than --budget-s={bench.budget_s:g}")
            break
        say(f"round {number} measured after {time.monotonic() - bench.started:.0f} s")


def measure_round(bench: Bench, world: World, points: list[Point], number: int, kind: str) -> bool:
    """Every second one in reverse order. Returns whether there was time for all; those with the fewest rounds are the
    first."""
    builds = by_build(points)[:: 1 if number % 2 == 0 else -1]
    builds.sort(key=lambda build: len(bench.results.rows.get(build[0], {}).get(kind, [])))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 400.0], help="Mbit/s between nodes")
    parser.add_argument("--rounds", type=int, default=3, help="over the grid, as many as there is time for")
    parser.add_argument("--budget-s", type=float, default=440.0, help="no further configuration is begun after this")
    parser.add_argument("--out", default=str(HERE / "results" / "cost_model.json"))
    parser.add_argument("--more", nargs="+", metavar="FILE", help="files written before, to which rounds are added")
    parser.add_argument("--read", nargs="+", metavar="FILE", help="files written before, to be judged again")
    args = parser.parse_args()
    results = Results(args.out)
    if before := args.read or args.more:
        results.read(before)
    if args.read:
        fitted = fit(results)
    else:
        with Network(LEVELS) as network:
            world, bench = World(network, Path(__file__).resolve()), Bench(results, args.budget_s)
            try:
                measure_grid(bench, world, args.rates, args.rounds)
                fitted = fit(results)
                measure_trials(bench, world, fitted)
            finally:
                world.close()
    summary = judge(results, fitted)
    results.keep([{"kind": "summary", **summary}])
    print_tables(results, summary)
    print(json.dumps({name: value for name, value in summary.items() if name != "machines"}))


if __name__ == "__main__":
    if "--rank" in sys.argv:
        slow_link_worker.main(Rank)
    else:
        main()
