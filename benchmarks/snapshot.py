"""What a snapshot in memory after every step costs: throughput with and without, beside torch DCP's `async_save`.

    python benchmarks/snapshot.py [--workers 2] [--dcp-folder /dev/shm]                  CPU: a widened tiny model
    python benchmarks/snapshot.py --device cuda --model 3b --seq-len 4096 --batch 4      one GPU, no Ray

One run: blocks of steps without and with, in turn, in the same processes. A block of "with" begins with a step that is
not counted, so that the clock starts and ends with one snapshot under way: all work in the background is in the figure,
and the encoding and sealing of the node's process share the cores. Ratio: median over the rounds of the steps' time
without divided by that with, each a block. DCP writes to `--dcp-folder` (default: a tmpfs, as fast as can be) and has
the same rule: one save at a time, after every step. The last line printed is one JSON object.
"""

import argparse
import json
import os
import platform
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from report import write_report  # noqa: E402

from checkpoint import CheckpointOptions, rng_state  # noqa: E402
from checkpoint.ranks import Ranks  # noqa: E402
from checkpoint.roster import Roster  # noqa: E402
from checkpoint.snapshot_process import local_roster  # noqa: E402
from checkpoint.snapshots import Snapshots  # noqa: E402


class Training:
    """An engine and its steps; `step` returns once the device has done it."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int) -> None:
        from in_memory import preset

        from parallel import OptimizerOptions, ParallelOptions
        from trainer.build import Rank, build_engine, choose_dtype
        from trainer.job import Job
        from trainer.models import build_model
        from trainer.options import LlamaOptions, TrainOptions

        self.cuda = args.device == "cuda"
        wide = LlamaOptions(
            name="wide", dim=args.dim, ffn_dim=3 * args.dim, num_layers=4, num_heads=8, num_kv_heads=8,
            head_dim=args.dim // 8,
        )  # fmt: skip
        job = Job(
            model=preset(args.model) if args.model else wide,
            train=TrainOptions(seq_len=args.seq_len, global_batch_size=args.batch * world),
            optimizer=OptimizerOptions(lr=1e-5),
            parallel=ParallelOptions(),
        )
        torch.manual_seed(0)
        where = Rank(rank, world, torch.device("cuda", 0) if self.cuda else torch.device("cpu"))
        dtype, _ = choose_dtype("auto", where.device)
        vocab = job.model.vocab_size or 256
        model = build_model(job.model, vocab_size=vocab, seq_len=args.seq_len, dtype=dtype, device=where.device)
        self.num_params = sum(p.numel() for p in model.parameters())
        self.engine = build_engine(job, model, where, dtype)
        self.rows = torch.randint(0, vocab, (args.batch, args.seq_len + 1), device=where.device)
        self.world, self.number = world, 0

    def step(self, before_update: Callable[[], None], after: Callable[[int], None]) -> None:
        rows = self.rows
        self.engine.forward_backward(rows[:, :-1], rows[:, 1:], scale=1 / self.world, first=True, last=True)
        before_update()
        self.engine.step(1e-5, 1.0)
        self.number += 1
        after(self.number)

    def block(self, steps: int, before_update: Callable[[], None], after: Callable[[int], None]) -> float:
        """Seconds a step, after one that does not count."""
        self.step(before_update, after)
        self._meet()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(before_update, after)
        self._meet()
        return (time.perf_counter() - start) / steps

    def _meet(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        if self.world > 1:
            dist.barrier()


def nothing(*_: object) -> None:
    pass


def versus(training: Training, args: argparse.Namespace, *act: Callable[..., None], settle: Callable[[], None]):
    """Ratios and seconds a step of blocks without and with `act`, in turn; which comes first changes each round."""
    rounds: list[tuple[float, float]] = []
    for number in range(args.rounds):
        found = {}
        for side in ("without", "with")[:: 1 if number % 2 == 0 else -1]:
            found[side] = training.block(args.steps, *(act if side == "with" else (nothing, nothing)))
            settle()
        rounds.append((found["without"], found["with"]))
    ratios = sorted(without / with_ for without, with_ in rounds)
    return {
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "step_s_without": round(statistics.median(r[0] for r in rounds), 4),
        "step_s_with": round(statistics.median(r[1] for r in rounds), 4),
    }


def measure_snapshots(training: Training, args: argparse.Namespace, ranks: Ranks, folder: Path) -> dict[str, Any]:
    options = CheckpointOptions(snapshot_every_steps="1", parity=0)
    found = b""
    if ranks.rank == 0:
        log = folder / "snapshots.log"
        found = local_roster(secrets.token_bytes(16), ranks.world, hold_s=120, log=log).dumps()
    snapshots = Snapshots(Roster.loads(ranks.tell(found)), options, ranks, print)
    try:
        snapshots.start(training.engine.pieces(), rng_state(), {"step": 0})

        def save(step: int) -> None:
            snapshots.save(step, training.engine.pieces(), rng_state(), {"step": step})

        training.block(1, snapshots.wait_copied, save)
        snapshots.wait_copied()
        snapshots.wait()
        snapshots.stats.stall_s.clear()
        snapshots.stats.copy_s.clear()

        def settle() -> None:
            snapshots.wait_copied()
            snapshots.wait()
            if snapshots.error() is not None:
                raise SystemExit(f"a snapshot failed: {snapshots.error()}")

        row = versus(training, args, snapshots.wait_copied, save, settle=settle)
        stats = snapshots.stats
        if not stats.stall_s:
            raise SystemExit("no snapshot was taken")
        states = [int(size) for size in ranks.gather(str(stats.state_bytes).encode())] or [stats.state_bytes]
        return {
            "side": "snapshots", **row, "taken": stats.taken,
            "stall_ms": round(1e3 * statistics.median(stats.stall_s), 3),
            "stall_ms_worst": round(1e3 * max(stats.stall_s), 3),
            "copy_ms": round(1e3 * statistics.median(stats.copy_s), 1), "state_bytes": sum(states),
            "memory_over_state": round(stats.segment_bytes / sum(states), 3),
            "node_s": {name: round(value, 4) for name, value in stats.node_s.items()},
        }  # fmt: skip
    finally:
        snapshots.close(dropped=True)


def measure_dcp(training: Training, args: argparse.Namespace, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """`torch.distributed.checkpoint.async_save` of the same tensors: it stages them, then writes in a thread."""
    from torch.distributed import checkpoint as dcp

    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    state = {f"{p.name}/{p.kind}/{p.start}": p.tensor.detach() for p in training.engine.pieces()}
    group = dist.new_group(backend="gloo")
    stalls: list[float] = []
    saves: list[tuple[Any, Path]] = []

    def settle() -> None:
        while saves:
            future, path = saves.pop()
            future.result()
            ranks.gather(b"done")  # nobody removes what another still writes
            if ranks.rank == 0:
                shutil.rmtree(path)

    def save(step: int) -> None:
        start = time.perf_counter()
        settle()
        path = folder / f"dcp-{step}"
        saves.append((dcp.async_save(state, checkpoint_id=str(path), process_group=group), path))
        stalls.append(time.perf_counter() - start)

    training.block(1, nothing, save)
    settle()
    stalls.clear()
    row = versus(training, args, nothing, save, settle=settle)
    size = sum(tensor.nbytes for tensor in state.values())
    return {
        "side": "torch DCP async_save", **row, "stall_ms": round(1e3 * statistics.median(stalls), 1),
        "stall_ms_worst": round(1e3 * max(stalls), 1), "state_bytes": size * ranks.world,
    }  # fmt: skip


def worker(args: argparse.Namespace, rank: int, port: int) -> None:
    world = args.workers
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    group = dist.new_group(backend="gloo") if world > 1 else None
    ranks = Ranks(rank, world, group)
    folder = Path(args.dcp_folder)
    training = Training(args, rank, world)
    from trainer.models.attention import attention_backends

    with attention_backends(torch.device(args.device)):
        for _ in range(3):  # compile, grow the pools
            training.block(1, nothing, nothing)
        rows = [measure_snapshots(training, args, ranks, folder)]
        if args.dcp:
            rows.append(measure_dcp(training, args, ranks, folder))
    if rank == 0:
        common = {"workers": world, "device": args.device, "model": args.model or f"dim {args.dim}"}
        common |= {"params": training.num_params, "tokens_a_step": args.batch * world * args.seq_len}
        print("ROWS", json.dumps([common | row for row in rows]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="", help="a preset of conf/model; without it a Llama of 4 blocks of --dim")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="sequences a worker and step")
    parser.add_argument("--workers", type=int, default=1, help="on a GPU: 1")
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-dcp", dest="dcp", action="store_false")
    parser.add_argument("--dcp-folder", default="/dev/shm")
    parser.add_argument("--timeout-s", type=float, default=600)
    parser.add_argument("--out", default="")
    parser.add_argument("--rank", nargs=2, type=int, metavar=("RANK", "PORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        worker(args, *args.rank)
        return
    if args.device == "cuda" and args.workers != 1:
        parser.error("--workers: 1 with --device cuda")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.dcp_folder, prefix="atoll-bench-") as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--dcp-folder", folder, "--rank"]
        crew = [
            subprocess.Popen([*command, str(rank), str(port)], stdout=subprocess.PIPE if rank == 0 else None, text=True)
            for rank in range(args.workers)
        ]
        try:
            said = crew[0].communicate(timeout=args.timeout_s)[0]
            codes = [process.wait(timeout=60) for process in crew]
        finally:
            for process in crew:
                process.kill()
    found = [line for line in said.splitlines() if line.startswith("ROWS ")]
    if any(codes) or not found:
        sys.exit(f"the workers ended with {codes}\n{said}")
    rows = json.loads(found[0].removeprefix("ROWS "))
    for row in rows:
        print(
            f"{row['side']:22} ratio {row['ratio']:.4f}  step {row['step_s_without']:.4f} -> {row['step_s_with']:.4f} s"
            f"  stall {row['stall_ms']:.2f} ms  state {row['state_bytes'] / 1e6:.0f} MB"
        )
    gpu = torch.cuda.get_device_name(0) if args.device == "cuda" else "no GPU"
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, load average {load:.1f} at the start"
    name = f"snapshot_{args.device}_{args.workers}.json"
    write_report(args.out or str(HERE / "results" / name), hardware, rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
