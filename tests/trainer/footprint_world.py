"""Gloo processes share sequences, with all that blocks may do with their activations. Prints for each of these, as a
JSON line: the override, what `trainer.footprint` says of the first rank, what its operators hold, and both of a rank
alone whose sequences are no longer than that part.

    python -m tests.trainer.footprint_world WORLD
"""

import json
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist

from offload.options import ActivationOptions
from parallel.sequence import SequenceParallel
from tests.trainer.test_footprint import found, measured
from trainer.footprint import alternatives

TOKENS, TILE = 128, 32
"""Of a rank's part of each of two sequences, and of a tile of both."""


def run(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}/init", rank=rank, world_size=world, timeout=limit)
    sequence, num_tokens = SequenceParallel(dist.group.WORLD), TOKENS * world
    for override, options in alternatives(ActivationOptions(keep_last=1), streams=True).items():
        if options.streams:
            options = ActivationOptions(mode=options.mode, tile_tokens=TILE)
        # gloo's thread may let go of what was sent a moment late
        real = min(measured(options, sequence, num_tokens=num_tokens) for _ in range(3))
        if rank == 0:
            whole = found(options, num_tokens=num_tokens, sharing=world).device_bytes(options)
            part = found(options, num_tokens=TOKENS).device_bytes(options)
            print(json.dumps([override, whole, real, part, measured(options, num_tokens=TOKENS)]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (int(sys.argv[1]), folder), nprocs=int(sys.argv[1]))
