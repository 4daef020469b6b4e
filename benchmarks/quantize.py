"""The quantization kernels beside a copy on the same device, and their bits beside the CPU's.

    python benchmarks/quantize.py [--numel N] [--block 256] [--rounds 7] [--tune [BELOW]]

A kernel's GB/s counts the bytes it has to read and write. Copy and kernel take turns; a figure is the median over
rounds of the ratio within a round, so that whatever else the machine does hits both. On CUDA the buffers are much
larger than its cache; on CPU each thread count has rows of its own.

On CUDA every case runs on a small input first, with blocks of all magnitudes, infinities and NaN, and has to give the
CPU's bits. ``--tune`` then tries other settings (`parallel.quantize_kernels.SETTINGS`) for each kernel that has a case
under BELOW of the copy, compiled by several processes at once, measures with those whose worst case is the best, and
prints them: the module is not changed. Writes benchmarks/results/quantize_<device>.json.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.report import write_report  # noqa: E402
from parallel.quantize import Format, dequantize, dequantize_sum, dequantize_sum_quantize, quantize  # noqa: E402

TARGET = 0.8
"""On CUDA: the share of the copy's bandwidth."""
SMALL = 1 << 22
"""Elements where bits are compared or kernels compiled."""
TRIED = (
    (1024, 1, (4, 8, 16)),
    (2048, 1, (8, 16)),
    (2048, 2, (4, 8, 16)),
    (4096, 2, (8, 16)),
    (4096, 4, (4, 8, 16)),
    (8192, 4, (16,)),
)
"""Tile, warps and vectors."""
SPLIT = (
    (2048, 1, 8, 2), (2048, 1, 16, 2), (2048, 1, 16, 2, 80), (4096, 2, 16, 2), (4096, 2, 16, 2, 80), (8192, 4, 16, 2)
)  # fmt: skip
"""Tile, warps, vector, split and registers: what is tried besides for fused kernels."""


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    """Which of the kernels' settings it runs with."""
    run: Callable[[], None]
    size_bytes: int
    """That it reads and writes."""
    outs: tuple[Tensor, ...]
    """What it writes."""


