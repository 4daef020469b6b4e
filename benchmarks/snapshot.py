"""What a snapshot in memory after every step costs: throughput with and without, beside torch DCP's `async_save` and
lm-resiliency.

    python benchmarks/snapshot.py [--workers 2] [--dcp-folder /dev/shm]                  CPU: a widened tiny model
    python benchmarks/snapshot.py --workers 6 --nodes 6 --parity 2                       memory of RS(4+2)
    python benchmarks/snapshot.py --device cuda --model 3b --seq-len 4096 --batch 2 --accumulation 4     one GPU, no Ray
    python benchmarks/snapshot.py --device cuda --model 3b --seq-len 4096 --batch 4 --accumulation 4 --states host

One run: blocks of steps without and with, in turn, in the same processes. A block of "with" begins with a step that is
not counted, so that the clock starts and ends with one snapshot under way: all work in the background is in the figure,
and the encoding and sealing of the nodes' processes share the cores. Ratio: median over the rounds of the steps' time
without divided by that with, each a block, and the interval that holds the true median in 95 of 100 such runs (from six
rounds on). CPU time is this process's, all its threads: what a snapshot takes of cores that training would have, which
others on the machine disturb less; that of the nodes' processes is in `node_s`. `--threads`: of torch, a worker; fewer
than its share leave cores idle, as GPUs do. `--nodes`: so many snapshot processes on this machine, the workers spread
over them. With `--states host` "copied" is what it would cost to copy the states that updates leave in the segment.

The others save the same tensors after every step under the same rule, one save at a time. DCP writes to `--dcp-folder`
(default: a tmpfs, as fast as can be), as it comes and with all it has to get out of the way ("by a process").
lm-resiliency (`pip install lm-resiliency`, left out with a word where it is not there) keeps two copies on this rank
and, with several workers, two of another's; with one worker nothing leaves the process, whose death it does not
survive. "memory" is what is held in host memory for two versions over the state; that PyTorch rounds pinned memory up
is not in lm-resiliency's own figure. The last line printed is one JSON object.
"""

import argparse
import gc
import json
import math
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
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.report import write_report  # noqa: E402
from checkpoint import CheckpointOptions, rng_state  # noqa: E402
from checkpoint.ranks import Ranks  # noqa: E402
from checkpoint.snapshots.process import start_process  # noqa: E402
from checkpoint.snapshots.rank import Snapshots  # noqa: E402
from checkpoint.snapshots.roster import Roster  # noqa: E402
from checkpoint.snapshots.segment_files import FOLDER  # noqa: E402

ROUNDS_SHARE = 0.8
"""Of --timeout-s, after which no side begins another round but its first."""


class Took(NamedTuple):
    """A block, per step."""

    wall_s: float
    cpu_s: float
    """Of this process, all its threads."""


