"""Measures a machine for the cost model: each level's collectives, compute, memory, and how they disturb each other.

    python benchmarks/links.py --levels node=2,gpu=2 --out machine.json            # starts the ranks here, over gloo
    torchrun --nproc-per-node 8 benchmarks/links.py --levels gpu=8 --out m.json    # ranks that are there (NCCL on GPUs)

In every group of a level at once, each collective that the engine uses runs over several sizes; the straight line
``latency * steps + bytes / bandwidth`` of least relative error becomes a `Fit`. Compute is the engine's own step on one
rank, all ranks at a time, of two widths: FLOP/s and seconds a unit. Sizes that would take longer than ``--seconds``
are left out and said. The file is what ``machine=`` of ``atoll plan`` reads.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import nn  # noqa: E402

from parallel import Mesh, OptimizerOptions, ParallelOptions, Placement, ShardedModel, shard  # noqa: E402
from parallel.collectives import Lane, Steps, all_gather, all_reduce, all_to_all  # noqa: E402
from parallel.planning.machine import Fit, Link, Machine, Packing  # noqa: E402
from parallel.quantize import Format, dequantize, quantize  # noqa: E402

SIZES = [1 << n for n in range(12, 27, 2)]
"""Bytes of the whole: what a rank ends up with (all-gather) or starts with (all-to-all, all-reduce)."""


class Stack(nn.Module):
    """Linear layers, each a unit."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width, bias=False, device="meta") for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layers(x).square().mean()
        return loss


