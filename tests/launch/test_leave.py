"""Getting out of a collective whose other side does not come."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from launch.leave import WayOut

WORLD = 3


def groups() -> list["dist.ProcessGroupGloo"]:
    """All ranks of a group, in this process: they talk through sockets all the same."""
    store, found = dist.HashStore(), [None] * WORLD

    def join(rank: int) -> None:
        found[rank] = dist.ProcessGroupGloo(store, rank, WORLD, timedelta(seconds=60))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.timed
def test_who_waits_in_a_collective_gets_out_at_once() -> None:
    others = groups()  # older than the way out: not to be touched
    way_out = WayOut()
    mine = groups()
    waiting = [mine[rank].allreduce([torch.ones(10)]) for rank in range(WORLD - 1)]  # the last rank does not come
    time.sleep(0.2)
    assert not any(work.is_completed() for work in waiting)
    began = time.monotonic()
    assert way_out.break_connections() > 0
    for work in waiting:
        with pytest.raises(RuntimeError, match="(?i)gloo|connection"):
            work.wait()
    assert time.monotonic() - began < 5
    with pytest.raises(RuntimeError):
        mine[0].allreduce([torch.ones(10)]).wait()
    works = [others[rank].allreduce([torch.ones(10)]) for rank in range(WORLD)]
    for work in works:
        work.wait()
