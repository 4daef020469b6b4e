"""Which of several placements is the fastest here: each trains a few steps, and its weights are thrown away.

A cost model tells steps apart that differ by more than its error; what is closer has to be measured. The candidates
are ``parallel.candidates``, which ``parallel=auto`` fills with what it cannot tell apart. Those that one trial cannot
tell apart either have another, see `fastest`. What came of it is kept in the run's folder, so that a resumed run goes
on with the same placement, and bit by bit.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parallel.options import ParallelOptions
from trainer.build import Rank
from trainer.job import Job
from trainer.loggers import replace_file
from trainer.running import Running

FILE = "placement.json"
ROUNDS = 3
"""Trials that a candidate has at the most."""
ALIKE = 0.05
"""A difference that is worth no further trial."""
SECONDS = 0.5
"""That a trial trains at the least: rounds of a few short steps lie further apart than candidates."""


def settle(
    job: Job,
    where: Rank,
    folder: Path,
    time_steps: Callable[[ParallelOptions], list[float]],
    say: Callable[[str], None],
) -> ParallelOptions:
    """The options of the fastest candidate: as kept in `folder`, or else by measuring. Collective.

    time_steps: trains with these options for a while; seconds a step of the slowest rank, once or several times, the
        same on every rank.
    """
    names = job.parallel.candidates
    asked = {"candidates": names, "workers": where.world, "levels": job.parallel.levels}
    chosen = where.tell(_kept(folder / FILE, asked) if where.rank == 0 else None)
    if chosen is None:
        chosen, times = fastest(names, lambda name: time_steps(job.parallel.candidate(name)))
        shown = ", ".join(f"{name} {1e3 * seconds:.4g} ms" for name, seconds in times.items())
        say(f"parallel.candidates, {job.parallel.auto_steps} steps of each or more: {shown}; taken: {chosen}")
        if where.rank == 0:
            found = asked | {"step_s": times, "chosen": chosen}
            replace_file(folder / FILE, json.dumps(found, indent=1) + "\n")
    else:
        say(f"parallel.candidates: {chosen}, as {folder / FILE} says; without that file they are tried again")
    return job.parallel.candidate(chosen)


def fastest(names: Sequence[str], trial: Callable[[str], list[float]]) -> tuple[str, dict[str, float]]:
    """The candidate of the least median, and the medians by name.

    trial: figures of one trial of a candidate. All have one; those whose figures do not lie apart from the best one's
    by more than `ALIKE` have another, in the other direction, unless all their figures are within that: a machine that
    was slow for a while is so for all of them, and one that is quiet costs no trial more.
    """
    seen: dict[str, list[float]] = {name: [] for name in names}
    near = list(names)
    for _ in range(ROUNDS):
        for name in near:
            seen[name] += trial(name)
        medians = {name: statistics.median(figures) for name, figures in seen.items()}
        best = min(names, key=medians.__getitem__)
        near = [name for name in reversed(names) if min(seen[name]) <= (1 + ALIKE) * max(seen[best])]
        figures = [figure for name in near for figure in seen[name]]
        if len(near) == 1 or max(figures) <= (1 + ALIKE) * min(figures):
            break
    return best, medians


def timed(train_step: Callable[[int], Running], least: int, total: int, where: Rank) -> list[float]:
    """Seconds a step of the slowest rank, of the first half of the steps and of the second: `least` steps, or as many
    as take `SECONDS`, after two that are not counted: they compile, allocate and connect. Collective.

    total: steps that there are, to be gone through again and again.
    """

    def seconds(steps: range) -> float:
        start = time.perf_counter()
        for step in steps:
            last = train_step(step % total)
        last.wait()
        slowest: float = max(where.gather((time.perf_counter() - start) / len(steps)))
        return slowest

    seconds(range(1))
    count = max(least, math.ceil(SECONDS / seconds(range(1, 2))))
    middle, stop = 2 + (count + 1) // 2, 2 + count
    return [seconds(half) for half in (range(2, middle), range(middle, stop)) if half]


def _kept(file: Path, asked: dict[str, Any]) -> str | None:
    """What was chosen of the same candidates among as many workers."""
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return str(found["chosen"]) if all(found.get(key) == value for key, value in asked.items()) else None
