"""Hangs: who is to blame, from what the ranks say and from real processes that stand still."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.watchdog import Limits, Watchdog, Watched, find_culprits
from trainer.pulse import Beat, Look, Pulse, Wait


def look(number: int = 5, waits: tuple[tuple[str, int], ...] = (), entered: dict[str, int] | None = None) -> Look:
    found = tuple(Wait(op="all_reduce", group=group, seq=seq, for_s=9.0) for group, seq in waits)
    return Look(beat=Beat("compute", 3, number, False, 0.0), age_s=9.0, stack="", waits=found, entered=entered or {})


def blamed(*looks: Look) -> list[int]:
    watched = [Watched(rank=rank, actor=None, node="here", node_id="here", pid=1) for rank in range(len(looks))]
    return [each.rank for each in find_culprits(watched, dict(enumerate(looks)))]


def test_who_has_not_entered_what_the_others_are_in() -> None:
    here, late = look(5, (("0", 8),), {"0": 8}), look(5, (), {"0": 7})
    assert blamed(here, late, here) == [1]
    # also where it waits in something else itself
    assert blamed(here, look(4, (("1", 2),), {"0": 7, "1": 2}), here) == [1]
    # and a rank that is not in a group is not missed there
    assert blamed(look(5, (("3", 2),), {"0": 7, "3": 2}), look(5, (("0", 8),), {"0": 8}), look(3, (), {"0": 7})) == [2]


def test_who_is_outside_or_behind() -> None:
    assert blamed(look(5), look(5, (("0", 8),), {"0": 8}), look(5, (("0", 8),), {"0": 8})) == [0]
    assert blamed(look(5), look(4), look(5)) == [1]
    assert blamed(look(5), look(5)) == []
    assert blamed(look(5)) == [0]


def test_what_may_take_long() -> None:
    pulse, seen = Pulse(), []
    for doing in (
        "data",
        "compute",
        "update",
        "data",
        "compute",
        "evaluation",
        "evaluation",
        "checkpoint",
        "checkpoint",
    ):
        pulse.beat(doing, 0)
        seen.append(pulse.read()[0].limit)
    assert seen == ["long", "long", "long", "usual", "usual", "long", "usual", "long", "long"]
    assert Pulse().read()[0].limit == "none"


STUCK = """
import datetime, os, sys, threading, torch, torch.distributed as dist
from trainer.pulse import Pulse
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
pulse, lock = Pulse(), threading.Lock()
dist.all_reduce(torch.ones(3))

def tell():
    sys.stdin.readline()
    seen = pulse.look()
    print(seen.beat, "|", seen.waits, "|", seen.entered, "|", "read_a_batch" in seen.stack, flush=True)
    os._exit(0)

def read_a_batch():
    lock.acquire()
    print("stuck", flush=True)
    lock.acquire()

threading.Thread(target=tell).start()
pulse.beat("data", 7)
if rank == 1:
    read_a_batch()
pulse.beat("compute", 7)
print("stuck", flush=True)
dist.all_reduce(torch.ones(3))
"""


def test_a_deadlock_is_told_from_those_who_wait(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STUCK, str(rank), tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "stuck\n"
        time.sleep(0.2)  # from the print into the collective
        told = [rank.communicate("\n", timeout=30)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert told[0].startswith("compute of step 7 | (Wait(op='all_reduce', group='0', seq=2,") and "{'0': 2}" in told[0]
    assert told[1].startswith("reading data of step 7 | () | {'0': 1} | True")


class Beating:
    """A rank without a training: its ``control`` thread answers as a worker's does."""

    def __init__(self) -> None:
        self.pulse_ = Pulse()

    def pid(self) -> int:
        return os.getpid()

    def beat(self, doing: str, times: int) -> None:
        for _ in range(times):
            self.pulse_.beat(doing, 1)

    def pulse(self) -> tuple[Beat, float]:
        return self.pulse_.read()

    def look(self) -> Look:
        return self.pulse_.look()


@pytest.mark.ray
@pytest.mark.timed
def test_a_stopped_process_and_one_that_stands_still_are_found_in_time() -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        kind = ray.remote(num_cpus=0, concurrency_groups={"control": 1})(Beating)
        actors = [kind.remote() for _ in range(2)]
        pids = ray.get([actor.pid.remote() for actor in actors])
        processes = [psutil.Process(pid) for pid in pids]
        node = ray.get_runtime_context().get_node_id()
        watched = [
            Watched(rank=rank, actor=actor, node="here", node_id=node, pid=pids[rank])
            for rank, actor in enumerate(actors)
        ]

        def find(timeout_s: float) -> tuple[dict, float]:
            watchdog, began = Watchdog(watched, Limits(timeout_s, 60)), time.monotonic()
            while not (found := watchdog.look()) and time.monotonic() < began + 30:
                time.sleep(0.05)
            return found, time.monotonic() - began

        os.kill(pids[1], signal.SIGSTOP)
        found, took_s = find(4.0)
        assert list(found) == [1] and 2 < took_s < 4
        assert found[1].kind == "hang" and "is stopped (SIGSTOP): its stack cannot be taken" in found[1].cause
        os.kill(pids[1], signal.SIGCONT)
        ray.get([actors[0].beat.remote("data", 3), actors[1].beat.remote("data", 2)])
        found, took_s = find(4.0)
        assert list(found) == [1] and 2 < took_s < 4
        assert "it stands still in reading data of step 1" in found[1].cause, found[1].cause
        assert Watchdog(watched, Limits(0, 60)).look() == {}
    finally:
        ray.shutdown()
    assert psutil.wait_procs(processes, timeout=10)[1] == []
