"""Everything in GPU memory: our engine beside a compiled Hugging Face Llama with a fused AdamW, on one GPU.

    python benchmarks/in_memory.py [--cases 3b:4096:4 3b:8192:4] [--repeats 2] [--profile]

Each run is a process of its own, the two sides in turn. Both: bf16 compute, fp32 master AdamW, clipping 1.0, blocks
compiled, cuDNN attention, no recomputation, random weights and tokens. Figures are the median of steps 3 to 12. Prints
a table and writes benchmarks/results/in_memory.json.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
STEPS = 12
sys.path.insert(0, str(HERE.parent))

if TYPE_CHECKING:
    from trainer.options import LlamaOptions


def ours(model: str, seq_len: int, batch: int, profile: str) -> None:
    """One of our runs: prints RESULT and a JSON object, as baselines/one_gpu.py does."""
    import torch

    from parallel import OptimizerOptions, ParallelOptions
    from trainer.build import Rank, build_engine
    from trainer.job import Job
    from trainer.models import build_model
    from trainer.models.attention import attention_backends
    from trainer.options import TrainOptions

    torch.manual_seed(0)
    job = Job(
        model=preset(model),
        train=TrainOptions(seq_len=seq_len, global_batch_size=batch),
        optimizer=OptimizerOptions(lr=1e-5),
        parallel=ParallelOptions(),
    )
    where = Rank.current()
    llama = build_model(job.model, vocab_size=32000, seq_len=seq_len, dtype=torch.bfloat16, device=where.device)
    num_params = sum(p.numel() for p in llama.parameters())
    flops = llama.flops_per_token(seq_len) * batch * seq_len
    engine = build_engine(job, llama, where, torch.bfloat16)
    rows = torch.randint(0, 32000, (batch, seq_len + 1), device=where.device)
    times: list[float] = []

    def step() -> torch.Tensor:
        loss = engine.forward_backward(rows[:, :-1], rows[:, 1:], scale=1.0, first=True, last=True)
        engine.step(1e-5, 1.0)
        return loss

    with attention_backends(where.device):
        for i in range(STEPS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            print(f"step {i} {times[-1]:.3f} s loss {loss.item():.4f}", flush=True)
        if profile:
            with torch.profiler.profile() as trace:
                step()
                torch.cuda.synchronize()
            averages = trace.key_averages()
            Path(profile).write_text(averages.table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90))
    median = statistics.median(times[2:])
    result = {
        "engine": "atoll", "model": model, "params": num_params, "seq": seq_len, "batch": batch,
        "step_s": round(median, 4),
        "model_TFLOPs": round(flops / median / 1e12, 1), "tokens_per_s": round(batch * seq_len / median),
        "gpu_peak_GiB": round(torch.cuda.max_memory_reserved() / 2**30, 1),
        "gpu_allocated_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }  # fmt: skip
    print("RESULT", json.dumps(result), flush=True)


def preset(name: str) -> "LlamaOptions":
    """The model of ``conf/model/<name>.yaml``."""
    from omegaconf import OmegaConf

    from trainer.options import LlamaOptions

    fields: Any = OmegaConf.to_container(OmegaConf.load(HERE.parent / "conf" / "model" / f"{name}.yaml"))
    fields.pop("defaults", None)
    return LlamaOptions(**fields)


def run(command: list[str], timeout_s: float) -> dict[str, Any]:
    """The RESULT of a process; what it said instead where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not found:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", flush=True)
        errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return {"failed": errors[-1][:400] if errors else f"exit {done.returncode}"}
    result: dict[str, Any] = json.loads(found[-1].removeprefix("RESULT"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["3b:4096:4", "3b:8192:4"])
    parser.add_argument("--repeats", type=int, default=1, help="pairs of runs a case")
    parser.add_argument("--profile", default="", help="write a profile of one of our steps to this file")
    parser.add_argument("--out", default=str(HERE / "results" / "in_memory.json"))
    parser.add_argument("--ours", nargs=3, metavar=("MODEL", "SEQ", "BATCH"), help="one of our runs, in this process")
    args = parser.parse_args()
    if args.ours:
        ours(args.ours[0], int(args.ours[1]), int(args.ours[2]), args.profile)
        return
    import torch

    from benchmarks.report import write_report

    rows = []
    for case in args.cases:
        model, seq_len, batch = case.split(":")
        for _ in range(args.repeats):
            mine = [sys.executable, __file__, "--ours", model, seq_len, batch, "--profile", args.profile]
            theirs = [sys.executable, str(HERE / "baselines" / "one_gpu.py"), "memory", model, seq_len, batch]
            pair = {"case": case, "baseline": run([*theirs, "--steps", str(STEPS)], 280), "ours": run(mine, 280)}
            rows.append(pair)
            for side in ("baseline", "ours"):
                print(f"{case:12} {side:9} {json.dumps(pair[side])}", flush=True)
    for case in args.cases:
        pairs = [r for r in rows if r["case"] == case and "failed" not in r["baseline"] and "failed" not in r["ours"]]
        if pairs:
            ratio = statistics.median(r["ours"]["model_TFLOPs"] / r["baseline"]["model_TFLOPs"] for r in pairs)
            memory = statistics.median(r["ours"]["gpu_peak_GiB"] - r["baseline"]["gpu_peak_GiB"] for r in pairs)
            print(f"{case:12} throughput {ratio:.3f} x the baseline, {memory:+.1f} GiB of GPU memory", flush=True)
    hardware = f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    write_report(args.out, hardware, rows)


if __name__ == "__main__":
    main()
