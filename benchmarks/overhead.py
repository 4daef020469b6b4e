"""What the engine costs where nothing is gained by it: on CPU, beside a plain PyTorch loop and beside DDP.

    python benchmarks/overhead.py [--rounds 15] [--steps 10]

One worker: the native engine beside a plain loop. Two workers over gloo: the native engine beside
DistributedDataParallel. All sides: the default Llama in fp32, the same weights and tokens, fused AdamW, clipping 1.0.
The sides live in the same processes and take turns, `--steps` steps each a round, in alternating order; a figure is the
median over rounds of the ratio within a round, so that whatever else the machine does hits both. Prints a table and
writes benchmarks/results/overhead.json.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from benchmarks.report import write_report  # noqa: E402
from parallel import Mesh, OptimizerOptions, ParallelOptions, Placement, shard  # noqa: E402
from trainer.models import LanguageModel, build_model  # noqa: E402
from trainer.options import LlamaOptions, TrainOptions  # noqa: E402

CPU, CLIP_NORM = torch.device("cpu"), 1.0
TARGETS = {1: 1.03, 2: 1.05}
"""By number of workers: how much longer a step may take than the baseline's."""
PLACEMENTS = {1: ("zero3",), 2: ("ddp", "zero2", "zero3")}
OPTIMIZER, TRAIN = OptimizerOptions(), TrainOptions()

Step = Callable[[], None]


def build() -> LanguageModel:
    return build_model(LlamaOptions(), vocab_size=256, seq_len=TRAIN.seq_len, dtype=torch.float32, device=CPU)


def batch(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of one rank's micro-batch, each (B, S)."""
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randint(256, (TRAIN.global_batch_size // world, TRAIN.seq_len + 1), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def baseline(rank: int, world: int) -> Step:
    """A plain PyTorch loop's step; with several workers under DistributedDataParallel."""
    model = build()
    read = model.initial(0, CPU)
    for name, param in model.named_parameters():
        real = read(name, "master", 0, param.numel()).view(param.shape)
        torch.utils.swap_tensors(param, torch.nn.Parameter(real))
    matrices = [param for param in model.parameters() if param.ndim >= 2]
    vectors = [param for param in model.parameters() if param.ndim < 2]
    groups = [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (OPTIMIZER.beta1, OPTIMIZER.beta2)
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=betas, eps=OPTIMIZER.eps, fused=True)
    module = DistributedDataParallel(model) if world > 1 else model
    tokens, targets = batch(rank, world)

    def step() -> None:
        module(tokens, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def native(rank: int, world: int, placement: str) -> Step:
    options = ParallelOptions(placement=placement)
    mesh = Mesh.of(options.levels, rank=rank, world=world)
    model = build()
    engine = shard(
        model, mesh, Placement.of(options, mesh.num_levels),
        units=model.units(), initial=model.initial(0, CPU), optimizer=OPTIMIZER, options=options,
        dtype=torch.float32, device=CPU,
    )  # fmt: skip
    tokens, targets = batch(rank, world)

    def step() -> None:
        engine.forward_backward(tokens, targets, scale=1 / world, first=True, last=True)
        engine.step(OPTIMIZER.lr, CLIP_NORM)

    return step


def measure(rank: int, world: int, rounds: int, num_steps: int) -> dict[str, list[float]]:
    """Seconds a step of each side, by round. The first round, which warms up, is not counted."""
    sides = {"baseline": baseline(rank, world)} | {p: native(rank, world, p) for p in PLACEMENTS[world]}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            if world > 1:
                dist.barrier()
            start = time.perf_counter()
            for _ in range(num_steps):
                sides[name]()
            seconds[name].append((time.perf_counter() - start) / num_steps)
    return {name: times[1:] for name, times in seconds.items()}


def worker(rank: int, world: int, folder: str, rounds: int, num_steps: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if world > 1:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    times = measure(rank, world, rounds, num_steps)
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(times))
    if world > 1:
        dist.destroy_process_group()


def compare(world: int, rounds: int, num_steps: int) -> list[dict[str, Any]]:
    """One row for each placement, against the baseline."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(world, folder, rounds, num_steps), nprocs=world)
        times = json.loads(Path(folder, f"{world}.json").read_text())
    rows: list[dict[str, Any]] = []
    for placement in PLACEMENTS[world]:
        ratios = [mine / base for mine, base in zip(times[placement], times["baseline"], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        rows.append({
            "workers": world, "baseline": "DDP" if world > 1 else "plain loop", "placement": placement,
            "baseline_step_s": round(statistics.median(times["baseline"]), 5),
            "step_s": round(statistics.median(times[placement]), 5),
            "ratio": round(ratio, 4), "ratio_quartiles": [round(low, 4), round(high, 4)], "target": TARGETS[world],
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="of each side in a round")
    parser.add_argument("--out", default=str(HERE / "results" / "overhead.json"))
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rows = compare(1, args.rounds, args.steps) + compare(2, args.rounds, args.steps)
    print(
        f"{'workers':>7} {'baseline':>10} {'ms':>7} {'placement':>9} {'ms':>7} {'ratio':>6} "
        f"{'quartiles':>15} {'target':>6}"
    )
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['workers']:>7} {row['baseline']:>10} {1e3 * row['baseline_step_s']:7.1f} {row['placement']:>9} "
            f"{1e3 * row['step_s']:7.1f} {row['ratio']:6.3f} {low:7.3f} {high:7.3f} {row['target']:6.2f}"
        )
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, load average {load:.1f} at the start"
    write_report(args.out, hardware, rows)


if __name__ == "__main__":
    main()
