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

calls: list[tuple[str, tuple[int, ...], int, str]] = []
"""Kind, ranks, the bytes of the whole, and the module that called."""


def watch(name: str, kind: str, whole: int) -> None:
    """Note every call of ``dist.<name>``; argument `whole` is the tensor that holds all parts."""
    original = getattr(dist, name)

    def noted(*args, group=None, **kwargs):
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        calls.append((kind, ranks, args[whole].nbytes, sys._getframe(1).f_globals["__name__"]))
        return original(*args, group=group, **kwargs)

    setattr(dist, name, noted)


for gather in ("all_gather_single", "all_gather_into_tensor"):
    if hasattr(dist, gather):
        watch(gather, "all_gather", 0)
watch("all_to_all_single", "all_to_all", 0)
watch("all_reduce", "all_reduce", 0)

from offload.options import ActivationOptions, OffloadOptions  # noqa: E402
from parallel import Mesh, ParallelOptions, Placement  # noqa: E402
from parallel.planning.cost import Plan, buffers, memory, traffic_of  # noqa: E402
from parallel.planning.machine import Link, Machine  # noqa: E402
from parallel.transport import Transport  # noqa: E402
from trainer.build import Rank, build_engine, share_sequences  # noqa: E402
from trainer.job import Job  # noqa: E402
from trainer.models import build_model  # noqa: E402
from trainer.options import LlamaOptions, TrainOptions  # noqa: E402
from trainer.workload import workload_of  # noqa: E402

SEQ_LEN, MICRO, CPU = 16, 2, torch.device("cpu")
SEQUENCE = "parallel.sequence"


def sent(mesh: Mesh, module: str = "") -> list[float]:
    """Bytes this rank sent over each level: to its neighbour in a ring, or to every other rank. module: it alone."""
    levels = [0.0] * mesh.num_levels

    def level_to(rank: int) -> int:
        other = Mesh(dict(zip(mesh.names, mesh.sizes, strict=True)), rank=rank).coordinates
        return next(i for i, (a, b) in enumerate(zip(mesh.coordinates, other, strict=True)) if a != b)

    for kind, ranks, whole, caller in calls:
        n = len(ranks)
        if n == 1 or module not in ("", caller):
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
    options = ParallelOptions(levels=case["levels"], **case["parallel"])
    dtype = torch.bfloat16 if case.get("bf16") else torch.float32
    shape = LlamaOptions(dim=64, ffn_dim=176, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, **case["model"])
    count, placement = case["accumulation"], Placement.of(options, mesh.num_levels)
    seq_len, groups = case.get("seq_len", SEQ_LEN), world // options.sequence_ranks
    job = Job(
        model=shape,
        train=TrainOptions(seq_len=seq_len, micro_batch_size=MICRO, global_batch_size=MICRO * count * groups),
        parallel=options,
        offload=OffloadOptions(activations=ActivationOptions(**case.get("activations", {}))),
    )
    where = Rank(rank, world, CPU)
    model = build_model(shape, vocab_size=256, seq_len=seq_len, dtype=dtype, device=CPU)
    work = workload_of(job, model, world, compute_bytes=dtype.itemsize)
    engine, sequence = build_engine(job, model, where, dtype), share_sequences(job, model, where)
    part = sequence.part(seq_len)

    def step() -> None:
        for i in range(count):
            tokens = torch.randint(256, (MICRO, seq_len))[:, part]
            with sequence.attention(seq_len):
                engine.forward_backward(tokens, tokens, part.start, scale=1 / count, first=i == 0, last=i == count - 1)
        engine.step(1e-3, 1.0)

    step()
    dist.barrier()
    calls.clear()
    before = wire()
    step()
    total, shared = (torch.tensor(sent(mesh, module), dtype=torch.float64) for module in ("", SEQUENCE))
    num_exchanges = sum(caller == SEQUENCE for *_, caller in calls)
    state = engine.state_bytes()
    for flat in engine._trainable:  # what is under way is part of this step on the wire
        flat.finish_refresh()
    dist.barrier()
    through = wire() - before
    dist.all_reduce(total)
    dist.all_reduce(shared)
    engine.close()
    links = tuple(Link(name=name, bandwidth=1) for name in mesh.names)
    machine = Machine(name="here", compute=1e9, memory_rate=1e9, backend="gloo", links=links)
    traffic = traffic_of(work, Plan(mesh, placement, Transport.of(options, mesh, placement)), machine)
    held, ring, phases = memory(work, traffic), buffers(work, traffic), traffic.sent_bytes()
    exchanges = [
        unit.count * (1 + unit.passes_backward) * len(chain)
        for unit in work.units for chain in traffic.unit(unit).sequence
    ]  # fmt: skip
    return {
        "case": case,
        "sent": (total / world).tolist(),
        "expected": [sum(levels) for levels in zip(*phases.values(), strict=True)],
        "shared": {"sent": (shared / world).tolist(), "expected": phases["sequence"]},
        "exchanges": {"made": num_exchanges, "expected": count * sum(exchanges)},
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
