"""States away from the device: who walks them comes after all that updates have begun, and gradients on their way are
few."""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.hostpool import HostPool
from offload.shard import CHUNK, LEAVING, Run, Shard, Terms
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


@pytest.mark.gpu
def test_gradients_on_their_way_are_few_and_whole() -> None:
    """However late the copies are: the host is through with all of them before the first begins."""
    device, num = torch.device("cuda", torch.cuda.current_device()), 12
    pool = HostPool(1)
    states = AwayStates(OPTIMIZER, device=device, pool=pool)
    states.add([Shard(numel=1 << 22, dtype=torch.bfloat16, on_nvme=False, pingpong=False) for _ in range(num)])
    states.allocate()
    try:
        assert states._out is not None
        with torch.cuda.stream(states._out):
            torch.cuda._sleep(200_000_000)
        expected = [torch.full((1 << 22,), float(number), dtype=torch.bfloat16) for number in range(num)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["active_bytes.all.current"]
        for number, shard in enumerate(states.shards):
            gradient = torch.full((1 << 22,), float(number), dtype=torch.bfloat16, device=device)
            states.take(shard, gradient)
            del gradient
        held = torch.cuda.memory_stats()["active_bytes.all.peak"] - before
        assert held <= (LEAVING + 1) * expected[0].nbytes
        torch.cuda.synchronize()
        assert all(torch.equal(shard.slot, values) for shard, values in zip(states.shards, expected, strict=True))
    finally:
        states.close()
        pool.close()
