"""Training with the GPU's memory capped: our offload beside DeepSpeed's, and beside all in an uncapped GPU's memory.

    python benchmarks/offload.py --nvme FOLDER [--cases 3b 1b …] [--runs 3b:4096:4/auto …] [--budget-s 470] [--list]

Each run is a process of its own with a limit of its own. Without --cases or --runs all of `RUNS` are started in that
order, which is by what they tell; one that the budget has no time for is left out, and said to be. All: bf16 compute,
fp32 master AdamW on the given tier, clipping 1.0, the loss head included, blocks recomputed, random weights and tokens.
`memory-ckpt` alone has no cap. Figures are the median of the steps after the warm-up; ours, of those whose update was
not clipped, and beside it of those whose was: with speculation they take different ways. Each of ours predicts its step
from what it measures before (`trainer/forecast.py`); `ratio` is what it took over that.

Prints a line a run and a table; results/offload_one_gpu.json is written anew after every run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.in_memory import run  # noqa: E402
from benchmarks.one_run import baseline, command  # noqa: E402
from benchmarks.report import gpu_watched, write_report  # noqa: E402


@dataclass(frozen=True)
class Run:
    case: str
    """model:tokens:sequences[:accumulation]"""
    name: str
    """One of ours (`one_run.options`) or of ``baselines/one_gpu.py``."""
    steps: int
    limit_s: float
    """It is ended then."""
    warm_up: int = 3

    @property
    def key(self) -> str:
        return f"{self.case}/{self.name}"


RUNS = [
    Run("3b:4096:4", "memory-ckpt", 9, 60),
    Run("3b:4096:4", "streamed+15~0.6", 13, 70),
    Run("3b:4096:4", "auto", 13, 90),
    Run("3b:4096:4", "zero3-cpu", 6, 150),
    Run("1b:4096:4", "drive", 0, 40),
    Run("1b:4096:4", "nvme", 4, 100, warm_up=2),
    Run("1b:4096:4", "nvme/8.5", 5, 75, warm_up=2),
    Run("1b:4096:4", "nvme-weights", 4, 130, warm_up=2),
    Run("10b:4096:1", "nvme-streamed+11/98", 3, 190, warm_up=1),
    Run("10b:4096:1", "nvme-weights+11/98", 3, 190, warm_up=1),
    Run("3b:4096:8", "memory-ckpt", 8, 60),
    Run("3b:4096:8", "streamed+12~0.6", 10, 70),
    Run("3b:4096:8", "auto", 10, 80),
    Run("3b:4096:4:4", "streamed+3~0.6", 8, 80),
    Run("1b:4096:4", "infinity", 4, 170),
    Run("8b:4096:4", "streamed+7", 6, 130),
    Run("3b:4096:4", "super", 5, 110),
    Run("3b:4096:4", "streamed+15", 10, 60),
    Run("8b:4096:4", "zero3-cpu", 4, 150),
]
"""``nvme/8.5`` is 1b with half of its states in 8.5 GiB of host memory, the rest on the drive. 10b is 10.3 billion
parameters: 27 GB of its states on the drive, 86 GB in host memory, the rest on the GPU. ``nvme-weights``: weights and
gradients are on the drive where the states are."""
LEAST_S = 25.0
"""A run that has less time left is not started."""
START_S = 15.0
"""Before one of ours counts its time, and after: it ends early rather than be ended without its summary."""


def chosen(args: argparse.Namespace) -> list[Run]:
    if args.runs:
        by_key = {item.key: item for item in RUNS}
        return [by_key.get(key) or _run_of(key, args) for key in args.runs]
    if not args.cases:
        return RUNS
    return [item for item in RUNS if item.case in args.cases or item.case.split(":")[0] in args.cases]


def _run_of(key: str, args: argparse.Namespace) -> Run:
    case, _, name = key.partition("/")
    if not name:
        raise SystemExit(f"--runs {key}: must be CASE/NAME, such as {RUNS[0].key}")
    return Run(case, name, args.steps or 10, args.timeout_s or 120)


def start(item: Run, args: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """What a run says of itself, or why there is nothing."""
    if item.name == "drive":
        return drive_rate(args.nvme, limit_s) if args.nvme else {"skipped": "needs --nvme FOLDER"}
    if not args.nvme and ("nvme" in item.name or item.name == "infinity"):
        return {"skipped": "needs --nvme FOLDER"}
    limits = {"clip": args.clip, "steps": args.steps or item.steps}
    cap = args.cap if item.name != "memory" else 0
    own = {"warm_up": item.warm_up, "budget_s": limit_s - START_S}
    started = command(item.name, item.case, nvme=args.nvme, cap=cap, **own, **limits)
    started = started or baseline(item.name, item.case, cap=args.cap, nvme=args.nvme, **limits)
    try:
        return run(started, limit_s)
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        lines = (said if isinstance(said, str) else said.decode(errors="replace")).splitlines()
        steps = [line for line in lines if line.startswith("step ")]
        return {"error": f"not done within {limit_s:.0f} s", "steps_seen": steps[-3:]}


def drive_rate(folder: str, limit_s: float) -> dict[str, Any]:
    """What plain direct I/O makes of the drive, reading and writing at once: the most that states there can have."""
    code = (
        "import sys, json; from pathlib import Path; from benchmarks.host import drive_rows\n"
        "rows = {r['side']: r for r in drive_rows(Path(sys.argv[1]), 1 << 30, 3, 8, 2 << 20)}\n"
        "print('RESULT', json.dumps({'mixed_GB_per_s': rows['plain mixed']['gb_per_s'], "
        "'tier_GB_per_s': rows['tier mixed']['gb_per_s'], "
        "'usual_pages_GB_per_s': rows['tier mixed, usual pages']['gb_per_s']}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=limit_s, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {limit_s:.0f} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(found[-1].removeprefix("RESULT")) if found else {"failed": done.stderr[-300:]}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line a run: against `memory-ckpt` and `zero3-cpu` of the same model and length, a token; of the drive as it was
    measured last before."""
    speed = {(row["case"], row["name"]): row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    mixed = None
    heads = f"{'case':12} {'name':22} {'s/step':>8} {'clipped':>8} {'TFLOP/s':>8} {'of ckpt':>8} {'of zero3':>8}"
    lines = [heads + f" {'GPU GiB':>8} {'B/param':>8} {'predict':>8} {'ratio':>6} {'of disk':>8} {'run s':>6}"]
    for row in rows:
        mixed = row.get("mixed_GB_per_s", mixed)
        tail = row.get("skipped") or row.get("error") or row.get("failed")
        if tail or "tokens_per_s" not in row:
            lines.append(f"{row['case']:12} {row['name']:22} {tail or json.dumps(row)}")
            continue
        one = ":".join(row["case"].split(":")[:3])  # accumulation is compared with one micro-batch, a token
        against = [speed.get((one, name)) for name in ("memory-ckpt", "zero3-cpu")]
        ratios = [row["tokens_per_s"] / base if base else None for base in against]
        moved = row.get("nvme_bytes_per_step")
        disk = moved / row["step_s"] / 1e9 / mixed if moved and mixed else None
        values = [
            row["step_s"], row.get("clipped_step_s"), row["model_TFLOPs"], *ratios, row.get("gpu_peak_GiB"),
            row.get("host_bytes_per_param"), row.get("predicted_s"), row.get("ratio"), disk, row["run_s"],
        ]  # fmt: skip
        widths = [8, 8, 8, 8, 8, 8, 8, 8, 6, 8, 6]
        cells = (f"{'-' if v is None else f'{v:.3g}':>{width}}" for v, width in zip(values, widths, strict=True))
        lines.append(f"{row['case']:12} {row['name']:22} " + " ".join(cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", help="3b, or 3b:4096:8: those of RUNS alone")
    parser.add_argument("--runs", nargs="*", help="CASE/NAME, of RUNS or any other")
    parser.add_argument("--list", action="store_true", help="print the runs and leave")
    parser.add_argument("--cap", type=float, default=24.0, help="GiB of GPU memory; 0: none")
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--steps", type=int, help="instead of each run's own")
    parser.add_argument("--timeout-s", type=float, help="of a run, instead of each run's own")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="of all runs together")
    parser.add_argument("--nvme", default="", help="a folder on a drive")
    parser.add_argument("--out", default=str(HERE / "results" / "offload_one_gpu.json"))
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{item.key:36} {item.steps:3} steps, at most {item.limit_s:.0f} s" for item in chosen(args)))
        return
    import torch

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    hardware = f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    for item in chosen(args):
        left_s = args.budget_s - (time.perf_counter() - begin)
        limit_s = min(args.timeout_s or item.limit_s, left_s)
        started_s = time.perf_counter()
        with gpu_watched() as clock:
            found = (
                start(item, args, limit_s) if left_s >= LEAST_S else {"skipped": f"{left_s:.0f} s of the budget left"}
            )
        found |= clock
        row = {"case": item.case, "name": item.name, **found, "run_s": round(time.perf_counter() - started_s, 1)}
        rows.append(row)
        print(f"{item.key:36} {row['run_s']:5.0f} s  {json.dumps(found)}", flush=True)
        write_report(args.out, hardware, rows)
    print("\n".join(table(rows)), flush=True)
    print(f"{time.perf_counter() - begin:.0f} s in all; {args.out}", flush=True)


if __name__ == "__main__":
    main()
