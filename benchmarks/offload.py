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
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from in_memory import preset, run  # noqa: E402

TIERS = {
    "memory": {},
    "host": {"states": "host"},
    "streamed": {"states": "host", "weights": "host"},
    "nvme": {"states": "nvme"},
    "nvme-streamed": {"states": "nvme", "weights": "host"},
}


def options(name: str, nvme: str) -> dict | None:
    """Options of ours by name: ``TIER[+GiB on the GPU][/GiB in host memory][~share speculated on][@threads]``; None for
    another's name."""
    found = re.fullmatch(r"([a-z-]+)(?:\+([\d.]+))?(?:/([\d.]+))?(?:~([\d.]+))?(?:@(\d+))?", name)
    if not found or found[1] not in TIERS:
        return None
    tier, gpu, host, share, threads = found.groups()
    chosen = dict(TIERS[tier])
    if tier.startswith("nvme"):
        chosen["nvme_path"] = [nvme]
    if gpu:
        chosen["gpu_bytes"] = int(float(gpu) * 2**30)
    if host:
        chosen["host_bytes"] = int(float(host) * 2**30)
    if share:
        chosen |= {"update": "speculate", "speculate_share": float(share)}
    if threads:
        chosen["threads"] = int(threads)
    return chosen


def ours(spec: dict) -> None:
    """One of our runs: prints RESULT and a JSON object, as baselines/one_gpu.py does."""
    import psutil
    import torch

    from offload.options import ActivationOptions, OffloadOptions
    from parallel import OptimizerOptions, ParallelOptions
    from trainer.build import Rank, build_engine
    from trainer.job import Job
    from trainer.models import build_model
    from trainer.models.attention import attention_backends
    from trainer.options import TrainOptions

    free_before, total = torch.cuda.mem_get_info()
    if spec["cap"]:
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec["cap"] * 2**30 / total))
    torch.manual_seed(0)
    model, seq_len, batch, count = spec["model"], spec["seq"], spec["batch"], spec["accumulation"]
    job = Job(
        model=preset(model),
        train=TrainOptions(seq_len=seq_len, global_batch_size=batch * count, micro_batch_size=batch),
        optimizer=OptimizerOptions(lr=1e-5),
        parallel=ParallelOptions(),
        offload=OffloadOptions(activations=ActivationOptions(mode="checkpoint"), **spec["offload"]),
    )
    where = Rank.current()
    llama = build_model(job.model, vocab_size=32000, seq_len=seq_len, dtype=torch.bfloat16, device=where.device)
    num_params = sum(p.numel() for p in llama.parameters())
    flops = llama.flops_per_token(seq_len) * batch * count * seq_len
    start = time.perf_counter()
    engine = build_engine(job, llama, where, torch.bfloat16)
    print(f"built in {time.perf_counter() - start:.1f} s {engine.state_bytes()}", flush=True)
    rows = torch.randint(0, 32000, (batch, seq_len + 1), device=where.device)
    times: list[float] = []
    norms: list[float] = []
    with attention_backends(where.device):
        for i in range(spec["steps"]):
            torch.cuda.synchronize()
            start = time.perf_counter()
            engine.expect(1e-5)
            for micro in range(count):
                loss = engine.forward_backward(
                    rows[:, :-1], rows[:, 1:], scale=1.0 / count, first=micro == 0, last=micro == count - 1
                )
            norm = engine.step(1e-5, spec["clip"] or None)
            # the update goes on beside the next forward: steps are timed from backward to backward
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            norms.append(norm.item())
            away = getattr(engine._offloader, "_states", None)
            update_s = away.update_s if away else 0.0
            stood = f"{away.hits} of {away.guesses} guesses stood" if away else ""
            line = f"step {i} {times[-1]:.3f} s loss {loss.item():.4f} norm {norm.item():.3f} update {update_s:.3f} s"
            print(line, stood, flush=True)
    # a step's time holds the update of the step before it, whose guesses stand if that and its forerunner did not clip
    clips = [spec["clip"] and max(norms[i - 2 : i]) > spec["clip"] for i in range(3, len(times))]
    by_clip = {
        clipped: [seconds for seconds, c in zip(times[3:], clips, strict=True) if bool(c) == clipped]
        for clipped in (False, True)
    }
    median = statistics.median(by_clip[False] or times[3:])
    result = {
        "engine": spec["name"], "model": model, "params": num_params, "seq": seq_len, "batch": batch,
        "accumulation": count, "step_s": round(median, 4), "steps_unclipped": len(by_clip[False]),
        "clipped_step_s": round(statistics.median(by_clip[True]), 4) if by_clip[True] else None,
        "last_update_s": round(update_s, 4),
        "model_TFLOPs": round(flops / median / 1e12, 1), "tokens_per_s": round(batch * count * seq_len / median),
        "norm": round(norm.item(), 3), "loss": round(loss.item(), 4),
        "gpu_peak_GiB": round(torch.cuda.max_memory_reserved() / 2**30, 1),
        "gpu_device_GiB": round((free_before - torch.cuda.mem_get_info()[0]) / 2**30, 1),
        "host_GiB": round(psutil.Process().memory_info().rss / 2**30, 1),
        "host_bytes_per_param": round(engine.state_bytes().get("host", 0) / num_params, 2),
    }  # fmt: skip
    print("RESULT", json.dumps(result), flush=True)
    engine.close()


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
    parser.add_argument("--one", help="one of our runs, in this process: a JSON object")
    args = parser.parse_args()
    if args.one:
        ours(json.loads(args.one))
        return
    import torch
    from report import write_report

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    rows = []
    for case in args.cases:
        model, seq_len, batch, *count = case.split(":")
        accumulation = int(count[0]) if count else 1
        for name in [*args.ours, *args.baselines] * args.repeats:
            if (offload := options(name, args.nvme)) is not None:
                spec = {
                    "name": name, "model": model, "seq": int(seq_len), "batch": int(batch), "clip": args.clip,
                    "accumulation": accumulation, "offload": offload, "steps": args.steps,
                    "cap": args.cap if name != "memory" else 0,
                }  # fmt: skip
                command = [sys.executable, __file__, "--one", json.dumps(spec)]
            else:
                cap = "0" if name.startswith("memory") else str(args.cap)
                command = [sys.executable, str(HERE / "baselines" / "one_gpu.py"), name, model, seq_len, batch]
                command += ["--cap", cap, "--clip", str(args.clip), "--steps", str(args.steps)]
            begin = time.perf_counter()
            try:
                found = run(command, args.timeout_s)
            except subprocess.TimeoutExpired:
                found = {"error": f"not done within {args.timeout_s:g} s"}
            rows.append({"case": case, "name": name, **found})
            print(f"{case:12} {name:12} {time.perf_counter() - begin:4.0f} s  {json.dumps(found)}", flush=True)
    write_report(args.out, f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores", rows)


if __name__ == "__main__":
    main()