def drawn(numel: int, device: str) -> Tensor:
    """(numel) fp32, the same on every device: block by block another magnitude, here and there inf, NaN or zeros."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1 << 11, 512, generator=generator)
    rows *= torch.exp2(torch.randint(-40, 40, (len(rows), 1), generator=generator))
    rows[5, 7], rows[77, 300], rows[78, 0], rows[100] = torch.inf, torch.nan, -torch.inf, 0.0
    return rows.flatten().to(device).repeat(-(-numel // rows.numel()))[:numel]


def cases(numel: int, block: int, device: str) -> list[Case]:
    """Of `numel` elements, whole blocks."""
    found: list[Case] = []
    fp32 = drawn(numel, device)
    values = {"fp32": fp32, "bf16": fp32.bfloat16()}
    residual = torch.zeros(numel, device=device)
    outs = {name: torch.empty_like(tensor) for name, tensor in values.items()}
    for bits in (8, 4):
        fmt = Format(bits, block)
        packed = torch.empty(fmt.packed_bytes(numel), dtype=torch.uint8, device=device)
        for name, tensor in values.items():

            def pack(tensor: Tensor = tensor, fmt: Format = fmt, packed: Tensor = packed) -> None:
                quantize(tensor, fmt, packed)

            def feed(tensor: Tensor = tensor, fmt: Format = fmt, packed: Tensor = packed) -> None:
                quantize(tensor, fmt, packed, residual=residual)

            def unpack(out: Tensor = outs[name], fmt: Format = fmt, packed: Tensor = packed) -> None:
                dequantize(packed, fmt, out)

            size = tensor.nbytes + packed.nbytes
            fed = size + 2 * residual.nbytes
            found += [
                Case(f"quantize {name} -> int{bits}", f"quantize {name}", pack, size, (packed,)),
                Case(f"quantize {name} -> int{bits}, feedback", "quantize feedback", feed, fed, (packed, residual)),
                Case(f"dequantize int{bits} -> {name}", f"dequantize {name}", unpack, size, (outs[name],)),
            ]
        for parts in (2, 8):
            found += _sums(fp32, outs, residual, fmt, parts)
    return found


def _sums(fp32: Tensor, outs: dict[str, Tensor], residual: Tensor, fmt: Format, parts: int) -> list[Case]:
    """Of `parts` chunks that share the elements of `fp32`."""
    found: list[Case] = []
    few = len(fp32) // parts // 4096 * 4096
    received = torch.empty(parts * fmt.packed_bytes(few), dtype=torch.uint8, device=fp32.device)
    quantize(fp32[: parts * few], fmt, received, chunks=parts)
    for name, whole in outs.items():

        def add(out: Tensor = whole[:few]) -> None:
            dequantize_sum(received, fmt, out, chunks=parts)

        size = received.nbytes + few * whole.element_size()
        found.append(Case(f"sum {parts} x int{fmt.bits} -> {name}", f"sum {name}", add, size, (whole[:few],)))
    for out_bits, feedback in itertools.product((8, 4), (False, True)):
        out_fmt = Format(out_bits, fmt.block)
        again = torch.empty(out_fmt.packed_bytes(few), dtype=torch.uint8, device=fp32.device)
        lost = residual[:few] if feedback else None

        def fused(out_fmt: Format = out_fmt, again: Tensor = again, lost: Tensor | None = lost) -> None:
            dequantize_sum_quantize(received, fmt, again, out_fmt, chunks=parts, residual=lost)

        name = f"sum {parts} x int{fmt.bits} -> int{out_bits}" + (", feedback" if feedback else "")
        size = received.nbytes + again.nbytes + (8 * few if feedback else 0)
        written = (again,) if lost is None else (again, lost)
        found.append(Case(name, _fused_kind(parts, fmt, feedback, fp32.device), fused, size, written))
    return found


def _fused_kind(parts: int, fmt: Format, feedback: bool, device: torch.device) -> str:
    """Empty on a CPU: only kernels have settings, and Triton is not there."""
    if device.type == "cpu":
        return ""
    from parallel.quantize_kernels import fused_kind

    return fused_kind(parts, fmt.bits, feedback)


def different(block: int) -> list[str]:
    """The cases whose bits on CUDA are not the CPU's."""
    names = []
    for here, there in zip(cases(SMALL, block, "cpu"), cases(SMALL, block, "cuda"), strict=True):
        here.run()
        there.run()
        if not all(_same_bits(a, b.cpu()) for a, b in zip(here.outs, there.outs, strict=True)):
            names.append(here.name)
    return names


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """But for which NaN a NaN is."""
    if a.is_floating_point():
        a, b = (torch.where(x.isnan(), torch.nan, x).view(torch.int32 if x.itemsize == 4 else torch.int16)
                for x in (a, b))  # fmt: skip
    return torch.equal(a, b)


def seconds(function: Callable[[], None], cuda: bool, repeats: int) -> float:
    if not cuda:
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats
    start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return float(start_event.elapsed_time(end)) / 1e3 / repeats