class Training:
    """An engine and its steps; `step` returns once the device has done it."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int) -> None:
        from benchmarks.in_memory import preset
        from offload import OffloadOptions
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
        options = preset(args.model) if args.model else wide
        job = Job(
            model=options,
            train=TrainOptions(
                seq_len=args.seq_len,
                global_batch_size=args.batch * args.accumulation * world,
                micro_batch_size=args.batch,
            ),
            optimizer=OptimizerOptions(lr=1e-5),
            parallel=ParallelOptions(),
            offload=OffloadOptions(states=args.states),
        )
        torch.manual_seed(0)
        where = Rank(rank, world, torch.device("cuda", 0) if self.cuda else torch.device("cpu"))
        dtype, _ = choose_dtype("auto", where.device)
        vocab = options.vocab_size or 256
        model = build_model(job.model, vocab_size=vocab, seq_len=args.seq_len, dtype=dtype, device=where.device)
        self.num_params = sum(p.numel() for p in model.parameters())
        self.engine = build_engine(job, model, where, dtype)
        self.rows = torch.randint(0, vocab, (args.batch, args.seq_len + 1), device=where.device)
        self.world, self.number, self.accumulation = world, 0, args.accumulation
        self.lazily = args.states == "host"
        self._until = time.monotonic() + ROUNDS_SHARE * args.timeout_s

    def pieces(self) -> Any:
        """As the trainer hands them over."""
        return self.engine.pieces if self.lazily else self.engine.pieces()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{p.name}/{p.kind}/{p.start}": p.tensor.detach() for p in self.engine.pieces()}

    def step(self, before_update: Callable[[], None], after: Callable[[int], None]) -> None:
        rows, most = self.rows, self.accumulation
        self.engine.expect(1e-5)
        for number in range(most):
            first, last = number == 0, number == most - 1
            self.engine.forward_backward(rows[:, :-1], rows[:, 1:], scale=1 / self.world / most, first=first, last=last)
        before_update()
        self.engine.step(1e-5, 1.0)
        self.number += 1
        after(self.number)

    def block(self, steps: int, before_update: Callable[[], None], after: Callable[[int], None]) -> Took:
        """Steps, after one that does not count."""
        self.step(before_update, after)
        self._meet()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step(before_update, after)
        self._meet()
        return Took((time.perf_counter() - start) / steps, (time.process_time() - cpu) / steps)

    def goes_on(self) -> bool:
        """Whether there is time for another round; the same on every rank."""
        left = torch.tensor(float(time.monotonic() < self._until))
        if self.world > 1:
            dist.all_reduce(left, dist.ReduceOp.MIN)
        return bool(left)

    def _meet(self) -> None:
        """Every rank has done its steps; what copies of a snapshot beside them goes on."""
        if self.cuda:
            torch.cuda.current_stream().synchronize()
        if self.world > 1:
            dist.barrier()


def nothing(*_: object) -> None:
    pass


def interval(ordered: list[float]) -> list[float] | None:
    """What holds the true median with at least 95% (order statistics; no distribution is assumed). None: fewer than six
    samples never do."""
    n, found = len(ordered), None
    for below in range(n // 2):  # so many of the smallest and of the largest lie outside
        if 2 * sum(math.comb(n, less) for less in range(below + 1)) / 2**n <= 0.05:
            found = [ordered[below], ordered[n - 1 - below]]
    return found


def versus(
    training: Training, args: argparse.Namespace, *act: Callable[..., None], settle: Callable[[], None]
) -> dict[str, Any]:
    """Ratios and seconds a step of blocks without and with `act`, in turn; which comes first changes each round."""
    rounds: list[tuple[Took, Took]] = []
    for number in range(args.rounds):
        if number and not training.goes_on():
            break
        found = {}
        for side in ("without", "with")[:: 1 if number % 2 == 0 else -1]:
            found[side] = training.block(args.steps, *(act if side == "with" else (nothing, nothing)))
            settle()
        rounds.append((found["without"], found["with"]))
    row: dict[str, Any] = {"rounds": len(rounds)}
    for prefix, seconds, what in (("", "step_s", "wall_s"), ("cpu_", "cpu_s", "cpu_s")):
        pairs = [(getattr(without, what), getattr(with_, what)) for without, with_ in rounds]
        ratios = sorted(without / with_ for without, with_ in pairs)
        holds = interval(ratios)
        row |= {
            f"{prefix}ratio": round(statistics.median(ratios), 4),
            f"{prefix}interval": holds and [round(ratio, 4) for ratio in holds],
            f"{prefix}ratios": [round(ratio, 4) for ratio in ratios],
            f"{seconds}_without": round(statistics.median(pair[0] for pair in pairs), 4),
            f"{seconds}_with": round(statistics.median(pair[1] for pair in pairs), 4),
        }
    return row


def measure_snapshots(
    training: Training, args: argparse.Namespace, ranks: Ranks, folder: Path, *, copied: bool = False
) -> dict[str, Any]:
    """copied: states in host memory are not updated into the segment, but copied there."""
    options = CheckpointOptions(snapshot_every_steps="1", parity=args.parity)
    found = start_nodes(args, ranks.world, folder).dumps() if ranks.rank == 0 else b""
    roster = Roster.loads(ranks.tell(found))
    snapshots = Snapshots(roster, options, ranks, print)
    try:
        movable = None if copied else training.engine.movable()
        snapshots.start(training.engine.pieces(), rng_state(), {"step": 0}, movable)

        def save(step: int) -> None:
            snapshots.save(step, training.pieces(), rng_state(), {"step": step})

        training.block(1, snapshots.wait_copied, save)
        snapshots.wait_copied()
        snapshots.wait()
        before = len(snapshots.stats.stall_s)
        snapshots.stats.copy_s.clear()

        def settle() -> None:
            snapshots.wait()  # first: what a block's last copy takes after it is no stall
            snapshots.wait_copied()
            if snapshots.error() is not None:
                raise SystemExit(f"a snapshot failed: {snapshots.error()}")

        row = versus(training, args, snapshots.wait_copied, save, settle=settle)
        stats = snapshots.stats
        stats.count()
        stalls = stats.stall_s[before:]
        if not stalls:
            raise SystemExit("no snapshot was taken")
        states = [int(size) for size in ranks.gather(str(stats.state_bytes).encode())] or [stats.state_bytes]
        moved = [int(size) for size in ranks.gather(str(stats.copied_bytes).encode())] or [stats.copied_bytes]
        segments = [path.stat().st_size for path in Path(FOLDER).glob(f"atoll-{roster.run.hex()}-*")]
        return {
            "side": "snapshots, copied" if copied else "snapshots", **row, "taken": stats.taken,
            "copied_bytes": sum(moved),
            "stall_ms": round(1e3 * statistics.median(stalls), 3),
            "stall_ms_worst": round(1e3 * max(stalls), 3),
            "copy_ms": round(1e3 * statistics.median(stats.copy_s), 1), "state_bytes": sum(states),
            "memory_over_state": round(sum(segments) / sum(states), 3),
            "code": f"RS({args.nodes - args.parity}+{args.parity})" if args.parity else "none",
            "node_s": {name: round(value, 4) for name, value in stats.node_s.items()},
        }  # fmt: skip
    finally:
        snapshots.close(dropped=True)


def measure_dcp(
    training: Training, args: argparse.Namespace, ranks: Ranks, folder: Path, *, by_process: bool = False
) -> dict[str, Any]:
    """`torch.distributed.checkpoint.async_save` of the same tensors: it stages them, then writes in a thread.

    by_process: with all it has to get out of the way: staged into shared memory, on a GPU pinned and on a stream of its
    own beside the next step, and written by several threads of a process of its own, without fsync.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    group = dist.new_group(backend="gloo")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # where its process meets those of other ranks
    stager = DefaultStager(StagingOptions(training.cuda, True, training.cuda, training.cuda)) if by_process else None
    if stager is not None:  # torch 2.11.0 closes it after its first save (pytorch#183413); the memory it pins is kept
        vars(stager._state_dict_stager)["close"] = nothing
    kind = AsyncCheckpointerType.PROCESS if by_process else AsyncCheckpointerType.THREAD
    staged_before = training.tensors() if by_process else {}  # it keeps its memory for as long as there are these
    stalls: list[float] = []
    saves: list[tuple[Any, Any, Path]] = []

    def settle() -> None:
        while saves:
            _, written, path = saves.pop()
            written.result()
            ranks.gather(b"done")  # nobody removes what another still writes
            if ranks.rank == 0:
                shutil.rmtree(path)

    def wait_staged() -> None:
        start = time.perf_counter()
        for staged, *_ in saves:
            staged.result()
        if stalls:
            stalls[-1] += time.perf_counter() - start

    def save(step: int) -> None:
        start = time.perf_counter()
        settle()
        path = folder / f"dcp-{step}"
        writer = dcp.FileSystemWriter(path, single_file_per_rank=False, sync_files=False, thread_count=args.dcp_threads)
        answer = dcp.async_save(
            training.tensors(), checkpoint_id=str(path), storage_writer=writer if by_process else None,
            process_group=group, async_checkpointer_type=kind, async_stager=stager,
        )  # fmt: skip
        if isinstance(answer, AsyncSaveResponse):
            saves.append((answer.staging_completion, answer.upload_completion, path))
        else:
            saves.append((SimpleNamespace(result=nothing), answer, path))
        stalls.append(time.perf_counter() - start)

    training.step(nothing, save)
    settle()
    stalls.clear()
    rounds = args.dcp_rounds or args.rounds
    row = versus(training, argparse.Namespace(**vars(args) | {"rounds": rounds}), wait_staged, save, settle=settle)
    size = sum(tensor.nbytes for tensor in training.tensors().values())
    staged_before.clear()
    if stager is not None:
        del vars(stager._state_dict_stager)["close"]
        stager.close()
    return {
        "side": f"torch DCP async_save{', by a process' if by_process else ''}", **row,
        "stall_ms": round(1e3 * statistics.median(stalls), 1), "stall_ms_worst": round(1e3 * max(stalls), 1),
        "state_bytes": size * ranks.world,
    }  # fmt: skip


