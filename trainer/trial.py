"""Which of several placements is the fastest here: each trains a few steps, and its weights are thrown away.

A cost model tells steps apart that differ by more than its error; what is closer has to be measured. The candidates
are ``parallel.candidates``, which ``parallel=auto`` fills with what it cannot tell apart. What came of it is kept in
the run's folder, so that a resumed run goes on with the same placement, and bit by bit.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.options import ParallelOptions
from trainer.build import Rank
from trainer.job import Job
from trainer.loggers import replace_file

FILE = "placement.json"


def settle(
    job: Job, where: Rank, folder: Path, time_step: Callable[[ParallelOptions], float], say: Callable[[str], None]
) -> ParallelOptions:
    """The options of the fastest candidate: as kept in `folder`, or else by measuring. Collective.

    time_step: trains with these options for a while; seconds a step of the slowest rank, the same on every rank.
    """
    names = job.parallel.candidates
    asked = {"candidates": names, "workers": where.world, "levels": job.parallel.levels}
    known: list[Any] = [_kept(folder / FILE, asked) if where.rank == 0 else None]
    if where.world > 1:
        dist.broadcast_object_list(known, src=0)
    chosen = known[0]
    if chosen is None:
        times = {name: time_step(job.parallel.candidate(name)) for name in names}
        chosen = min(names, key=times.__getitem__)
        shown = ", ".join(f"{name} {1e3 * seconds:.4g} ms" for name, seconds in times.items())
        say(f"parallel.candidates, {job.parallel.auto_steps} steps of each: {shown}; taken: {chosen}")
        if where.rank == 0:
            found = asked | {"step_s": times, "chosen": chosen}
            replace_file(folder / FILE, json.dumps(found, indent=1) + "\n")
    else:
        say(f"parallel.candidates: {chosen}, as {folder / FILE} says; without that file they are tried again")
    return job.parallel.candidate(chosen)


def _kept(file: Path, asked: dict[str, Any]) -> str | None:
    """What was chosen of the same candidates among as many workers."""
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return str(found["chosen"]) if all(found.get(key) == value for key, value in asked.items()) else None