def timed(act: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Median seconds of `act`, of the slowest rank. Repeated for about `seconds`, three to twenty times."""

    def once() -> float:
        dist.barrier()
        _synchronize(device)
        start = time.perf_counter()
        act()
        _synchronize(device)
        return time.perf_counter() - start

    first = torch.tensor([once()])
    dist.all_reduce(first, op=dist.ReduceOp.MAX)  # all ranks repeat as often
    times = torch.tensor([once() for _ in range(int(np.clip(seconds / float(first), 3, 20)))])
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return float(times.median())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_level(
    mesh: Mesh, level: int, seconds: float, device: torch.device, largest: int, issue_s: float
) -> dict[str, Any]:
    """Fits of the three collectives over one level, up to messages of `largest` bytes and without `issue_s`, and the
    points that they were fitted to, with it."""
    group, n = mesh.group(level, level + 1), mesh.sizes[level]
    assert group is not None
    lane = Lane(device)
    found: dict[str, Any] = {"fits": {}, "points": {"members": n}}
    for kind in ("all_gather", "all_to_all", "all_reduce"):
        points: list[tuple[float, float]] = []
        for size in SIZES:
            whole = torch.ones(size // 4 // n * n, device=device)
            part, out = whole[: len(whole) // n].clone(), torch.empty_like(whole)
            steps = {
                "all_gather": partial(all_gather, out, part, group),
                "all_to_all": partial(all_to_all, out, whole, group),
                "all_reduce": partial(all_reduce, whole, group),
            }[kind]
            if points and (points[-1][1] * 4 > seconds or size > largest):
                break

            def act(steps: Callable[[], Steps] = steps) -> None:
                lane.launch(steps()).finish()

            took = timed(act, seconds / 4, device)
            factor = 2 if kind == "all_reduce" else 1
            points.append((factor * whole.nbytes * (n - 1) / n, took))
        start, rate = fit_line(points)
        found["fits"][kind] = Fit(bandwidth=rate, latency=max(0.0, start - issue_s) / ring_steps(kind, n))
        found["points"][kind] = points
    return found


def fit_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """``start, rate`` of ``seconds = start + bytes / rate``.

    The rate comes from the two largest sizes: a token bucket or a cache lets small ones through faster, and the start
    is what is left of the smallest one's time, or of the small ones' if that is more.
    """
    (fewer, short), (more, long) = points[-2:]
    rate = (more - fewer) / max(1e-9, long - short)
    rate = min(rate, 1.25 * more / long)
    starts = [max(0.0, seconds - sent / rate) for sent, seconds in points[: max(1, len(points) // 2)]]
    return float(max(starts[0], np.median(starts))), float(rate)


def measure_alone(mesh: Mesh, level: int, points: list[tuple[float, float]], device: torch.device) -> float:
    """Bytes/s of a rank in an all-reduce over one level while only the first group of the level runs.

    An all-reduce, because a pair's all-to-all may not fill a link by itself; `points` are those with all groups.
    """
    group, n = mesh.group(level, level + 1), mesh.sizes[level]
    assert group is not None
    whole = torch.ones(round(points[-1][0] * n / (n - 1) / 2) // 4 // n * n, device=device)
    lane = Lane(device)
    first = all(c == 0 for i, c in enumerate(mesh.coordinates) if i != level)

    def act() -> None:
        if first:
            lane.launch(all_reduce(whole, group)).finish()

    return points[-1][0] / timed(act, 0.0, device)


def measure_packing(seconds: float, device: torch.device) -> dict[str, Packing]:
    """Quantizing and dequantizing two chunks, of several sizes, in the formats there are; all ranks at a time."""
    found = {}
    for format in (Format(bits=8, block=256), Format(bits=4, block=128)):
        points: dict[str, list[tuple[int, float]]] = {"quantize": [], "dequantize": []}
        for numel in (1 << 13, 1 << 15, 1 << 17, 1 << 19):
            values, half = torch.randn(numel, device=device), format.packed_bytes(numel // 2)
            packed = torch.empty(2 * half, dtype=torch.uint8, device=device)
            acts = {
                "quantize": partial(quantize, values, format, packed, chunks=2),
                "dequantize": partial(dequantize, packed, format, values, chunks=2),
            }
            for name, act in acts.items():
                points[name].append((values.nbytes + packed.nbytes, timed(act, seconds / 4, device)))
        for name, measured in points.items():
            sizes, times = np.array(measured).T
            slope, call_s = np.polyfit(sizes, times, 1, w=1 / times)  # the least relative errors: small ones count too
            found[f"{name}_int{format.bits}"] = Packing(rate=1 / max(1e-15, slope), call_s=max(0.0, call_s))
    return found


def measure_compute(tokens: int, seconds: float, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s, seconds a unit and pass, and seconds a step, from the engine alone on this rank while all ranks run."""
    layers, widths = 8, (64, 1024 if device.type == "cpu" else 8192)
    times: list[tuple[float, float]] = []
    step_s = 0.0
    for width in widths:
        model = Stack(width, layers)
        alone = Mesh({"worker": 1})
        options = ParallelOptions(placement="ddp")
        engine = shard(
            model, alone, Placement.of(options, 1), units=list(model.layers), optimizer=OptimizerOptions(),
            initial=lambda name, kind, start, stop: torch.full((stop - start,), 1e-2, device=device),
            options=options, dtype=dtype, device=device,
        )  # fmt: skip
        x = torch.randn(tokens, width, device=device, dtype=dtype)

        def passes(engine: ShardedModel = engine, x: torch.Tensor = x) -> None:
            engine.forward_backward(x, scale=1.0, first=True, last=True)

        def step(engine: ShardedModel = engine, passes: Callable[[], None] = passes) -> None:
            passes()
            engine.step(1e-3, 1.0)

        passes()
        took = timed(passes, seconds, device)
        if width == widths[0]:
            step()
            step_s = max(0.0, timed(step, seconds, device) - took)
        times.append((6.0 * tokens * width * width, took / layers))
    (few, short), (many, long) = times
    rate = (many - few) / max(1e-9, long - short)
    return {"compute": rate, "unit_s": max(0.0, short - few / rate) / 2, "step_s": step_s}


def measure_memory(seconds: float, device: torch.device) -> float:
    """Bytes/s read and written by a pass over more than the caches hold, all ranks at a time."""
    a = torch.ones((16 if device.type == "cpu" else 256) << 20, device=device)
    return 2 * a.nbytes / timed(lambda: a.mul_(1.0001), seconds, device)


def measure_issue(mesh: Mesh, level: int) -> float:
    """Seconds of this thread, while it does not wait, to issue a small collective over a level and take its result."""
    group = mesh.group(level, level + 1)
    assert group is not None
    lane, times = Lane(torch.device("cpu")), []
    flat, out = torch.ones(256 * mesh.sizes[level]), torch.ones(256 * mesh.sizes[level])
    for _ in range(40):
        start = time.thread_time()
        lane.launch(all_gather(out, flat[:256], group)).finish()
        lane.launch(all_to_all(out, flat, group)).finish()
        times.append((time.thread_time() - start) / 2)
    return float(np.median(times))


def measure_core(mesh: Mesh, level: int, seconds: float) -> float:
    """Which part of a rank's cores all-to-alls over a level take while all ranks do nothing else."""
    group, n = mesh.group(level, level + 1), mesh.sizes[level]
    assert group is not None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world))
    whole = torch.ones((1 << 18) // n * n)
    out, took, busy = torch.empty_like(whole), 0.0, 0.0
    while took < seconds / 4:
        dist.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        for _ in range(4):
            dist.all_to_all_single(out, whole, group=group)
        one = torch.tensor([time.perf_counter() - start, time.process_time() - start_cpu])
        dist.all_reduce(one)  # all ranks repeat as often
        took, busy = took + float(one[0]) / mesh.world, busy + float(one[1]) / mesh.world
    return min(1.0, busy / took * here / (len(os.sched_getaffinity(0))))


def measure(levels: dict[str, int], args: argparse.Namespace) -> None:
    """On every rank; rank 0 prints the table and writes the machine."""
    rank, world = dist.get_rank(), dist.get_world_size()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    mesh = Mesh.of(levels, rank=rank, world=world)
    for level in range(mesh.num_levels):  # collective: in the same order on every rank
        mesh.group(level, level + 1)
    links: list[Link] = []
    points: dict[str, Any] = {}
    issues: list[float] = []
    for level, name in enumerate(mesh.names):
        if mesh.sizes[level] == 1:
            continue
        issue_s = 0.0 if gpu else measure_issue(mesh, level)
        found = measure_level(mesh, level, args.seconds, device, args.largest, issue_s)
        core = 0.0 if gpu else measure_core(mesh, level, args.seconds)
        fair = found["fits"]["all_reduce"]
        alone = measure_alone(mesh, level, found["points"]["all_reduce"], device)
        below = int(np.prod(mesh.sizes[level + 1 :]))
        shared = below > 1 and alone > 1.4 * fair.bandwidth
        links.append(Link(
            name=name, size=None if level == 0 else mesh.sizes[level], latency=fair.latency,
            bandwidth=fair.bandwidth * below if shared else fair.bandwidth, shared=shared,
            rank_bandwidth=alone if shared else None, fits=found["fits"], core=core,
        ))  # fmt: skip
        points[name] = found["points"]
        issues.append(issue_s)
    memory_rate = measure_memory(args.seconds / 4, device)
    packing = measure_packing(args.seconds / 4, device)
    compute = measure_compute(args.tokens, args.seconds / 4, device, torch.bfloat16 if gpu else torch.float32)
    if gpu:
        memory = {"gpu": float(torch.cuda.mem_get_info()[1])}
    else:
        memory = {"host": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world)}
    if rank:
        return
    machine = Machine(
        name=args.name or socket.gethostname(), links=tuple(links), memory_rate=memory_rate, memory=memory,
        backend="nccl" if gpu else "gloo", packing=packing, issue_s=max(issues, default=0.0),
        compute=compute["compute"], unit_s=compute["unit_s"], step_s=compute["step_s"],
    )  # fmt: skip
    show(machine, points)
    if args.out:
        Path(args.out).write_text(json.dumps({"machine": machine.to_mapping(), "points": points}, indent=1) + "\n")


