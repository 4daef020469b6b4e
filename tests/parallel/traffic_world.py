"""Trains a small Llama with the engine in a gloo world and reports the bytes that it sent, and what the model predicts.

    python traffic_world.py WORLD < cases.json

Bytes are counted where the engine calls `torch.distributed`: which group, which collective, how many. Rank 0 answers
with a JSON object a case. In a network namespace of its own, the loopback device counts them too (``wire``).
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

calls: list[tuple[str, tuple[int, ...], int]] = []
"""Kind, ranks, and the bytes of the whole."""


def watch(name: str, kind: str, whole: int) -> None:
    """Note every call of ``dist.<name>``; argument `whole` is the tensor that holds all parts."""
    original = getattr(dist, name)

    def noted(*args, group=None, **kwargs):
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        calls.append((kind, ranks, args[whole].nbytes))
        return original(*args, group=group, **kwargs)

    setattr(dist, name, noted)


for gather in ("all_gather_single", "all_gather_into_tensor"):
    if hasattr(dist, gather):
        watch(gather, "all_gather", 0)
watch("all_to_all_single", "all_to_all", 0)
watch("all_reduce", "all_reduce", 0)

from parallel import Mesh, OptimizerOptions, ParallelOptions, Placement, shard  # noqa: E402
from parallel.planning.cost import Plan, buffers, memory, traffic_of  # noqa: E402
from parallel.planning.machine import Link, Machine  # noqa: E402
from parallel.planning.workload import Workload  # noqa: E402
from parallel.transport import Transport  # noqa: E402
from trainer.models import build_model  # noqa: E402
from trainer.options import LlamaOptions  # noqa: E402

SEQ_LEN, CPU = 16, torch.device("cpu")


def sent(mesh: Mesh) -> list[float]:
    """Bytes this rank sent over each level: to its neighbour in a ring, or to every other rank."""
    levels = [0.0] * mesh.num_levels

    def level_to(rank: int) -> int:
        other = Mesh(dict(zip(mesh.names, mesh.sizes, strict=True)), rank=rank).coordinates
        return next(i for i, (a, b) in enumerate(zip(mesh.coordinates, other, strict=True)) if a != b)

    for kind, ranks, whole in calls:
        n = len(ranks)
        if n == 1:
            continue
        following = ranks[(ranks.index(mesh.rank) + 1) % n]
        if kind == "all_to_all":
            for other in ranks:
                if other != mesh.rank:
                    levels[level_to(other)] += whole / n
        else:
            levels[level_to(following)] += (2 if kind == "all_reduce" else 1) * whole * (n - 1) / n
    return levels


def wire() -> int:
    """Bytes through the loopback device so far."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


def run(case: dict, rank: int, world: int) -> dict:
    mesh = Mesh.of(case["levels"], rank=rank, world=world)
    options = ParallelOptions(**case["parallel"])
    dtype = torch.bfloat16 if case.get("bf16") else torch.float32
    shape = LlamaOptions(dim=64, ffn_dim=176, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, **case["model"])
    model = build_model(shape, vocab_size=256, seq_len=SEQ_LEN, dtype=dtype, device=CPU)
    count, placement = case["accumulation"], Placement.of(options, mesh.num_levels)
    work = Workload.read(
        model, seq_len=SEQ_LEN, micro_batch_size=2, micro_batches=count, compute_bytes=dtype.itemsize,
        reduce_bytes=4 if options.reduce_dtype == "fp32" else 2, prefetch_units=options.prefetch_units,
        recompute=case.get("recompute", False), exact=options.exact,
    )  # fmt: skip
    recompute = model.blocks() if case.get("recompute") else []
    engine = shard(
        model, mesh, placement, units=model.units(), initial=model.initial(0, CPU), optimizer=OptimizerOptions(),
        options=options, dtype=dtype, device=CPU, recompute=recompute,
    )  # fmt: skip

    def step() -> None:
        for i in range(count):
            tokens = torch.randint(256, (2, SEQ_LEN))
            engine.forward_backward(tokens, tokens, scale=1 / count, first=i == 0, last=i == count - 1)
        engine.step(1e-3, 1.0)

    step()
    dist.barrier()
    calls.clear()
    before = wire()
    step()
    total = torch.tensor(sent(mesh), dtype=torch.float64)
    state = engine.state_bytes()
    for flat in engine._trainable:  # what is under way is part of this step on the wire
        flat.finish_refresh()
    dist.barrier()
    through = wire() - before
    dist.all_reduce(total)
    links = tuple(Link(name=name, bandwidth=1) for name in mesh.names)
    machine = Machine(name="here", compute=1e9, memory_rate=1e9, backend="gloo", links=links)
    traffic = traffic_of(work, Plan(mesh, placement, Transport.of(options, mesh, placement)), machine)
    held, ring = memory(work, traffic), buffers(work, traffic)
    return {
        "case": case,
        "sent": (total / world).tolist(),
        "expected": [sum(levels) for levels in zip(*traffic.sent_bytes().values(), strict=True)],
        "wire": through / world,
        "state": state,
        "held": {
            "parameters": held["parameters"],
            "states": held["optimizer states"],
            "buffers": ring["gathered"] + ring["staging"],
            "under way": ring["under way"],
        },
    }


def worker(rank: int, world: int, store: str, cases: list[dict]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    for case in cases:
        answer = run(case, rank, world)
        if rank == 0:
            print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    size, given = int(sys.argv[1]), json.load(sys.stdin)
    assert all(math.prod(case["levels"].values()) == size for case in given)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(size, f"{folder}/store", given), nprocs=size)