def measure_lm_resiliency(
    training: Training, args: argparse.Namespace, ranks: Ranks, folder: Path
) -> dict[str, Any] | None:
    """Its in-memory checkpoint, without its disk: what `enable_resiliency` hooks to a PyTorch loop."""
    try:
        from lm_resiliency import InMemoryCkptConfig
        from lm_resiliency.checkpointing.manager import InMemoryCheckpointManager
    except ImportError as error:
        print(f"lm-resiliency is left out: {error}", flush=True)
        return None
    # One worker has no peer: "replicas" by themselves, so that it keeps two copies and not four.
    alone = SimpleNamespace(dp_replicate=2, dp_shard=2) if ranks.world == 1 else None
    config = InMemoryCkptConfig(interval=1, disk_flush_interval=0, disk_folder=str(folder / "lmr"), run_id="benchmark")
    manager = InMemoryCheckpointManager(config, parallelism_info=alone)
    stalls: list[float] = []

    def save(step: int) -> None:
        start = time.perf_counter()
        manager.save_tensors(list(training.tensors().values()), step)
        stalls.append(time.perf_counter() - start)

    def wait() -> None:
        start = time.perf_counter()
        manager.maybe_wait()
        if stalls:
            stalls[-1] += time.perf_counter() - start

    def settle() -> None:
        manager.finalize_replication()

    training.block(1, wait, save)
    settle()
    stalls.clear()
    row = versus(training, args, wait, save, settle=settle)
    size = sum(tensor.nbytes for tensor in training.tensors().values())
    held = manager._buffer_pool.total_memory_bytes()
    manager.close()
    return {
        "side": "lm-resiliency", **row, "stall_ms": round(1e3 * statistics.median(stalls), 3),
        "stall_ms_worst": round(1e3 * max(stalls), 3), "state_bytes": size * ranks.world,
        "memory_over_state": round(held / size, 3),
    }  # fmt: skip


