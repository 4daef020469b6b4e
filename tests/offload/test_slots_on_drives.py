"""Slots that lie on drives beside their states: what is loaded is what was updated last, in little host memory."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import shard as shards_of
from offload.drive import DriveError, SystemCalls
from offload.hostpool import HostPool
from offload.shard import NEIGHBOURS, RING, Buffers, Run, Shard, Terms
from offload.states import AdamW, AwayStates

OPTIMIZER = AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
CHUNK, NUMEL, NUM = 3000, 10_000, 6


class Slow:
    """A system call that takes a while."""

    def __init__(self, call: Any, seconds: float) -> None:
        self._call, self._seconds = call, seconds

    def __call__(self, *arguments: Any) -> Any:
        time.sleep(self._seconds)
        return self._call(*arguments)


class Late:
    """Stands for the event of a gradient that is there late: whoever updates waits for it."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def synchronize(self) -> None:
        assert self.go.wait(20)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_of, "CHUNK", CHUNK)


def made(folder: Path, pool: HostPool, device: str, *, on_nvme: int, dtype: torch.dtype, numel: int) -> AwayStates:
    """The last `on_nvme` of `NUM` shards on drives, with their slots; all at a start that their weights show."""
    states = AwayStates(OPTIMIZER, device=torch.device(device), pool=pool, nvme_folders=[folder])
    states.add(
        Shard(numel=numel, dtype=dtype, on_nvme=number >= NUM - on_nvme, stays=True, slot_follows=True)
        for number in range(NUM)
    )
    states.allocate()
    start = 0
    for _, (master, *moments), weight in states.walk(states.shards, write=True):
        master.copy_(torch.arange(start, start + master.numel()) % 97 / 7)
        weight.copy_(master)
        for moment in moments:
            moment.zero_()
        start += master.numel()
    return states


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(1) as threads:
        yield threads


def gradients(step: int, dtype: torch.dtype, numel: int = NUMEL) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(numel, generator=draw).to(dtype) for _ in range(NUM)]


