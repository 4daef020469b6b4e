"""The quantization kernels beside a copy on the same device.

    python benchmarks/quantize.py [--numel N] [--block 256] [--rounds 7] [--tune]

A kernel's GB/s counts the bytes it has to read and write. Copy and kernel take turns; a figure is the median over
rounds of the ratio within a round, so that whatever else the machine does hits both. On CUDA the buffers are much
larger than its cache; on CPU each thread count has rows of its own. `--tune` tries tiles, warps and vectors of the
CUDA kernels and prints the best of each, but changes nothing. Writes benchmarks/results/quantize_<device>.json.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from report import write_report  # noqa: E402

from parallel.quantize import Format, dequantize, dequantize_sum, dequantize_sum_quantize, quantize  # noqa: E402

TARGET = 0.8
"""On CUDA: the share of the copy's bandwidth."""
Case = tuple[str, str, Callable[[], None], int]
"""What it is, which vector setting it uses, what runs it, the bytes it reads and writes."""


def cases(numel: int, block: int, device: str) -> list[Case]:
    found: list[Case] = []
    fp32 = torch.randn(numel, device=device)
    values = {"fp32": fp32, "bf16": fp32.bfloat16()}
    residual = torch.zeros(numel, device=device)
    outs = {name: torch.empty_like(tensor) for name, tensor in values.items()}
    for bits in (8, 4):
        fmt = Format(bits, block)
        packed = torch.empty(fmt.packed_bytes(numel), dtype=torch.uint8, device=device)
        for name, tensor in values.items():

            def pack(tensor: torch.Tensor = tensor, fmt: Format = fmt, packed: torch.Tensor = packed) -> None:
                quantize(tensor, fmt, packed)

            def feed(tensor: torch.Tensor = tensor, fmt: Format = fmt, packed: torch.Tensor = packed) -> None:
                quantize(tensor, fmt, packed, residual=residual)

            def unpack(out: torch.Tensor = outs[name], fmt: Format = fmt, packed: torch.Tensor = packed) -> None:
                dequantize(packed, fmt, out)

            size = tensor.nbytes + packed.nbytes
            found.append((f"quantize {name} -> int{bits}", f"quantize {name}", pack, size))
            found.append((f"quantize {name} -> int{bits}, feedback", "residual", feed, size + 2 * residual.nbytes))
            found.append((f"dequantize int{bits} -> {name}", f"dequantize {name}", unpack, size))
        for parts in (2, 8):
            few = numel // parts // 4096 * 4096
            chunk = fmt.packed_bytes(few)
            received = torch.empty(parts * chunk, dtype=torch.uint8, device=device)
            quantize(fp32[: parts * few], fmt, received, chunks=parts)
            for name, out in outs.items():

                def add(
                    out: torch.Tensor = out[:few], fmt: Format = fmt, received: torch.Tensor = received, n: int = parts
                ) -> None:
                    dequantize_sum(received, fmt, out, chunks=n)

                size = received.nbytes + few * out.element_size()
                found.append((f"sum {parts} x int{bits} -> {name}", f"dequantize {name}", add, size))
            for out_bits in (8, 4):
                out_fmt = Format(out_bits, block)
                again = torch.empty(out_fmt.packed_bytes(few), dtype=torch.uint8, device=device)

                def fused(
                    fmt: Format = fmt,
                    out_fmt: Format = out_fmt,
                    received: torch.Tensor = received,
                    again: torch.Tensor = again,
                    n: int = parts,
                ) -> None:
                    dequantize_sum_quantize(received, fmt, again, out_fmt, chunks=n)

                size = received.nbytes + again.nbytes
                found.append((f"sum {parts} x int{bits} -> int{out_bits}", "fused", fused, size))
    return found


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
    return start_event.elapsed_time(end) / 1e3 / repeats


def compare(case: Case, copy: Callable[[], None], copy_bytes: int, rounds: int, cuda: bool) -> dict[str, Any]:
    name, _, function, size = case
    function()  # compiles
    repeats = 10 if cuda else 1
    rates, copies = [], []
    for _ in range(rounds):
        copies.append(copy_bytes / seconds(copy, cuda, repeats) / 1e9)
        rates.append(size / seconds(function, cuda, repeats) / 1e9)
    ratios = [rate / copied for rate, copied in zip(rates, copies, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "case": name, "GB_per_s": round(statistics.median(rates), 1),
        "copy_GB_per_s": round(statistics.median(copies), 1), "ratio": round(ratio, 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)], "bytes": size,
    }  # fmt: skip


def tune(all_cases: list[Case], copy: Callable[[], None], copy_bytes: int) -> None:
    """Print for each case the five best of all settings."""
    from parallel import quantize_kernels as kernels

    before = kernels.TILE, kernels.WARPS, dict(kernels.VECTOR)
    for case in all_cases:
        found = []
        for tile, warps, vector in itertools.product((2048, 4096, 8192), (2, 4, 8), (4, 8, 16)):
            kernels.TILE, kernels.WARPS = tile, warps
            kernels.VECTOR[case[1]] = vector
            row = compare(case, copy, copy_bytes, 3, True)
            found.append((row["ratio"], f"tile {tile} warps {warps} vector {vector}"))
        found.sort(reverse=True)
        print(f"{case[0]:34} " + "; ".join(f"{ratio:.3f} {setting}" for ratio, setting in found[:5]), flush=True)
    kernels.TILE, kernels.WARPS = before[:2]
    kernels.VECTOR.update(before[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--numel", type=int, help="a multiple of 32768 (2^30 on CUDA, 2^24 on CPU)")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--tune", action="store_true", help="on CUDA: search the kernels' settings instead")
    parser.add_argument("--out")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if args.tune and not cuda:
        parser.error("--tune is for --device cuda")
    numel = args.numel or (1 << 30 if cuda else 1 << 24)
    all_cases = [case for case in cases(numel, args.block, args.device) if args.only in case[0]]
    source = torch.empty(numel, device=args.device).fill_(1.0)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    if args.tune:
        tune(all_cases, copy, 2 * source.nbytes)
        return
    rows = []
    available = 1 if cuda else torch.get_num_threads()
    for threads in range(1, available + 1):
        if not cuda:
            torch.set_num_threads(threads)
        for case in all_cases:
            row = compare(case, copy, 2 * source.nbytes, args.rounds, cuda)
            row |= {"target": TARGET} if cuda else {"threads": threads}
            rows.append(row)
            print(
                f"{'' if cuda else f'{threads} threads '}{row['case']:34} {row['GB_per_s']:8.1f} GB/s   "
                f"copy {row['copy_GB_per_s']:8.1f}   ratio {row['ratio']:.3f} {row['ratio_quartiles']}"
            )
    hardware = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores"
    out = args.out or str(HERE / "results" / f"quantize_{args.device}.json")
    write_report(out, f"{hardware}; {numel} elements, blocks of {args.block}", rows)


if __name__ == "__main__":
    main()
