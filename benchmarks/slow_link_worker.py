"""One rank of the slow-link benchmark: does what the driver says, a JSON object a line in, one out.

    {"do": "build", "job": "linear", "engine": "hsdp", "overlap": true, "generation": 3}
    {"do": "check"}                                   trains a few steps; the losses beside a plain loop's
    {"do": "time", "accumulation": 4, "steps": 2}     between two barriers, nothing left under way
    {"do": "drop"}                                    the engine and its process group
    {"do": "renew"}                                   the rank: a new process, with nothing of what was

An answer is ``{"ok": ...}`` or ``{"error": ...}``. Standard output belongs to the libraries, so answers have a file
descriptor of their own. The process ends with the one that started it. What it has imported it keeps: each rank is a
fork of it.
"""

import argparse
import gc
import itertools
import json
import os
import resource
import sys
import time
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.namespaces import die_with  # noqa: E402

if __name__ == "__main__":  # before the imports that take seconds
    die_with(int(sys.argv[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.slow_link_engines import ENGINES, JOBS, OPTIMIZER, Side  # noqa: E402
from parallel import foreign  # noqa: E402

RENEW = 75
"""The exit code of a rank that is to be followed by a new one."""
CHECK = (1, 1, 2, 2)
"""Micro-batches a rank of the steps whose losses are compared."""


@cache
def plain_losses(job_name: str, world: int) -> list[float]:
    """The mean loss of each step of CHECK, by one process that takes every rank's micro-batches."""
    job = JOBS[job_name]
    model = job.build()
    optimizer = foreign.build_optimizer(foreign.decay_groups(model.parameters(), OPTIMIZER), OPTIMIZER)
    losses = []
    for step, num in enumerate(CHECK):
        total = 0.0
        for rank in range(world):
            for index in range(num):
                loss = model(*job.micro_batch(step, rank, index)) / (world * num)
                loss.backward()
                total += float(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


class Rank:
    def __init__(self, rank: int, world: int, address: str, port: int) -> None:
        self.rank, self.world = rank, world
        self._store = dist.TCPStore(address, port, world, is_master=rank == 0, timeout=timedelta(seconds=120))
        self._side: Side | None = None
        self._steps_taken = 0

    def answer(self, answers: TextIO) -> None:
        """Do what standard input says until it says ``renew`` or ends."""
        print(json.dumps({"ok": {"pid": os.getpid()}}), file=answers, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            if (act := command.pop("do")) == "renew":
                os._exit(RENEW)
            try:
                answer = {"ok": getattr(self, act)(**command)}
            except Exception as error:  # the driver decides; the other ranks may be waiting for this one
                answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)

    def build(self, job: str, engine: str, overlap: bool, levels: dict[str, int], generation: int) -> dict[str, Any]:
        self._join(generation)
        self._job_name, self._job, self._steps_taken = job, JOBS[job], 0
        model = self._job.build()
        model_bytes = 4 * sum(param.numel() for param in model.parameters())
        self._side = ENGINES[engine].build(model, levels, overlap)
        return {"model_bytes": model_bytes}

    def check(self) -> dict[str, Any]:
        """This rank's mean losses; rank 0 also gives the plain loop's. And what the optimizer now holds."""
        assert self._side is not None
        losses = [self._step(num) for num in CHECK]
        self._side.settle()
        plain = plain_losses(self._job_name, self.world) if self.rank == 0 else []
        return {"losses": losses, "plain": plain, "optimizer_bytes": self._side.optimizer_bytes()}

    def time(self, accumulation: int, steps: int) -> dict[str, Any]:
        assert self._side is not None
        dist.barrier()
        start, seconds = time.perf_counter(), []
        for _ in range(steps):
            before = time.perf_counter()
            self._step(accumulation)
            seconds.append(time.perf_counter() - before)
        self._side.settle()
        dist.barrier()
        return {"total_s": time.perf_counter() - start, "steps_s": seconds}

    def drop(self) -> dict[str, Any]:
        self._side = None
        gc.collect()
        dist.destroy_process_group()
        return {}

    def _join(self, generation: int) -> None:
        """A process group of its own for everything that is built."""
        store = dist.PrefixStore(str(generation), self._store)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.world, timeout=timedelta(minutes=10)
        )

    def _step(self, num: int) -> float:
        assert self._side is not None
        batches = [self._job.micro_batch(self._steps_taken, self.rank, index) for index in range(num)]
        self._steps_taken += 1
        losses = [self._side.micro_batch(inputs, index=index, num=num) for index, inputs in enumerate(batches)]
        self._side.update()
        return sum(float(loss) for loss in losses) / num


def main(kind: type[Rank] = Rank) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", type=int, help="process id of the driver")
    for name in ("rank", "world", "port", "answers"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--address", required=True, help="of rank 0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)  # many pairs
    here = os.getpid()
    for count in itertools.count():
        if (child := os.fork()) == 0:  # no thread has been started yet
            die_with(here)
            with os.fdopen(args.answers, "w") as answers:  # a port of its own: the ranks do not renew all at once
                kind(args.rank, args.world, args.address, args.port + count).answer(answers)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != RENEW:
            return


if __name__ == "__main__":
    main()