def start_nodes(args: argparse.Namespace, world: int, folder: Path) -> Roster:
    run, token = secrets.token_bytes(16), secrets.token_bytes(32)
    nodes = tuple(
        start_process(run, f"n{number}", token, hold_s=60, log=folder / f"n{number}.log")
        for number in range(args.nodes)
    )
    return Roster(run=run, token=token, nodes=nodes, rank_nodes=tuple(r * args.nodes // world for r in range(world)))


def worker(args: argparse.Namespace, rank: int, port: int) -> None:
    world = args.workers
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // world))
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
        sides: list[Callable[..., dict[str, Any] | None]] = [measure_snapshots]
        sides += [partial(measure_snapshots, copied=True)] if "copied" in args.beside and args.states == "host" else []
        sides += [measure_lm_resiliency] if "lmr" in args.beside else []
        sides += [partial(measure_dcp, by_process=True)] if "dcp-process" in args.beside else []
        sides += [measure_dcp] if "dcp" in args.beside else []
        common = {"workers": world, "device": args.device, "model": args.model or f"dim {args.dim}"}
        common |= {"params": training.num_params, "states": args.states, "nodes": args.nodes}
        common |= {"tokens_a_step": args.batch * args.accumulation * world * args.seq_len}
        for measure in sides:
            if (row := measure(training, args, ranks, folder)) and rank == 0:
                print("ROW", json.dumps(common | row), flush=True)
            gc.collect()
            if training.cuda:
                torch._C._host_emptyCache()  # twice the state, which the next one may need
    dist.barrier()
    training.engine.close()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="", help="a preset of conf/model; without it a Llama of 4 blocks of --dim")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="sequences a worker and step")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of --batch sequences a step")
    parser.add_argument("--workers", type=int, default=1, help="on a GPU: 1")
    parser.add_argument("--threads", type=int, default=0, help="of torch, a worker; default: its share of the cores")
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dcp-rounds", type=int, default=0, help="of DCP's blocks, which may be slow; default --rounds"
    )
    parser.add_argument("--dcp-threads", type=int, default=8, help="that write, of its process")
    parser.add_argument("--nodes", type=int, default=1, help="snapshot processes")
    parser.add_argument("--parity", type=int, default=0)
    parser.add_argument("--states", choices=("none", "host"), default="none", help="host: offload.states=host")
    sides = ("copied", "lmr", "dcp-process", "dcp")
    parser.add_argument("--beside", nargs="*", choices=sides, default=list(sides))
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
            said, ended = crew[0].communicate(timeout=args.timeout_s)[0], ""
            codes = [process.wait(timeout=60) for process in crew]
        except subprocess.TimeoutExpired:
            crew[0].kill()
            said, codes, ended = crew[0].communicate()[0], [], f"cut off after --timeout-s {args.timeout_s:g}"
        finally:
            for process in crew:
                process.kill()
    rows = [json.loads(line.removeprefix("ROW ")) for line in said.splitlines() if line.startswith("ROW ")]
    if any(codes):
        ended = f"the workers ended with {codes}"
    if not rows:
        sys.exit(f"{ended}\n{said}")
    if ended:
        print(ended)
        rows.append({"side": "the rest", "failed": ended})
    for row in rows:
        if "failed" in row:
            continue
        print(
            f"{row['side']:22} ratio {row['ratio']:.4f} {row['interval'] or ''}"
            f"  CPU time {row['cpu_ratio']:.4f} {row['cpu_interval'] or ''}"
            f"  step {row['step_s_without']:.4f} -> {row['step_s_with']:.4f} s"
            f"  stall {row['stall_ms']:.2f} ms  state {row['state_bytes'] / 1e6:.0f} MB"
            f"  memory {row.get('memory_over_state', '')}"
        )
    gpu = torch.cuda.get_device_name(0) if args.device == "cuda" else "no GPU"
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, load average {load:.1f} at the start"
    name = f"snapshot_{args.device}_{args.workers}{'_host' if args.states == 'host' else ''}.json"
    write_report(args.out or str(HERE / "results" / name), hardware, rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
