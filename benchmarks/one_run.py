"""One of our runs on one GPU, in a process of its own: prints a line a step, then RESULT and a JSON object, as
baselines/one_gpu.py does.

    python benchmarks/one_run.py '{"name": "streamed+15~0.6", "model": "3b", "seq": 4096, "batch": 4, …}'

`spec` makes the object: what is trained, and a name that says where state and activations live.
"""

import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

TIERS: dict[str, dict[str, Any]] = {
    "memory": {},
    "host": {"states": "host"},
    "streamed": {"states": "host", "weights": "host"},
    "nvme": {"states": "nvme"},
    "nvme-streamed": {"states": "nvme", "weights": "host"},
    "auto": {"states": "auto"},
}


def command(name: str, case: str, *, nvme: str = "", **more: Any) -> list[str] | None:
    """The command of one run; None where `name` is not one of ours. case: model:tokens:sequences[:accumulation].

    more: over ``cap`` (GiB; 0: none), ``clip``, ``steps``, ``warm_up``, and ``budget_s``: after it no step begins.
    """
    chosen = options(name, nvme)
    if chosen is None:
        return None
    model, seq_len, batch, *count = case.split(":")
    spec = {"name": name, "model": model, "seq": int(seq_len), "batch": int(batch), "offload": chosen}
    spec |= {"accumulation": int(count[0]) if count else 1, "cap": 0, "clip": 1.0, "steps": 10, "warm_up": 3, **more}
    return [sys.executable, __file__, json.dumps(spec)]


def baseline(name: str, case: str, *, cap: float, clip: float, steps: int, nvme: str = "") -> list[str]:
    """The command of ``baselines/one_gpu.py``; what runs all in memory has no cap."""
    model, seq_len, batch, *_ = case.split(":")
    capped = "0" if name.startswith("memory") else str(cap)
    file = str(HERE / "baselines" / "one_gpu.py")
    more = ["--nvme", nvme] if nvme else []
    limits = ["--cap", capped, "--clip", str(clip), "--steps", str(steps), *more]
    return [sys.executable, file, name, model, seq_len, batch, *limits]


def options(name: str, nvme: str) -> dict | None:
    """Options of ours by name: ``TIER[+GiB on the GPU][/GiB in host memory][~share speculated on][@threads]
    [%ACTIVATIONS[:alpha[:blocks kept last]]][^tokens a tile]``; None for another's name. Without activations blocks are
    checkpointed; only swap takes an alpha, so ``%input::0`` keeps no block."""
    found = re.fullmatch(
        r"([a-z-]+)(?:\+([\d.]+))?(?:/([\d.]+))?(?:~([\d.]+))?(?:@(\d+))?"
        r"(?:%([a-z_]+)(?::([\d.]*)(?::(\d+))?)?)?(?:\^(\d+))?",
        name,
    )
    if not found or found[1] not in TIERS:
        return None
    tier, gpu, host, share, threads, mode, alpha, kept, tile = found.groups()
    chosen: dict[str, Any] = dict(TIERS[tier])
    chosen["activations"] = {"mode": mode or "checkpoint", "alpha": float(alpha) if alpha else None}
    if kept:
        chosen["activations"]["keep_last"] = int(kept)
    if tile:
        chosen["activations"]["tile_tokens"] = int(tile)
    if tier.startswith("nvme") or (tier == "auto" and nvme):
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
    """Train as `spec` says and print what came of it; steps before ``warm_up`` are not counted."""
    import psutil
    import torch
    from in_memory import preset

    from offload.activations import describe
    from offload.choose import overrides
    from offload.options import ActivationOptions, OffloadOptions
    from parallel import OptimizerOptions, ParallelOptions
    from trainer.build import Rank, build_engine
    from trainer.forecast import settle
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
        offload=OffloadOptions(
            **spec["offload"] | {"activations": ActivationOptions(**spec["offload"]["activations"])},
            predict=spec.get("predict", True),
        ),
    )
    if spec["offload"].get("states") == "auto" and spec["cap"]:
        job = replace(job, offload=replace(job.offload, device_bytes=int(spec["cap"] * 2**30)))
    where = Rank.current()
    llama = build_model(job.model, vocab_size=32000, seq_len=seq_len, dtype=torch.bfloat16, device=where.device)
    num_params = sum(p.numel() for p in llama.parameters())
    flops = llama.flops_per_token(seq_len) * batch * count * seq_len
    deadline = time.perf_counter() + spec.get("budget_s", 1e9)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        job, forecast = settle(job, llama, where, torch.bfloat16, Path(folder), print)
    torch.cuda.reset_peak_memory_stats()
    print(f"measured and predicted in {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    engine = build_engine(job, llama, where, torch.bfloat16, say=print)
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
            if i >= spec["warm_up"] and time.perf_counter() + times[-1] > deadline:
                break
    warm_up = spec["warm_up"]
    # a step's time holds the update of the step before it, whose guesses stand if that and its forerunner did not clip
    clips = [spec["clip"] and max(norms[max(0, i - 2) : i]) > spec["clip"] for i in range(warm_up, len(times))]
    by_clip = {
        clipped: [seconds for seconds, c in zip(times[warm_up:], clips, strict=True) if bool(c) == clipped]
        for clipped in (False, True)
    }
    median = statistics.median(by_clip[False] or times[warm_up:])
    predicted = forecast.prediction if forecast else None
    expected_s = None
    if predicted:
        expected_s = predicted.step_s if by_clip[False] else predicted.clipped_step_s
    result = {
        "engine": spec["name"], "model": model, "params": num_params, "seq": seq_len, "batch": batch,
        "accumulation": count, "step_s": round(median, 4), "steps_unclipped": len(by_clip[False]),
        "clipped_step_s": round(statistics.median(by_clip[True]), 4) if by_clip[True] else None,
        "last_update_s": round(update_s, 4),
        "model_TFLOPs": round(flops / median / 1e12, 1), "tokens_per_s": round(batch * count * seq_len / median),
        "norm": round(norm.item(), 3), "loss": round(loss.item(), 4),
        "gpu_peak_GiB": round(torch.cuda.max_memory_reserved() / 2**30, 1),
        "gpu_device_GiB": round((free_before - torch.cuda.mem_get_info()[0]) / 2**30, 1),
        "gpu_allocated_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "activations": describe(engine.activations.choices),
        "host_GiB": round(psutil.Process().memory_info().rss / 2**30, 1),
        "chosen": overrides(job.offload) if spec["offload"].get("states") == "auto" else None,
        "predicted_s": round(predicted.step_s, 4) if predicted else None,
        "predicted_clipped_s": round(predicted.clipped_step_s, 4) if predicted else None,
        "bottleneck": predicted.bottleneck if predicted else None,
        "ratio": round(median / expected_s, 3) if expected_s else None,
        "nvme_bytes_per_step": 2 * predicted.written_bytes if predicted else None,
        "host_bytes_per_param": round(engine.state_bytes().get("host", 0) / num_params, 2),
    }  # fmt: skip
    print("RESULT", json.dumps(result), flush=True)
    engine.close()


if __name__ == "__main__":
    ours(json.loads(sys.argv[1]))