def compare(case: Case, copy: Callable[[], None], copy_bytes: int, rounds: int, cuda: bool) -> dict[str, Any]:
    case.run()  # compiles
    repeats = 10 if cuda else 1
    rates, copies = [], []
    for _ in range(rounds):
        copies.append(copy_bytes / seconds(copy, cuda, repeats) / 1e9)
        rates.append(case.size_bytes / seconds(case.run, cuda, repeats) / 1e9)
    ratios = [rate / copied for rate, copied in zip(rates, copies, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return {
        "case": case.name, "GB_per_s": round(statistics.median(rates), 1),
        "copy_GB_per_s": round(statistics.median(copies), 1), "ratio": round(ratio, 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)], "bytes": case.size_bytes,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- tuning


def compile_here(kind: str, setting: tuple[int, ...], block: int) -> None:
    """In a process of its own: fills the disk's cache of compiled kernels."""
    from parallel import quantize_kernels as kernels

    kernels.SETTINGS[kind] = kernels.Setting(*setting)
    for case in cases(SMALL, block, "cuda"):
        if case.kind == kind:
            case.run()
    torch.cuda.synchronize()


def tune(all_cases: list[Case], copy: Callable[[], None], copy_bytes: int, below: float, block: int) -> None:
    """Set the best settings of the kernels that have a case under `below`, and print what was found."""
    from parallel import quantize_kernels as kernels

    first = {case.name: compare(case, copy, copy_bytes, 3, True)["ratio"] for case in all_cases}
    for name, ratio in first.items():
        print(f"{name:34} {ratio:.3f} before tuning", flush=True)
    kinds = list(dict.fromkeys(case.kind for case in all_cases if first[case.name] < below))
    plain = [(tile, warps, vector) for tile, warps, vectors in TRIED for vector in vectors]
    tried = {kind: [*plain, *(SPLIT if kind.startswith("fused") else ())] for kind in kinds}
    started = time.perf_counter()
    workers = max(1, min(16, len(os.sched_getaffinity(0)) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compile_here, kind, setting, block) for kind in kinds for setting in tried[kind]]
        for job in jobs:
            job.result()
    print(f"compiled {len(jobs)} settings of {', '.join(kinds) or 'nothing'} in {time.perf_counter() - started:.0f} s")
    for kind in kinds:
        found = []
        for setting in tried[kind]:
            kernels.SETTINGS[kind] = kernels.Setting(*setting)
            rows = [compare(case, copy, copy_bytes, 1, True)["ratio"] for case in all_cases if case.kind == kind]
            found.append((min(rows), setting, rows))
        found.sort(key=lambda item: item[0], reverse=True)
        kernels.SETTINGS[kind] = kernels.Setting(*found[0][1])
        print(f"{kind}: tile, warps, vector, split, registers; the ratio of each case")
        for _, setting, rows in found:
            print(f"  {setting!s:16} " + " ".join(f"{ratio:.3f}" for ratio in rows), flush=True)
    print("SETTINGS of this run: " + ", ".join(f'"{kind}": {kernels.SETTINGS[kind]}' for kind in kinds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--numel", type=int, help="a multiple of 32768 (2^30 on CUDA, 2^24 on CPU)")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--tune", type=float, nargs="?", const=0.85, metavar="BELOW", help="on CUDA; 0.85 if not said")
    parser.add_argument("--out")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if args.tune and not cuda:
        parser.error("--tune is for --device cuda")
    numel = args.numel or (1 << 30 if cuda else 1 << 24)
    all_cases = [case for case in cases(numel, args.block, args.device) if args.only in case.name]
    source = torch.empty(numel, device=args.device).fill_(1.0)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    if args.tune:
        tune(all_cases, copy, 2 * source.nbytes, args.tune, args.block)
    wrong = different(args.block) if cuda else []
    rows = measured(all_cases, copy, 2 * source.nbytes, args.rounds, wrong if cuda else None)
    hardware = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores"
    out = args.out or str(HERE / "results" / f"quantize_{args.device}.json")
    write_report(out, f"{hardware}; {numel} elements, blocks of {args.block}", rows)
    if cuda:
        worst = min(rows, key=lambda row: row["ratio"])
        print(f"worst: {worst['case']} at {worst['ratio']:.3f} of the copy, the target is {TARGET}")
        print(
            f"bits: {len(rows) - len(wrong)} of {len(rows)} cases equal the CPU's"
            + "".join(f"; NOT {w}" for w in wrong)
        )


def measured(
    all_cases: list[Case], copy: Callable[[], None], copy_bytes: int, rounds: int, wrong: list[str] | None
) -> list[dict[str, Any]]:
    """The rows, printed as they come. wrong: on CUDA, the cases whose bits are not the CPU's."""
    rows = []
    cuda = wrong is not None
    for threads in range(1, 2 if cuda else torch.get_num_threads() + 1):
        if not cuda:
            torch.set_num_threads(threads)
        for case in all_cases:
            row = compare(case, copy, copy_bytes, rounds, cuda)
            if wrong is None:
                row |= {"threads": threads}
            else:
                from parallel.quantize_kernels import SETTINGS

                setting = asdict(SETTINGS[case.kind])
                row |= {"target": TARGET, "bits_equal": case.name not in wrong, "setting": setting}
            rows.append(row)
            print(
                f"{'' if cuda else f'{threads} threads '}{row['case']:34} {row['GB_per_s']:8.1f} GB/s   "
                f"copy {row['copy_GB_per_s']:8.1f}   ratio {row['ratio']:.3f} {row['ratio_quartiles']}", flush=True
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
