"""States that go where there is room with an update: the bits are those of states that stay, and no version changes."""

import random
from collections.abc import Iterator

import pytest
import torch

from offload.hostpool import HostPool
from offload.shard import Run, Shard, Terms
from offload.state import Destination
from offload.states import AdamW, AwayStates

SIZES = (1_000, 70_001, 333)
OPTIMIZER = AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


class Slots:
    """Two places for versions, of which one is given away at a time; surface of `Movable.room`."""

    def __init__(self, states: AwayStates) -> None:
        movable = states.movable(states.shards)
        self._slots = [[torch.full_like(tensor, float("nan")) for _, tensor in movable.extents] for _ in range(2)]
        self._open: int | None = None
        self._next = 0
        self.asked = 0
        movable.room = self._room

    def _room(self, wait: bool) -> Destination | None:
        self.asked += 1
        return None if self._open is None else self._slots[self._open]

    def open(self, wanted: bool) -> None:
        self._open = self._next if wanted else None

    def hand_over(self) -> list[torch.Tensor]:
        """The slot is a snapshot's now, and the other one is given away next."""
        assert self._open is not None
        taken, self._open, self._next = self._slots[self._open], None, 1 - self._next
        return taken


def states_of(update: str) -> AwayStates:
    pool = HostPool(1)
    states = AwayStates(OPTIMIZER, device=torch.device("cpu"), pool=pool)
    states.add(
        Shard(
            numel=n, dtype=torch.float32, on_nvme=False, pingpong=update == "speculated" and i != 0,
            weights_first=update == "weights first" and i != 1,
        )
        for i, n in enumerate(SIZES)
    )  # fmt: skip
    states.allocate()
    for shard in states.shards:
        shard.target = torch.zeros(shard.numel)
    for number, (shard, tensor) in enumerate((s, t) for s in states.shards for t in s.state):
        tensor.copy_(torch.rand(shard.numel, generator=torch.Generator().manual_seed(number)))
    return states


@pytest.fixture(params=["just in time", "weights first", "speculated"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[AwayStates, AwayStates]]:
    pair = states_of(request.param), states_of(request.param)
    yield pair
    for states in pair:
        states.close()
        states.pool.close()


def step(states: AwayStates, number: int, scale: float, guess: bool) -> None:
    work = []
    states.expect()
    for i, shard in enumerate(states.shards):
        runs = (Run(0, shard.numel // 2, True), Run(shard.numel // 2 + 5, shard.numel, False))  # five keep their states
        terms = Terms(1e-2, number, runs)
        generator = torch.Generator().manual_seed(100 * number + i)
        states.take(shard, torch.randn(shard.numel, generator=generator))
        if guess:
            states.guess(shard, terms)
        work.append((shard, terms))
    for update in states.update(work, scale=torch.tensor(scale)):
        update.finish()


def contents(states: AwayStates) -> list[torch.Tensor]:
    states.settle()
    return [tensor.clone() for shard in states.shards for tensor in (*shard.state, shard.target)]


@pytest.mark.parametrize("seed", range(4))
def test_where_states_go_changes_no_bit_and_no_version_changes(pair: tuple[AwayStates, AwayStates], seed: int) -> None:
    staying, moving = pair
    chance, slots = random.Random(seed), Slots(moving)
    kept: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    for number in range(1, 25):
        slots.open(chance.random() < 0.6)
        scale, guess = chance.choice((1.0, 1.0, 0.3)), chance.random() < 0.8
        step(staying, number, scale, guess)
        if chance.random() < 0.3:  # the room is known, or lost, between what is speculated and the update
            slots.open(chance.random() < 0.5)
        step(moving, number, scale, guess)
        assert all(map(torch.equal, contents(moving), contents(staying))), number
        for taken, then in kept[-1:]:
            assert all(map(torch.equal, taken, then)), number
        if slots._open is not None and chance.random() < 0.7:
            taken = slots.hand_over()
            kept.append((taken, [tensor.clone() for tensor in taken]))
    assert len(kept) > 4 and slots.asked


def test_all_states_are_in_the_slot_that_is_handed_over(pair: tuple[AwayStates, AwayStates]) -> None:
    _, moving = pair
    slots = Slots(moving)
    for number in range(1, 6):
        slots.open(wanted=number % 2 == 1)
        step(moving, number, 1.0, guess=True)
        moving.settle()
        if number % 2:
            states = [tensor.data_ptr() for shard in moving.shards for tensor in shard.state]
            assert states == [tensor.data_ptr() for tensor in slots.hand_over()]
