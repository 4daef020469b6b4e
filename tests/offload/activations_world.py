"""Trains a small Llama in a world of gloo processes, activations kept and then leaving; rank 0 prints the largest
difference of the weights.

    python activations_world.py WORLD PRESET
"""

import os
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist

from offload.activations.blocks import Activations
from offload.options import ActivationOptions
from parallel import Mesh, OptimizerOptions, ParallelOptions, Placement, shard
from trainer.models.llama import Llama
from trainer.options import LlamaOptions

CPU = torch.device("cpu")


def train(preset: str, mode: str, alpha: float | None, tile_tokens: int | None = None) -> tuple[torch.Tensor, ...]:
    options = ParallelOptions(placement=preset)
    mesh = Mesh.of({}, rank=dist.get_rank(), world=dist.get_world_size())
    llama = LlamaOptions(dim=64, ffn_dim=160, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=16)
    model = Llama(llama, vocab_size=64, seq_len=32, dtype=torch.float32, device=CPU)
    leave = ActivationOptions(mode=mode, alpha=alpha, tile_tokens=tile_tokens)
    model.run_by_tiles(leave)
    engine = shard(
        model, mesh, Placement.of(options, mesh.num_levels), units=model.units(), initial=model.initial(0, CPU),
        optimizer=OptimizerOptions(), options=options, dtype=torch.float32, device=CPU,
    )  # fmt: skip
    activations = Activations(leave, CPU, pack=engine.weights.pack, unpack=engine.weights.unpack, poison=True)
    activations.wrap(model.blocks())
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(3):
        for micro in range(2):
            rows = torch.randint(64, (2, 33), generator=generator)
            losses.append(engine.forward_backward(
                rows[:, :-1], rows[:, 1:], scale=1 / 2 / dist.get_world_size(), first=micro == 0, last=micro == 1
            ))  # fmt: skip
        engine.step(1e-2, 1.0)
    activations.close()
    return (*losses, *(piece.tensor.clone() for piece in engine.pieces()))


def run(rank: int, world: int, preset: str, store: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    kept = train(preset, "keep", None)
    for mode, alpha in (("swap", 1.0), ("swap", 0.0), ("recompute", None), ("input", None)):
        found = train(preset, mode, alpha)
        assert len(found) == len(kept)
        worst = max(float((a - b).abs().max()) for a, b in zip(found, kept, strict=True))
        assert torch.isfinite(torch.tensor(worst))
        if rank == 0:
            print(mode, alpha, worst, flush=True)
    kept = train(preset, "keep", None, 24)
    found = train(preset, "swap", 1.0, 24)
    if rank == 0:
        print("tiles", max(float((a - b).abs().max()) for a, b in zip(found, kept, strict=True)), flush=True)
    for mode in ("stream", "stream_input"):
        found = train(preset, mode, None, 24)
        worst = max(float((a - b).abs().max()) for a, b in zip(found, kept, strict=True))
        if rank == 0:
            print(mode, worst < 1e-4, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    world, preset = int(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        torch.multiprocessing.spawn(run, (world, preset, store), nprocs=world)
