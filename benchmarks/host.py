"""What host memory and a drive give, and what share of it Atoll's parts reach. All sides in turn, in one run.

    python benchmarks/host.py --numel 33554432 --folder /path/on/the/drive

Memory: GB/s read and written, counted at 28 bytes a parameter for every AdamW (torch's and DeepSpeed's read an fp32
gradient and write no bf16 weight: 28 too). The yardstick is the fastest of the copies, read plus written bytes.
Drive: GB/s of a plain loop of preadv and pwritev on a file opened with O_DIRECT, by as many threads and in requests as
large as the tier's, and from memory of the same kind (`Arena`, for_drives); beside them the tier from an arena's usual
pages. Figures are medians over the rounds, ratios are taken within a round.
"""

import argparse
import math
import mmap
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from benchmarks.report import write_report  # noqa: E402
from offload.adamw import State, accumulate, adamw, copy, sum_of_squares  # noqa: E402
from offload.arena import Arena  # noqa: E402
from offload.hostpool import HostPool  # noqa: E402
from offload.nvme import NvmeTier  # noqa: E402

HYPER: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STATE = [torch.float32] * 3
Side = tuple[float, Callable[[], object]]
"""Bytes that one call moves, and the call."""


def turns(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """GB/s of each side in each round, after one round that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, (size_bytes, work) in sides.items():
            start = time.perf_counter()
            work()
            rates[name].append(size_bytes / (time.perf_counter() - start) / 1e9)
    return {name: found[1:] for name, found in rates.items()}


def three(tensors: list[Tensor]) -> State:
    master, exp_avg, exp_avg_sq = tensors
    return master, exp_avg, exp_avg_sq


def deepspeed_adam(master: Tensor, grad: Tensor) -> Callable[[], object] | None:
    """DeepSpeed's step, or None where its extension is not there or does not build."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        parameter = torch.nn.Parameter(master)
        parameter.grad = grad
        optimizer = DeepSpeedCPUAdam([parameter], lr=1e-3, weight_decay=0.1, adamw_mode=True)
        optimizer.step()
    except Exception as error:
        print(f"DeepSpeedCPUAdam: not measured ({type(error).__name__}: {str(error).splitlines()[0][:100]})")
        return None
    step: Callable[[], object] = optimizer.step
    return step


def memory_rows(numel: int, rounds: int, threads: int | None) -> list[dict[str, Any]]:
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    with HostPool(threads) as pool:
        start = time.perf_counter()
        arena = Arena(2 * 30 * numel + (8 << 20), pool=pool)
        taken_s = time.perf_counter() - start
        # in the order in which they lie: the state, the next version, gradient, weight
        together = arena.take_together(numel, [*STATE, *STATE, torch.bfloat16, torch.bfloat16])
        paged = [
            arena.take(numel, dtype, align=mmap.PAGESIZE) for dtype in (*STATE, *STATE, torch.bfloat16, torch.bfloat16)
        ]
        for tensors in (together, paged):
            for tensor in tensors:
                tensor.copy_(torch.rand(1 << 16).repeat(-(-numel // (1 << 16)))[:numel])
        state, beside = three(together[:3]), three(together[3:6])
        paged_state, paged_beside = three(paged[:3]), three(paged[3:6])
        grad, weight = together[6:]
        fp32_grad = torch.rand(numel)
        moments = [torch.zeros(numel), torch.zeros(numel)]
        parameter, step = torch.rand(numel), torch.tensor(3.0)
        copies = list(zip(beside, state, strict=True))
        paged_copies = list(zip(paged_beside, paged_state, strict=True))

        def copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
            for into, source in pairs:
                copy(into, source, pool=pool)

        def fused() -> None:
            torch._fused_adamw_(
                [parameter], [fp32_grad], [moments[0]], [moments[1]], [], [step], lr=1e-3, beta1=0.9, beta2=0.95,
                weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip

        sides: dict[str, Side] = {
            "copy": (24 * numel, lambda: copy_all(copies)),
            "copy, each array at a page": (24 * numel, lambda: copy_all(paged_copies)),
            "torch copy": (24 * numel, lambda: [into.copy_(source) for into, source in copies]),
            "adamw in place": (28 * numel, lambda: adamw(*state, grad, weight, updates=3, pool=pool, **HYPER)),
            "adamw, the weight alone": (
                16 * numel,
                lambda: adamw(*state, grad, weight, updates=3, weight_alone=True, pool=pool, **HYPER),
            ),
            "adamw, the states alone": (26 * numel, lambda: adamw(*state, grad, None, updates=3, pool=pool, **HYPER)),
            "adamw ping-pong": (
                28 * numel,
                lambda: adamw(*state, grad, weight, updates=3, out=beside, pool=pool, **HYPER),
            ),
            "adamw ping-pong, each array at a page": (
                28 * numel,
                lambda: adamw(*paged_state, paged[6], paged[7], updates=3, out=paged_beside, pool=pool, **HYPER),
            ),
            "sum_of_squares bf16": (2 * numel, lambda: sum_of_squares(grad, pool=pool)),
            "accumulate bf16": (10 * numel, lambda: accumulate(beside[0], grad, pool=pool)),
            "torch fused AdamW fp32": (28 * numel, fused),
        }
        if (step_of_deepspeed := deepspeed_adam(torch.rand(numel), fp32_grad)) is not None:
            sides["DeepSpeedCPUAdam fp32"] = (28 * numel, step_of_deepspeed)
        rates = turns(sides, rounds)
        fastest = max((name for name in rates if "copy" in name), key=lambda name: statistics.median(rates[name]))
        rows = table(rates, fastest, "memory")
        for row in rows:
            if "dam" in row["side"]:
                row["gparams_per_s"] = round(row["gb_per_s"] / 28, 3)
        rows.append({"part": "memory", "side": "arena taken", "gb_per_s": round(arena.size_bytes / taken_s / 1e9, 2)})
        arena.close()
    return rows


def drive_rows(folder: Path, size_bytes: int, rounds: int, depth: int, request_bytes: int) -> list[dict[str, Any]]:
    half = size_bytes // 2
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tier = NvmeTier([Path(scratch)], size_bytes, depth=depth, stripe_bytes=request_bytes)
        plain = Path(scratch, "plain")
        handle = os.open(plain, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(handle, 0, size_bytes)
        with Arena(size_bytes, for_drives=True) as arena, Arena(size_bytes) as other:
            memory, shared = (
                slab.take(size_bytes, torch.uint8, align=mmap.PAGESIZE).random_(0, 256) for slab in (arena, other)
            )
            view = memory.numpy().data
            unit = max(request_bytes, 32 << 20)  # what a request of the engine is: a unit's shard

            def plain_loop(acts: list[tuple[Callable[..., int], int]]) -> None:
                work = iter(acts)
                lock = threading.Lock()

                def serve() -> None:
                    while True:
                        with lock:
                            item = next(work, None)
                        if item is None:
                            return
                        call, offset = item
                        end = min(size_bytes, offset + request_bytes)
                        assert call(handle, [view[offset:end]], offset) == end - offset

                crew = [threading.Thread(target=serve) for _ in range(depth)]
                for thread in crew:
                    thread.start()
                for thread in crew:
                    thread.join()

            def starts(first: int, last: int) -> list[int]:
                return list(range(first, last, request_bytes))

            def mixed() -> list[tuple[Callable[..., int], int]]:
                pairs = zip(starts(0, half), starts(half, size_bytes), strict=False)
                return [act for read, write in pairs for act in ((os.preadv, read), (os.pwritev, write))]

            def tier_mixed(memory: Tensor) -> None:
                answers = []
                for place in range(0, half, unit):
                    answers.append(tier.load(place, memory[place : place + unit][: half - place]))
                    answers.append(tier.store(half + place, memory[half + place : half + place + unit]))
                for answer in answers:
                    answer.result()

            def tier_all(act: Callable[[int, Tensor], Any]) -> None:
                for answer in [act(place, memory[place : place + unit]) for place in range(0, size_bytes, unit)]:
                    answer.result()

            sides: dict[str, Side] = {
                "plain write": (size_bytes, lambda: plain_loop([(os.pwritev, o) for o in starts(0, size_bytes)])),
                "tier write": (size_bytes, lambda: tier_all(tier.store)),
                "plain read": (size_bytes, lambda: plain_loop([(os.preadv, o) for o in starts(0, size_bytes)])),
                "tier read": (size_bytes, lambda: tier_all(tier.load)),
                "plain mixed": (size_bytes, lambda: plain_loop(mixed())),
                "tier mixed": (size_bytes, lambda: tier_mixed(memory)),
                "tier mixed, usual pages": (size_bytes, lambda: tier_mixed(shared)),
            }
            rates = turns(sides, rounds)
        os.close(handle)
        tier.close()
    return [row for kind in ("write", "read", "mixed") for row in table(
        {name: found for name, found in rates.items() if kind in name}, f"plain {kind}", "drive")]  # fmt: skip


def table(rates: dict[str, list[float]], yardstick: str, part: str) -> list[dict[str, Any]]:
    """Median rate, and median of the ratios to the yardstick of the same round with its quartiles."""
    rows = []
    for name, found in rates.items():
        ratios = [rate / base for rate, base in zip(found, rates[yardstick], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({
            "part": part, "side": name, "gb_per_s": round(statistics.median(found), 2), "best": round(max(found), 2),
            "yardstick": yardstick, "ratio": round(middle, 3), "ratio_quartiles": [round(low, 3), round(high, 3)],
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 25, help="parameters; must be far larger than the caches")
    parser.add_argument("--threads", type=int, help="default: every core")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="on the drive to measure; without it the drive is left out")
    parser.add_argument("--drive-bytes", type=int, default=1 << 30)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--request-bytes", type=int, default=2 << 20)
    parser.add_argument("--out", default=str(HERE / "results" / "host.json"))
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rows = memory_rows(args.numel, args.rounds, args.threads)
    if args.folder is not None:
        rows += drive_rows(
            args.folder, args.drive_bytes, max(3, math.ceil(args.rounds / 2)), args.depth, args.request_bytes
        )
    for row in rows:
        low, high = row.get("ratio_quartiles", (math.nan, math.nan))
        rate, best = row["gb_per_s"], row.get("best", math.nan)
        ratio = f"{row.get('ratio', math.nan):6.3f} {low:6.3f} {high:6.3f}"
        print(
            f"{row['part']:7} {row['side']:38} {rate:7.2f} GB/s, best {best:7.2f}; to {row.get('yardstick')}: {ratio}"
        )
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, load average {load:.1f} at the start"
    write_report(args.out, hardware, rows)


if __name__ == "__main__":
    main()
