"""States away from the device: who walks them comes after all that updates have begun, and gradients on their way are
few."""

import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import arena
from offload import states as states_module
from offload.hostpool import HostPool
from offload.shard import LEAVING, RING, Run, Shard, Terms
from offload.states import AdamW, AwayStates

OPTIMIZER = AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
NUMEL = 1000


class HeldStores:
    """What stores answer comes when it is let go: a slow drive."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._held: queue.SimpleQueue[tuple[Future[torch.Tensor], Future[torch.Tensor]]] = queue.SimpleQueue()

    def __call__(self, offset: int, values: torch.Tensor) -> "Future[torch.Tensor]":
        answer: Future[torch.Tensor] = Future()
        self._held.put((answer, self._store(offset, values)))
        return answer

    def let_go(self, count: int) -> None:
        """Of the next so many."""
        for answer, stored in [self._held.get(timeout=10) for _ in range(count)]:
            answer.set_result(stored.result())


def test_a_walk_waits_for_what_the_last_update_stores(tmp_path: Path) -> None:
    """Two updates, the second asked for while the first still stores: the ring of buffers is whole before a walk."""
    pool = HostPool(1)
    states = AwayStates(OPTIMIZER, device=torch.device("cpu"), pool=pool, nvme_folders=[tmp_path])
    states.add(Shard(numel=NUMEL, dtype=torch.float32, on_nvme=True, pingpong=False) for _ in range(RING))
    states.allocate()
    try:
        for shard in states.shards:
            shard.target = torch.zeros(NUMEL)
        for _, state, _ in states.walk(states.shards, write=True):
            for tensor in state:
                tensor.zero_()
        assert states._on_drives is not None
        tier = states._on_drives.tier
        held = tier.store = HeldStores(tier.store)  # type: ignore[assignment, method-assign]
        for number in (1, 2):
            for shard in states.shards:
                states.take(shard, torch.ones(NUMEL))
            terms = Terms(1e-2, number, (Run(0, NUMEL, True),))
            updates = states.update([(shard, terms) for shard in states.shards], scale=None)
            if number == 2:
                held.let_go(RING)  # of the first
            for update in updates:
                update.finish()
        with ThreadPoolExecutor(1) as settling:
            settled = settling.submit(states.settle)
            early, _ = wait([settled], timeout=0.5)
            held.let_go(RING)
            settled.result(timeout=10)
        assert not early
        walked = [master.clone() for _, (master, _, _), _ in states.walk(states.shards, write=False)]
        assert all(torch.equal(master, shard.target) for master, shard in zip(walked, states.shards, strict=True))
    finally:
        states.close()
        pool.close()


@pytest.mark.parametrize("write", [False, True])
def test_after_a_walk_that_was_given_up_another_finds_all(tmp_path: Path, write: bool) -> None:
    """As of a checkpoint whose storage is full: every buffer is free again, and states are as they were."""
    pool = HostPool(1)
    states = AwayStates(OPTIMIZER, device=torch.device("cpu"), pool=pool, nvme_folders=[tmp_path])
    states.add(Shard(numel=NUMEL, dtype=torch.float32, on_nvme=True, pingpong=False) for _ in range(2 * RING))
    states.allocate()
    try:
        for number, (_, state, _) in enumerate(states.walk(states.shards, write=True)):
            for tensor in state:
                tensor.fill_(number)
        given_up = states.walk(states.shards, write=write)
        for _ in range(3):
            next(given_up)
        given_up.close()  # type: ignore[attr-defined]
        found = [state[0][0].item() for _, state, _ in states.walk(states.shards, write=False)]
        assert found == list(range(2 * RING))
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


def updated(pool: HostPool, **kind: bool) -> tuple[AwayStates, Shard, Terms]:
    """One shard of a kind in host memory, after an update."""
    states = AwayStates(OPTIMIZER, device=torch.device("cpu"), pool=pool)
    states.add([Shard(numel=NUMEL, dtype=torch.float32, on_nvme=False, **kind)])
    states.allocate()
    (shard,) = states.shards
    shard.target = torch.zeros(NUMEL)
    terms = Terms(1e-2, 1, (Run(0, NUMEL, True),))
    states.take(shard, torch.ones(NUMEL))
    for update in states.update([(shard, terms)], scale=None):
        update.finish()
    return states, shard, terms


def settles(states: AwayStates) -> bool:
    """Whether it does, soon."""
    settling = threading.Thread(target=states.settle, daemon=True)
    settling.start()
    settling.join(timeout=5)
    return not settling.is_alive()


def test_who_reads_states_waits_for_no_guess() -> None:
    """A snapshot of states that stand still is copied beside the backward, which guesses all the while."""
    pool, go = HostPool(1), threading.Event()
    states, shard, terms = updated(pool, pingpong=True)
    try:
        states.movable([shard]).room = lambda wait: go.wait() and None
        states.take(shard, torch.ones(NUMEL))
        states.guess(shard, terms)
        assert settles(states)
    finally:
        go.set()
        states.close()
        pool.close()


def test_who_reads_states_is_not_left_waiting_when_they_are_closed() -> None:
    pool = HostPool(1)
    states, *_ = updated(pool, pingpong=True)
    states.close()
    pool.close()
    assert settles(states)


class StatesHeld(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_weights_come_first_and_the_next_gradient_beside_the_states(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """And where making the states fails, who reads them, and who waits for the next update, is told."""
    pool, go = HostPool(1), threading.Event()
    states, shard, terms = updated(pool, weights_first=True)
    adamw, seen = states_module.adamw, []

    def held(*tensors: torch.Tensor | None, **options: Any) -> None:
        if not options["weight_alone"]:
            assert go.wait(20)
            if fails:
                raise StatesHeld
            seen.append(tensors[3].clone())  # the gradient
        adamw(*tensors, **options)

    try:
        states.settle()
        monkeypatch.setattr(states_module, "adamw", held)
        states.take(shard, torch.ones(NUMEL))
        before, weights = [tensor.clone() for tensor in shard.state], shard.target.clone()
        (update,) = states.update([(shard, replace(terms, updates=2))], scale=torch.tensor(0.5))
        update.finish()
        assert not torch.equal(shard.target, weights) and all(map(torch.equal, shard.state, before))
        after = shard.target.clone()
        states.take(shard, torch.full((NUMEL,), 2.0))
        (update,) = states.update([(shard, replace(terms, updates=3))], scale=None)
        go.set()
        if fails:
            for wait_for in (update.finish, states.settle):
                with pytest.raises(StatesHeld):
                    wait_for()
            return
        states.settle()
        assert torch.equal(shard.state[0], shard.target) and not torch.equal(shard.target, after)
        assert [gradient[0] for gradient in seen] == [1, 2]
    finally:
        go.set()
        states.close()
        pool.close()


def drive_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("drive-")]


@pytest.mark.parametrize("short", ["drive", "ring", "slots"])
def test_where_there_is_too_little_nothing_stays_taken(
    disk_folder: Path, monkeypatch: pytest.MonkeyPatch, short: str
) -> None:
    """Drives are asked first: the pages of memory take a while. What was taken is given back."""
    taken: list[bool] = []
    check = arena._check_memory

    def too_little(size_bytes: int) -> None:
        taken.append(True)
        if len(taken) == ("drive", "ring", "slots").index(short):
            raise arena.ArenaError(12, "too little memory")
        check(size_bytes)

    monkeypatch.setattr(arena, "_check_memory", too_little)
    with HostPool(1) as pool:
        states = AwayStates(OPTIMIZER, device=torch.device("cpu"), pool=pool, nvme_folders=[disk_folder])
        states.add([Shard(numel=1 << 50 if short == "drive" else NUMEL, dtype=torch.float32, on_nvme=True)])
        with pytest.raises(OSError, match="No space left" if short == "drive" else "too little memory"):
            states.allocate()
        assert len(taken) == ("drive", "ring", "slots").index(short) and drive_threads() == []


def test_memory_is_let_go_after_a_drive_that_failed(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HostPool(1) as pool:
        states = AwayStates(OPTIMIZER, device=torch.device("cpu"), pool=pool, nvme_folders=[disk_folder])
        states.add([Shard(numel=NUMEL, dtype=torch.float32, on_nvme=True)])
        states.allocate()
        assert states._on_drives is not None and states.arena is not None
        monkeypatch.setattr(states._on_drives.tier._drives[0], "write", None)
        states._on_drives.tier.store(0, states._on_drives._ring[0][:4096]).exception(timeout=10)
        with pytest.raises(OSError, match="a store to this tier failed before"):
            states.close()
        assert states.arena._closed and states._on_drives._arena._closed and drive_threads() == []
