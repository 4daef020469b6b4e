"""States away from the device: who walks them comes after all that updates have begun."""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from offload.hostpool import HostPool
from offload.shard import CHUNK, Run, Shard, Terms
from offload.states import AdamW, AwayStates

OPTIMIZER = AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
NUMEL = 6 * CHUNK


def late(store: Any, delay_s: float) -> Any:
    """What a store answers, `delay_s` after it is done: a slow drive."""

    def stored(offset: int, values: torch.Tensor) -> "Future[torch.Tensor]":
        answer: Future[torch.Tensor] = Future()
        done = store(offset, values)
        threading.Timer(delay_s, lambda: answer.set_result(done.result())).start()
        return answer

    return stored


def test_a_walk_waits_for_what_the_last_update_stores(tmp_path: Path) -> None:
    """Two updates, the second asked for while the first still stores: the ring of buffers is whole before a walk."""
    pool = HostPool(1)
    states = AwayStates(OPTIMIZER, device=torch.device("cpu"), pool=pool, nvme_folders=[tmp_path])
    states.add([Shard(numel=NUMEL, dtype=torch.float32, on_nvme=True, pingpong=False)])
    states.allocate()
    try:
        (shard,) = states.shards
        shard.target = torch.zeros(NUMEL)
        for _, state in states.walk([shard], write=True):
            for tensor in state:
                tensor.zero_()
        assert states._tier is not None
        states._tier.store = late(states._tier.store, 0.2)  # type: ignore[method-assign]
        for number in (1, 2):
            states.take(shard, torch.ones(NUMEL))
            for update in states.update([(shard, Terms(1e-2, number, (Run(0, NUMEL, True),)))], scale=None):
                update.finish()
        states.settle()
        walked = [master.clone() for _, (master, _, _) in states.walk([shard], write=False)]
        assert torch.equal(torch.cat(walked), shard.target)
    finally:
        states.close()
        pool.close()
