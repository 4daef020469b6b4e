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
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

if TYPE_CHECKING:
    from torch import Tensor

    from offload.cost import Prediction
    from parallel import ShardedModel
    from trainer.job import Job

LR = 1e-5
TIERS: dict[str, dict[str, Any]] = {
    "memory": {},
    "host": {"states": "host"},
    "streamed": {"states": "host", "weights": "host"},
    "nvme": {"states": "nvme"},
    "nvme-streamed": {"states": "nvme", "weights": "host"},
    "nvme-weights": {"states": "nvme", "weights": "nvme"},
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


def options(name: str, nvme: str) -> dict[str, Any] | None:
    """Options of ours by name: ``TIER[+GiB on the GPU][/GiB in host memory][~share speculated on][@threads]
    [%ACTIVATIONS[:alpha[:blocks kept last]]][^tokens a tile]``; None for another's name. ``~first`` updates weights
    first. Without activations blocks are checkpointed; only swap takes an alpha, so ``%input::0`` keeps no block."""
    found = re.fullmatch(
        r"([a-z-]+)(?:\+([\d.]+))?(?:/([\d.]+))?(?:~([\d.]+|first))?(?:@(\d+))?"
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
    if share == "first":
        chosen["update"] = "weights_first"
    elif share:
        chosen |= {"update": "speculate", "speculate_share": float(share)}
    if threads:
        chosen["threads"] = int(threads)
    return chosen


def ours(spec: dict[str, Any]) -> None:
    """Train as `spec` says and print what came of it; steps before ``warm_up`` are not counted."""
    import psutil
    import torch

    from offload.activations.blocks import describe
    from offload.choose import overrides
    from parallel import ShardedModel
    from parallel.sequence import SequenceParallel
    from trainer import fit_activations
    from trainer.build import Rank, build_engine
    from trainer.forecast import settle
    from trainer.models import build_model

    free_before, total = torch.cuda.mem_get_info()
    if spec["cap"]:
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec["cap"] * 2**30 / total))
    torch.manual_seed(0)
    job, where, deadline = job_of(spec), Rank.current(), time.perf_counter() + spec.get("budget_s", 1e9)
    seq_len = spec["seq"]
    llama = build_model(job.model, vocab_size=32000, seq_len=seq_len, dtype=torch.bfloat16, device=where.device)
    num_params = sum(p.numel() for p in llama.parameters())
    tokens = spec["batch"] * spec["accumulation"] * seq_len
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        alone = SequenceParallel(None)
        job, counted = fit_activations.settle(job, llama, where, torch.bfloat16, print)
        job, forecast = settle(
            job, llama, where, torch.bfloat16, Path(folder), print, sequence=alone, activation_bytes=counted
        )
    torch.cuda.reset_peak_memory_stats()
    print(f"measured and predicted in {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    engine = build_engine(job, llama, where, torch.bfloat16, say=print)
    assert isinstance(engine, ShardedModel)
    print(f"built in {time.perf_counter() - start:.1f} s {engine.state_bytes()}", flush=True)
    rows = torch.randint(0, 32000, (spec["batch"], seq_len + 1), device=where.device)
    times, norms, last = train(engine, spec, rows, deadline)
    timed = timing(times, norms, spec, forecast.prediction if forecast else None)
    median = timed["step_s"]
    result = {
        "engine": spec["name"], "model": spec["model"], "params": num_params, "seq": seq_len, "batch": spec["batch"],
        "accumulation": spec["accumulation"], **timed, "step_s": round(median, 4), **last,
        "model_TFLOPs": round(llama.flops_per_token(seq_len) * tokens / median / 1e12, 1),
        "tokens_per_s": round(tokens / median),
        "gpu_peak_GiB": round(torch.cuda.max_memory_reserved() / 2**30, 1),
        "gpu_device_GiB": round((free_before - torch.cuda.mem_get_info()[0]) / 2**30, 1),
        "gpu_allocated_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "activations": describe(engine.activations.choices),
        "host_GiB": round(psutil.Process().memory_info().rss / 2**30, 1),
        "chosen": overrides(job.offload) if spec["offload"].get("states") == "auto" else None,
        "host_bytes_per_param": round(engine.state_bytes().get("host", 0) / num_params, 2),
    }  # fmt: skip
    print("RESULT", json.dumps(result), flush=True)
    engine.close()


def job_of(spec: dict[str, Any]) -> "Job":
    """What `spec` trains; ``auto`` plans within the cap."""
    from benchmarks.in_memory import preset
    from offload.options import ActivationOptions, OffloadOptions
    from parallel import OptimizerOptions, ParallelOptions
    from trainer.job import Job
    from trainer.options import TrainOptions

    batch, offload = spec["batch"], dict(spec["offload"])
    offload["activations"] = ActivationOptions(**offload["activations"])
    if offload.get("states") == "auto" and spec["cap"]:
        offload["device_bytes"] = int(spec["cap"] * 2**30)
    return Job(
        model=preset(spec["model"]),
        train=TrainOptions(seq_len=spec["seq"], global_batch_size=batch * spec["accumulation"], micro_batch_size=batch),
        optimizer=OptimizerOptions(lr=LR),
        parallel=ParallelOptions(),
        offload=OffloadOptions(**offload, predict=spec.get("predict", True)),
    )


def train(
    engine: "ShardedModel", spec: dict[str, Any], rows: "Tensor", deadline: float
) -> tuple[list[float], list[float], dict[str, float]]:
    """Seconds and gradient norm of each step, and the last one's figures. rows: (B, S + 1) int64, of every step. After
    `deadline` (`time.perf_counter`) no step begins."""
    import torch

    from trainer.models.attention import attention_backends

    count, times, norms = spec["accumulation"], [], []
    with attention_backends(rows.device):
        for i in range(spec["steps"]):
            torch.cuda.synchronize()
            start = time.perf_counter()
            engine.expect(LR)
            for micro in range(count):
                loss = engine.forward_backward(
                    rows[:, :-1], rows[:, 1:], scale=1.0 / count, first=micro == 0, last=micro == count - 1
                )
            norm = engine.step(LR, spec["clip"] or None)
            # the update goes on beside the next forward: steps are timed from backward to backward
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            norms.append(norm.item())
            away = getattr(engine._offloader, "_states", None)
            update_s = away.update_s if away else 0.0
            stood = f"{away.hits} of {away.guesses} guesses stood" if away else ""
            line = f"step {i} {times[-1]:.3f} s loss {loss.item():.4f} norm {norms[-1]:.3f} update {update_s:.3f} s"
            print(line, stood, flush=True)
            if i >= spec["warm_up"] and time.perf_counter() + times[-1] > deadline:
                break
    return times, norms, {
        "last_update_s": round(update_s, 4), "norm": round(norms[-1], 3), "loss": round(loss.item(), 4),
    }  # fmt: skip


def timing(
    times: list[float], norms: list[float], spec: dict[str, Any], predicted: "Prediction | None"
) -> dict[str, Any]:
    """Medians of the steps that were not clipped, and of those that were, beside what was predicted.

    A step's time holds the update of the step before it, whose guesses stand if that and its forerunner did not clip.
    """
    warm_up = spec["warm_up"]
    clips = [spec["clip"] and max(norms[max(0, i - 2) : i]) > spec["clip"] for i in range(warm_up, len(times))]
    by_clip = {
        clipped: [seconds for seconds, c in zip(times[warm_up:], clips, strict=True) if bool(c) == clipped]
        for clipped in (False, True)
    }
    median = statistics.median(by_clip[False] or times[warm_up:])
    found: dict[str, Any] = {
        "step_s": median, "steps_unclipped": len(by_clip[False]),
        "clipped_step_s": round(statistics.median(by_clip[True]), 4) if by_clip[True] else None,
    }  # fmt: skip
    if predicted is None:
        names = ("predicted_s", "predicted_clipped_s", "bottleneck", "ratio", "nvme_bytes_per_step")
        return found | dict.fromkeys(names)
    expected_s = predicted.step_s if by_clip[False] else predicted.clipped_step_s
    return found | {
        "predicted_s": round(predicted.step_s, 4), "predicted_clipped_s": round(predicted.clipped_step_s, 4),
        "bottleneck": predicted.bottleneck, "ratio": round(median / expected_s, 3),
        "nvme_bytes_per_step": predicted.read_bytes + predicted.written_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    ours(json.loads(sys.argv[1]))