def step_once(states: AwayStates, step: int, dtype: torch.dtype, device: str = "cpu", numel: int = NUMEL) -> None:
    for shard, grad in reversed(list(zip(states.shards, gradients(step, dtype, numel), strict=True))):
        states.take(shard, grad.to(device))
    scale = torch.tensor(0.5, device=device) if step % 2 else None
    terms = Terms(1e-2, step, (Run(0, numel // 3, True), Run(numel // 2, numel, False)))
    for update in states.update([(shard, terms) for shard in states.shards], scale=scale):
        update.finish()


def weights(states: AwayStates, device: str = "cpu") -> list[torch.Tensor]:
    """Asked for two ahead, as units do."""
    found, asked = [], []
    for number, shard in enumerate(states.shards):
        for ahead in states.shards[len(asked) : number + 3]:
            asked.append(states.fetch(ahead) if ahead.slot_on_nvme else None)
        place = torch.full((shard.numel,), torch.nan, dtype=shard.dtype, device=device)
        arrival = asked[number]
        if arrival is None:
            place.copy_(shard.slot)
        else:
            arrival.into(place)
        found.append(place)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_nvme", [1, 4, NUM])
def test_what_is_loaded_is_what_host_memory_would_hold(
    disk_folder: Path, pool: HostPool, small_chunks: None, on_nvme: int, dtype: torch.dtype
) -> None:
    """Updates with clipping and with elements that get none; weights asked for at once; states as they are walked."""
    states = [made(disk_folder, pool, "cpu", on_nvme=count, dtype=dtype, numel=NUMEL) for count in (0, on_nvme)]
    try:
        for number in range(1, 6):
            for one in states:
                step_once(one, number, dtype)
            there, here = (weights(one) for one in states)
            assert all(map(torch.equal, there, here)), number
        for one in states:
            one.settle()
        there, here = (
            [tensor.clone() for _, state, _ in one.walk(one.shards, write=False) for tensor in state] for one in states
        )
        for kind in range(3):
            assert torch.equal(torch.cat(there[kind::3]), torch.cat(here[kind::3]))
    finally:
        for one in states:
            one.close()


def test_an_update_is_answered_when_its_weights_can_be_loaded(
    disk_folder: Path, pool: HostPool, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although stores are slow, and the thread that updates is held up by the next shard's gradient."""
    monkeypatch.setattr("offload.nvme.SystemCalls", lambda: SystemCalls(pwritev=Slow(os.pwritev, 0.05)))
    states = made(disk_folder, pool, "cpu", on_nvme=NUM, dtype=torch.float32, numel=NUMEL)
    late = Late()
    try:
        before = weights(states)[0]
        for shard, grad in zip(states.shards, gradients(1, torch.float32), strict=True):
            states.take(shard, grad)
        states.shards[1].arrived = late  # type: ignore[assignment]
        terms = Terms(1e-2, 1, (Run(0, NUMEL, True),))
        updates = states.update([(shard, terms) for shard in states.shards], scale=None)
        updates[0].finish()
        found = torch.empty(NUMEL)
        states.fetch(states.shards[0]).into(found)
        late.go.set()
        for update in updates:
            update.finish()
        states.settle()
        masters = torch.cat([state[0] for _, state, _ in states.walk(states.shards[:1], write=False)])
        assert torch.equal(found, masters) and not torch.equal(found, before)
    finally:
        late.go.set()
        states.close()


def test_who_uses_weights_now_does_not_wait_for_those_who_come_later(
    disk_folder: Path, pool: HostPool, small_chunks: None
) -> None:
    """More is asked for ahead than there are pieces, and used in the opposite order."""
    states = made(disk_folder, pool, "cpu", on_nvme=NUM, dtype=torch.float32, numel=NUMEL)
    try:
        expected = weights(states)
        arrivals = [states.fetch(shard) for shard in states.shards]

        def backwards() -> list[torch.Tensor]:
            found = [torch.empty(NUMEL) for _ in arrivals]
            for arrival, place in reversed(list(zip(arrivals, found, strict=True))):
                arrival.into(place)
            return found

        with ThreadPoolExecutor(1) as other:
            assert all(map(torch.equal, other.submit(backwards).result(timeout=20), expected))
    finally:
        states.close()


def test_host_memory_is_of_two_shards_and_the_ring(disk_folder: Path, pool: HostPool, small_chunks: None) -> None:
    states = made(disk_folder, pool, "cpu", on_nvme=NUM, dtype=torch.bfloat16, numel=NUMEL)
    try:
        chunk, piece, pieces = 9 * 4096 + 2 * 4096, 2 * 4096, NEIGHBOURS * 4
        assert states.arena is None and states._on_drives is not None
        assert states._on_drives._arena.size_bytes == RING * chunk + 2 * pieces * piece == states.host_bytes
        assert Buffers.of(states.shards).num_pieces == pieces
        assert states.nvme_bytes == states._on_drives.tier.size_bytes < 1.25 * 14 * NUM * NUMEL
    finally:
        states.close()


def test_many_units_take_below_a_byte_a_parameter() -> None:
    """Of 40 as large as those of a model of 10 billion parameters; 14 bytes of each on drives."""
    units = [
        Shard(numel=250_000_000, dtype=torch.bfloat16, on_nvme=True, stays=True, slot_follows=True) for _ in range(40)
    ]
    numel = sum(unit.numel for unit in units)
    assert shards_of.host_bytes(units) / numel < 0.25
    assert shards_of.nvme_bytes(units) / numel == pytest.approx(14, rel=1e-3)


@pytest.mark.parametrize("act", ["pwritev", "preadv"])
def test_a_drive_that_fails_is_told_to_who_waits(
    disk_folder: Path, pool: HostPool, small_chunks: None, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """As gradients go or weights come, and nobody is left waiting for a piece."""
    armed = threading.Event()
    call = getattr(os, act)

    def fails(*arguments: Any) -> Any:
        if armed.is_set():
            raise OSError(5, os.strerror(5))
        return call(*arguments)

    monkeypatch.setattr("offload.nvme.SystemCalls", lambda: SystemCalls(**{act: fails}))
    states = made(disk_folder, pool, "cpu", on_nvme=NUM, dtype=torch.float32, numel=NUMEL)
    try:
        weights(states)
        armed.set()
        with pytest.raises(DriveError, match="Input/output error.*last checkpoint"):
            for number in (1, 2):
                step_once(states, number, torch.float32)
        with pytest.raises(DriveError, match="Input/output error"):
            weights(states)
    finally:
        if act == "pwritev":
            with pytest.raises(DriveError, match="a store to this tier failed before"):
                states.close()
        else:
            states.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("numel", [NUMEL, 1 << 20])
def test_streams_change_no_bit(disk_folder: Path, pool: HostPool, small_chunks: None, numel: int) -> None:
    """Gradients leave and weights come while the device computes, late, on buffers that are used again at once."""
    pairs = [("cpu", 0), ("cuda", NUM)]
    states = [
        made(disk_folder, pool, device, on_nvme=count, dtype=torch.bfloat16, numel=numel) for device, count in pairs
    ]
    try:
        for number in range(1, 5):
            torch.cuda._sleep(50_000_000)
            for one, (device, _) in zip(states, pairs, strict=True):
                step_once(one, number, torch.bfloat16, device, numel)
            torch.cuda._sleep(50_000_000)
            there, here = (weights(one, device) for one, (device, _) in zip(states, pairs, strict=True))
            assert all(torch.equal(a, b.cpu()) for a, b in zip(there, here, strict=True)), number
    finally:
        for one in states:
            one.close()
