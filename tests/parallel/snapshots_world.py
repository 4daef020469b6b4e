"""Trains the toy of `worlds.py` with real snapshots, whose states in host memory are updated into them, and reads those
back: against a training without.

    python snapshots_world.py WORLD < cases.json

A case is as in `worlds.py`, and ``{"every": "1"}``.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from checkpoint.options import CheckpointOptions
from checkpoint.ranks import Ranks
from checkpoint.snapshots.process import local_roster
from checkpoint.snapshots.rank import Snapshots
from checkpoint.snapshots.reader import SnapshotReader
from checkpoint.snapshots.recovery import newest_snapshot
from checkpoint.snapshots.roster import Roster
from tests.parallel import worlds
from tests.parallel.worlds import STEPS, batch, build, gathered

SKIPPED = (3, 8, 9)
"""Steps that are not accepted."""
State = dict[tuple[str, str], torch.Tensor]


def train(engine, step: int, before_update: Callable[[], None]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    engine.expect(1e-2)
    rows = batch(step).chunk(world)[rank]
    engine.forward_backward(rows[:, :-1], rows[:, 1:], scale=1 / world, first=True, last=True)
    before_update()
    engine.step(1e-2, 0.5, lambda norm: step not in SKIPPED)


def without(case: dict) -> dict[int, State]:
    """By how many steps are done, the state."""
    engine, found = build(case), {}
    for step in range(STEPS):
        train(engine, step, lambda: None)
        found[step + 1] = gathered(engine)
    engine.close()
    return found


def read_newest(roster: Roster) -> tuple[int, State]:
    found = newest_snapshot(roster)
    assert found is not None
    reader = SnapshotReader(found, roster.token)
    state = {}
    for name in reader.names():
        for kind in reader.kinds(name):
            shape = torch.Size(reader.shape(name, kind))
            state[name, kind] = reader.read(name, kind, 0, shape.numel()).view(shape)
    reader.close()
    return found.step, state


def different(state: State, right: State) -> list[tuple[str, str]]:
    return [key for key in right.keys() | state.keys() if not torch.equal(state[key], right[key])]


def snapshots(case: dict) -> dict:
    """Every fourth step the newest snapshot is read, after the update that follows it."""
    rank, world, states = dist.get_rank(), dist.get_world_size(), case["offload"]["states"]
    ranks = Ranks(rank, world, dist.new_group(backend="gloo"))
    found = b"" if rank else local_roster(os.urandom(16), world, hold_s=60, say=print).dumps()
    roster = Roster.loads(ranks.tell(found))
    taken = Snapshots(roster, CheckpointOptions(snapshot_every_steps=case["every"]), ranks)
    right, wrong, read, newest = without(case), [], [], 0
    engine = build(case)
    taken.start(engine.pieces(), {}, {}, engine.movable())
    for step in range(STEPS):
        train(engine, step, taken.wait_copied)
        if newest and step % 4 == 3:
            taken.wait()
            dist.barrier()
            if rank == 0:
                found, state = read_newest(roster)
                read.append([found, newest])
                wrong += different(state, right[found])
            dist.barrier()
        if taken.due(step + 1):
            newest = step + 1
            pieces = engine.pieces if states == "host" else engine.pieces()
            taken.save(newest, pieces, {}, {}, background=states != "nvme")
    taken.wait()
    error, stats = taken.error(), taken.stats
    taken.close(dropped=True)  # the states may still lie there
    wrong += different(gathered(engine), right[STEPS])
    engine.close()
    sizes = {"copied": stats.copied_bytes, "state_bytes": stats.state_bytes}
    return {"different": wrong, "read": read, "error": error and str(error), **sizes}


if __name__ == "__main__":
    worlds.CHECKS = {"snapshots": snapshots}
    worlds.main()
