"""Does quantized transport train as well? The default job, several seeds: validation loss at the end.

    python benchmarks/quantized_loss.py [--steps 1000] [--seeds 0 1 2] [--batch 8] [--side-by-side 3]

Each run is two ranks on CPU over gloo, one thread each, `zero3` over one level that all cross: weights INT8 and
gradients INT4 on every gather and reduction (`parallel.quantize=all`), without and with error feedback. A figure is the
validation loss over the exact run's of the same seed. Prints a table and writes benchmarks/results/quantized_loss.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.report import write_report  # noqa: E402
from launch.config import Config  # noqa: E402
from parallel.options import ParallelOptions  # noqa: E402

WORLD = 2
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "quantized": {"quantize": "all"},
    "quantized, error feedback": {"quantize": "all", "error_feedback": True},
}
LIMIT = 1.005


def run_rank(rank: int, variant: str, seed: int, steps: int, batch: int, folder: str) -> None:
    """One rank of one run; rank 0 writes the last validation loss."""
    import torch
    import torch.distributed as dist

    from trainer import Trainer

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD)
    job = Config(parallel=ParallelOptions(placement="zero3", levels={"node": WORLD}, **VARIANTS[variant])).job()
    job = replace(
        job,
        train=replace(
            job.train,
            steps=steps,
            global_batch_size=batch,
            seed=seed,
            eval_every_steps=0,
            eval_sequences=256,
            sample_tokens=0,
        ),
        logger=replace(job.logger, tensorboard=False, plot=False),
        run=replace(job.run, root=folder, name="run"),
    )
    events: list[dict[str, Any]] = []
    Trainer(job, emit=events.append).train()
    if rank == 0:
        [*_, last] = [event["valid_loss"] for event in events if event["type"] == "eval"]
        Path(folder, "loss.json").write_text(json.dumps(last))
    dist.destroy_process_group()


class Run:
    """Two processes under way."""

    def __init__(self, variant: str, seed: int, steps: int, batch: int) -> None:
        self.variant, self.seed, self.start = variant, seed, time.perf_counter()
        self.folder = tempfile.TemporaryDirectory()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        rest = ["--variant", variant, "--seeds", str(seed), "--steps", str(steps), "--batch", str(batch)]
        rest += ["--folder", self.folder.name]
        self.processes = [
            subprocess.Popen([sys.executable, __file__, "--rank", str(rank), *rest], env=env) for rank in range(WORLD)
        ]

    @property
    def done(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def result(self) -> dict[str, Any]:
        assert all(process.returncode == 0 for process in self.processes), f"{self.variant}, seed {self.seed} failed"
        loss = json.loads(Path(self.folder.name, "loss.json").read_text())
        return {"variant": self.variant, "seed": self.seed, "valid_loss": loss, "s": time.perf_counter() - self.start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--side-by-side", type=int, default=1, help="runs at a time, two processes each")
    parser.add_argument("--out", default=str(HERE / "results" / "quantized_loss.json"))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        return run_rank(args.rank, args.variant, args.seeds[0], args.steps, args.batch, args.folder)

    waiting = [(variant, seed) for seed in args.seeds for variant in VARIANTS]
    running: list[Run] = []
    rows: list[dict[str, Any]] = []
    while waiting or running:
        while waiting and len(running) < args.side_by_side:
            running.append(Run(*waiting.pop(0), args.steps, args.batch))
        time.sleep(0.5)
        for run in [run for run in running if run.done]:
            running.remove(run)
            rows.append(run.result())
            print(f"{run.variant:28} seed {run.seed}  {rows[-1]['valid_loss']:.5f}  {rows[-1]['s']:.0f} s", flush=True)
    exact = {row["seed"]: row["valid_loss"] for row in rows if row["variant"] == "exact"}
    for row in rows:
        row["over_exact"] = row["valid_loss"] / exact[row["seed"]]
    print(f"\n{'':28} over exact, by seed{'':12} mean   (aim: {LIMIT})")
    for variant in VARIANTS:
        ratios = [row["over_exact"] for row in sorted(rows, key=lambda r: r["seed"]) if row["variant"] == variant]
        print(f"{variant:28} {'  '.join(f'{r:.5f}' for r in ratios):30} {statistics.mean(ratios):.5f}")
    write_report(args.out, f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", rows)


if __name__ == "__main__":
    main()
