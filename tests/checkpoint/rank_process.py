"""One rank of a job that saves checkpoints; the tests start as many as they need.

Arguments: scenario, rank, world, folder for the rendezvous, URL of the checkpoints.
"""

import resource
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import CheckpointOptions, Checkpoints
from offload.state import Piece

SHAPE = (50, 41)
STEP_BYTES = 64 << 20


def tensor(kind: str, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step * 2 + (kind == "exp_avg"))
    return torch.randn(SHAPE, generator=generator)


def pieces(rank: int, world: int, step: int) -> list[Piece]:
    """An uneven share of each kind; every element once, over all ranks."""
    numel = SHAPE[0] * SHAPE[1]
    cuts = [numel * i * i // world**2 for i in range(world + 1)]
    start, stop = cuts[rank], cuts[rank + 1]
    return [
        Piece(name="w", kind=kind, start=start, stop=stop, shape=SHAPE, tensor=tensor(kind, step).flatten()[start:stop])
        for kind in ("master", "exp_avg")
    ]


def save_fail_and_recover(store: Checkpoints, rank: int, world: int) -> None:
    """Steps 10 and 20 are saved, rank 1 fails at 30, and 40 is saved."""

    def save(step: int) -> None:
        store.save(step, pieces(rank, world, step), {"rank": rank}, {"written_by": rank})
        store.wait()

    save(10)
    save(20)
    assert store.error() is None and store.steps() == [10, 20], store.error()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, unlimited[1]))
    save(30)
    assert "rank 1: " in str(store.error()) and "File too large" in str(store.error()), store.error()
    assert store.steps() == [10, 20]
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    save(40)
    assert store.error() is None and store.steps() == [10, 20, 40], store.error()


def save_without_end(store: Checkpoints, rank: int, world: int) -> None:
    flat = torch.ones(STEP_BYTES // 4)
    for step in range(1, 10_000):
        whole = Piece(name="w", kind="master", start=0, stop=len(flat), shape=(len(flat),), tensor=flat * step)
        store.save(step, [whole], {}, {})


def main() -> None:
    scenario, rank, world, rendezvous, url = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    torch.set_num_threads(1)
    group = None
    if world > 1:
        dist.init_process_group("gloo", f"file://{Path(rendezvous).absolute()}/store", rank=rank, world_size=world)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    if scenario == "save_without_end":
        options = CheckpointOptions(keep_last=2, chunk_bytes=1 << 20)
    else:
        options = CheckpointOptions(keep_last=4, chunk_bytes=4096)
    store = Checkpoints(url, options, rank, world, group, report=print)
    {f.__name__: f for f in (save_fail_and_recover, save_without_end)}[scenario](store, rank, world)
    store.close()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
