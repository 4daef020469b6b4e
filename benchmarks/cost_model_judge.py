"""How well the cost model tells what `cost_model` measured: the machines corrected, every step predicted, what
``parallel=auto`` would have taken."""

import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.cost_model_grid import (  # noqa: E402
    ACCUMULATION,
    LEVELS,
    PLACEMENTS,
    QUANTIZE,
    Point,
    Row,
    described,
    held_out,
    mesh,
    problem,
    say,
)
from benchmarks.cost_model_results import CORES, Results  # noqa: E402
from parallel import ParallelOptions, Placement  # noqa: E402
from parallel.planning.calibrate import Run, calibrate  # noqa: E402
from parallel.planning.choose import MEASURED, choose  # noqa: E402
from parallel.planning.cost import estimate, traffic_of  # noqa: E402
from parallel.planning.machine import Machine  # noqa: E402
from parallel.planning.simulate import simulate  # noqa: E402
from trainer import trial  # noqa: E402


def fit(results: Results) -> dict[float, Machine]:
    """The machine at each rate, corrected by what is not held out."""
    fitted, started = {}, time.monotonic()
    with ProcessPoolExecutor(len(CORES), multiprocessing.get_context("fork")) as pool:
        for rate, measured in results.machines.items():
            points = [point for point in results.points if point.rate == rate and not held_out(point)]
            runs = [Run(*problem(point), results.rows[point]["step_s"]) for point in points]
            fitted[rate] = calibrate(described(rate, measured), runs, within=8.0, each=pool.map)
    say(f"fitted in {time.monotonic() - started:.0f} s")
    return fitted


def judge(results: Results, fitted: dict[float, Machine]) -> Row:
    """Predict and compare; the summary. Rows get their prediction."""
    found: list[Row] = []
    for rate, measured in results.machines.items():
        points = [point for point in results.points if point.rate == rate]
        base = described(rate, measured)
        for point in points:
            row, (work, plan) = results.rows[point], problem(point)
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
    summary["auto"] = [judge_choice(results, fitted, asked) for asked in questions(fitted)]
    summary["machines"] = {f"{rate:g}": machine.to_mapping() for rate, machine in fitted.items()}
    return summary


@dataclass(frozen=True)
class Question:
    """What ``parallel=auto`` is asked: a rate, an accumulation, and which quantizations are allowed."""

    rate: float
    accumulation: int
    allowed: tuple[str, ...]

    def measured(self, results: Results) -> list[Point]:
        """The points that would be an answer."""
        key = self.rate, self.accumulation, True
        return [
            p for p in results.points
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


def judge_choice(results: Results, fitted: dict[float, Machine], asked: Question) -> Row:
    """What ``parallel=auto`` takes, by the model alone and by trials, beside the fastest of what was measured."""
    measured, taken = asked.measured(results), contenders(fitted, asked)
    fastest = min(measured, key=lambda p: float(results.rows[p]["step_s"]))
    row: Row = {
        **vars(asked), "contenders": list(map(str, taken)), "chosen": str(taken[0]), "fastest": str(fastest),
        "fastest_s": results.rows[fastest]["step_s"],
    }  # fmt: skip
    if taken[0] in measured:
        row["chosen_s"] = results.rows[taken[0]]["step_s"]
        row["slower"] = row["chosen_s"] / row["fastest_s"] - 1
    if all(results.rows.get(p, {}).get("trials") and p in measured for p in taken):
        by_name, rounds = {str(p): p for p in taken}, Counter[str]()

        def figures(name: str) -> list[float]:
            rounds[name] += 1
            trials = results.rows[by_name[name]]["trials"]
            steps = trials[min(rounds[name], len(trials)) - 1]["steps_s"]
            halves = steps[: (len(steps) + 1) // 2], steps[(len(steps) + 1) // 2 :]
            return [statistics.fmean(half) for half in halves if half]

        best, _ = trial.fastest(list(by_name), figures)
        slower = results.rows[by_name[best]]["step_s"] / row["fastest_s"] - 1
        row |= {"by_trial": best, "by_trial_slower": slower, "trials": sum(rounds.values())}
    return row


def spread(errors: list[float]) -> dict[str, float]:
    sizes = sorted(map(abs, errors))
    within = sum(size <= 0.1 for size in sizes) / len(sizes)
    figures = {"median": statistics.median(sizes), "p90": sizes[math.ceil(0.9 * len(sizes)) - 1], "worst": sizes[-1]}
    return {name: round(size, 4) for name, size in {**figures, "within_10_percent": within}.items()} | {
        "of": len(sizes)
    }


def print_tables(results: Results, summary: Row) -> None:
    print("Seconds a step: median of the rounds, how far they lie apart, simulated with the machine corrected by the")
    print("points that are not held out, error, that of the closed form; bytes a rank beside the model's")
    print(
        f"{'Mbit/s placement':38}{'measured':>9}{'rounds':>7}{'apart':>7}{'simulated':>10}{'':>7}{'closed':>7}"
        f"{'bytes: node':>12}{'rank':>7}"
    )
    for point in results.points:
        row = results.rows[point]
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