def show(machine: Machine, points: dict[str, Any]) -> None:
    print(
        f"{machine.name}, a rank: {machine.compute / 1e9:.3g} GFLOP/s, {machine.memory_rate / 1e9:.3g} GB/s of memory, "
        f"{1e3 * machine.unit_s:.3g} ms a unit, {1e3 * machine.step_s:.3g} ms a step, "
        f"{1e3 * machine.issue_s:.3g} ms to issue a collective"
    )
    for act, packing in machine.packing.items():
        print(f"{act:16} {packing.rate / 1e9:8.3g} GB/s and {1e3 * packing.call_s:.3g} ms a call")
    print(f"{'level':8}{'collective':12}{'MB/s a rank':>12}{'ms to start':>12}{'worst fit':>11}{'points':>8}")
    for link in machine.links:
        for kind, fit in link.fits.items():
            at = points[link.name][kind]
            start = fit.latency * ring_steps(kind, points[link.name]["members"])
            worst = max(abs((start + sent / fit.bandwidth) / seconds - 1) for sent, seconds in at)
            print(f"{link.name:8}{kind:12}{fit.bandwidth / 1e6:12.4g}{1e3 * start:12.3g}{worst:11.0%}{len(at):8}")
        whose = "shared by the ranks below it" if link.shared else "each rank's own"
        print(
            f"{link.name:8}is {whose} ({link.alone / 1e6:.4g} MB/s for a rank alone); a transfer takes "
            f"{link.core:.0%} of a rank's cores"
        )


def ring_steps(kind: str, members: int) -> int:
    """Of a ring."""
    return (2 if kind == "all_reduce" else 1) * (members - 1)


def spawned(rank: int, world: int, store: str, levels: dict[str, int], args: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, (len(os.sched_getaffinity(0))) // world))
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    measure(levels, args)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", required=True, help="slowest first: node=2,gpu=2")
    parser.add_argument("--seconds", type=float, default=2.0, help="about so long for each collective and level")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes of the largest message")
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch, for compute")
    parser.add_argument("--name", default="")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    levels = {name: int(size) for name, _, size in (item.partition("=") for item in args.levels.split(","))}
    world = int(np.prod(list(levels.values())))
    if "RANK" in os.environ:
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        else:
            torch.set_num_threads(
                max(1, (len(os.sched_getaffinity(0))) // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
            )
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        measure(levels, args)
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(spawned, args=(world, f"{folder}/store", levels, args), nprocs=world)


if __name__ == "__main__":
    main()
