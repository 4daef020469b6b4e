"""Training with the GPU's memory capped: our offload beside DeepSpeed's, and beside all in an uncapped GPU's memory.

    python benchmarks/offload.py [--cases 3b:4096:4 …] [--ours NAME …] [--baselines NAME …] [--cap 24] [--nvme FOLDER]

Each run is a process of its own. All: bf16 compute, fp32 master AdamW on the given tier, clipping 1.0, the loss head
included, blocks recomputed, random weights and tokens. `memory-ckpt` alone has no cap. Figures are the median of the
steps after the third; ours, of those whose update was not clipped, and beside it of those whose was: with speculation
they take different ways.
Prints a table and writes results/offload.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from in_memory import run  # noqa: E402
from one_run import baseline, command  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["3b:4096:4"], help="model:tokens:sequences[:accumulation]")
    parser.add_argument("--ours", nargs="*", default=["streamed+15~0.6"])
    parser.add_argument("--baselines", nargs="*", default=["memory-ckpt", "zero3-cpu", "super"])
    parser.add_argument("--cap", type=float, default=24.0, help="GiB of GPU memory; 0: none")
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--nvme", default="", help="a folder on a drive")
    parser.add_argument("--timeout-s", type=float, default=280)
    parser.add_argument("--out", default=str(HERE / "results" / "offload.json"))
    args = parser.parse_args()
    import torch
    from report import write_report

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    rows = []
    for case in args.cases:
        for name in [*args.ours, *args.baselines] * args.repeats:
            limits = {"clip": args.clip, "steps": args.steps}
            started = command(name, case, nvme=args.nvme, cap=args.cap if name != "memory" else 0, **limits)
            started = started or baseline(name, case, cap=args.cap, **limits)
            begin = time.perf_counter()
            try:
                found = run(started, args.timeout_s)
            except subprocess.TimeoutExpired:
                found = {"error": f"not done within {args.timeout_s:g} s"}
            rows.append({"case": case, "name": name, **found})
            print(f"{case:12} {name:12} {time.perf_counter() - begin:4.0f} s  {json.dumps(found)}", flush=True)
    write_report(args.out, f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores", rows)


if __name__ == "__main__":
    main()
