"""Long sequences on one GPU: activations swapped beside activations recomputed, with fp32 master states on the host.

    python benchmarks/long_context.py [--only long short ladder]

long    4b, 1 x 131072, 80 GiB of GPU memory: swapped, checkpointed, a compiled Hugging Face Llama with its blocks
        checkpointed (all in memory, no cap), and the kernel limit: the same products and attention alone
short   3b, 4 x 4096, 24 GiB, beside the Hugging Face Llama that keeps all; 3b, 1 x 32768, beside it checkpointed
ladder  1b and 3b within 24 GiB, the tokens doubling from 16384 until it does not fit or --ladder-s have gone

Each run is a process of its own. MFU is against the GPU's dense bf16 peak. Prints a table and writes
results/long_context.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from in_memory import preset, run  # noqa: E402
from one_run import baseline, command  # noqa: E402


def kernel_limit(model: str, num_tokens: int) -> dict[str, float]:
    """Seconds of the products and attention of a model's blocks and head alone, forward and backward."""
    import torch
    from activations import kernel_limit_s

    from trainer.models.attention import attention_backends

    options, device = preset(model), torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(1, num_tokens, options.dim, device=device, dtype=torch.bfloat16)
    with attention_backends(device):
        found = {"blocks_s": kernel_limit_s(options, options.num_layers, x, 2)}
        words, chunk = torch.randn(options.vocab_size, options.dim, device=device, dtype=torch.bfloat16), 2048
        logits = torch.randn(chunk, options.vocab_size, device=device, dtype=torch.bfloat16)
        for timed in (False, True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(0, num_tokens, chunk):
                rows = x[0, i : i + chunk]
                _ = rows @ words.t(), logits @ words, logits.t() @ rows
            torch.cuda.synchronize()
            found["head_s"] = time.perf_counter() - start if timed else 0.0
    return {"step_s": found["blocks_s"] + found["head_s"], **found}


def peak_flops() -> float:
    import torch

    from offload.device import peak_flops

    return peak_flops(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16) or float("nan")


def measure(
    name: str, case: str, cap: float, steps: int, warm_up: int, timeout_s: float, peak: float
) -> dict[str, Any]:
    """One run; ``limit`` is the kernel limit."""
    begin = time.perf_counter()
    if name == "limit":
        found: dict[str, Any] = kernel_limit(case.split(":")[0], int(case.split(":")[1]))
    else:
        if name in ("memory", "memory-ckpt"):
            started = baseline(name, case, cap=cap, clip=1.0, steps=steps)
        else:
            started = command(name, case, cap=cap, clip=1.0, steps=steps, warm_up=warm_up)
            assert started, f"{name}: no such run"
        try:
            found = run(started, timeout_s)
        except subprocess.TimeoutExpired:
            found = {"failed": f"not done within {timeout_s:g} s"}
    if "model_TFLOPs" in found:
        found["mfu"] = round(1e12 * found["model_TFLOPs"] / peak, 4)
    row = {"case": case, "cap_GiB": cap, "name": name, **found}
    print(f"{case:14} {name:22} {time.perf_counter() - begin:4.0f} s  {json.dumps(found)}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["long", "short"], choices=["long", "short", "ladder"])
    parser.add_argument("--long", nargs="*", default=["limit", "host%auto", "host%checkpoint", "memory-ckpt"])
    parser.add_argument("--short", nargs="*", default=["streamed+15~0.6%auto", "streamed+15~0.6%checkpoint"])
    parser.add_argument("--short-cases", nargs="*", default=["3b:4096:4", "3b:32768:1"])
    parser.add_argument("--ladder", nargs="*", default=["1b", "3b"], help="models")
    parser.add_argument("--ladder-name", default="streamed%swap:0")
    parser.add_argument("--ladder-from", type=int, default=16384)
    parser.add_argument("--ladder-s", type=float, default=400, help="for each model")
    parser.add_argument("--steps", type=int, default=5, help="of the long case; auto chooses after three")
    parser.add_argument("--timeout-s", type=float, default=280)
    parser.add_argument("--out", default=str(HERE / "results" / "long_context.json"))
    args = parser.parse_args()
    import torch
    from report import write_report

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    peak, rows = peak_flops(), []

    def add(name: str, case: str, cap: float, steps: int, warm_up: int) -> dict[str, Any]:
        rows.append(measure(name, case, cap, steps, warm_up, args.timeout_s, peak))
        write_report(args.out, f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores", rows)
        return rows[-1]

    if "short" in args.only:
        for case, cap, other in (("3b:4096:4", 24, "memory"), ("3b:32768:1", 64, "memory-ckpt")):
            for name in [*args.short, other] if case in args.short_cases else []:
                add(name, case, cap, 10, 5)
    if "long" in args.only:
        for name in args.long:
            fixed = "%auto" not in name
            add(name, "4b:131072:1", 80, args.steps - fixed, args.steps - 1 - fixed)
    for model in args.ladder if "ladder" in args.only else []:
        deadline, num_tokens = time.monotonic() + args.ladder_s, args.ladder_from
        while time.monotonic() < deadline and "failed" not in add(
            args.ladder_name, f"{model}:{num_tokens}:1", 24, 2, 1
        ):
            num_tokens *= 2


if __name__ == "__main__":
    main()
